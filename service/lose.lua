-- Marks a session that does not stand where a service saw it stand: the store went back. Nobody appends to it then,
-- since no memory stands at the commit that the head gets. Of several that saw it the one that saw most counts.
--
-- KEYS: head
-- ARGV: commit and sequence number that the head was found with, what is to be known of it (JSON), the sequence number
--       that was seen, its epoch, channel, message
local head = redis.call('HMGET', KEYS[1], 'commit', 'seq', 'lost', 'epoch')
if not head[1] then return {'GONE'} end
if head[1] ~= ARGV[1] or head[2] ~= ARGV[2] then return {'STALE'} end
local more = not head[3] or tonumber(cjson.decode(head[3])['seq']) < tonumber(ARGV[4])
local before = tonumber(head[4] or '0')
local epoch = math.max(before, tonumber(ARGV[5]))
if not more and epoch == before then return {'OK'} end
redis.call('HSET', KEYS[1], 'epoch', epoch)
if more then redis.call('HSET', KEYS[1], 'lost', ARGV[3]) end
if not head[3] then redis.call('HSET', KEYS[1], 'commit', 'lost:' .. head[1]) end
redis.call('PUBLISH', ARGV[6], ARGV[7])
return {'OK'}
