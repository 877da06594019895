-- Lets a session whose store went back go on from where it stands. The epoch tells those who saw it stand elsewhere
-- that this was accepted, and `given` up to which entry: who saw more than that has something to tell yet.
--
-- KEYS: head
-- ARGV: the commit that it was found with, what was known then of what it lost (JSON), channel, message
local head = redis.call('HMGET', KEYS[1], 'commit', 'lost', 'given')
if not head[1] then return {'GONE'} end
if head[1] ~= ARGV[1] or not head[2] or head[2] ~= ARGV[2] then return {'STALE'} end
local given = math.max(tonumber(head[3] or '0'), tonumber(cjson.decode(head[2])['seq']))
redis.call('HDEL', KEYS[1], 'lost')
redis.call('HSET', KEYS[1], 'given', given)
redis.call('HSET', KEYS[1], 'commit', (string.gsub(head[1], '^lost:', '')))
redis.call('HINCRBY', KEYS[1], 'epoch', 1)
redis.call('PUBLISH', ARGV[3], ARGV[4])
return {'OK'}
