-- Lets a session whose store went back go on from where it stands. The epoch tells those who saw it stand elsewhere
-- that something was accepted, and `given` at which commits they told of it: who saw it at another has yet to tell.
-- `given_epoch` says that `given` is up to date: older releases accept without it.
--
-- KEYS: head
-- ARGV: the commit that it was found with, what was known then of what it lost (JSON), the commits that were told,
--       channel, message
local head = redis.call('HMGET', KEYS[1], 'commit', 'lost', 'told', 'given')
if not head[1] then return {'GONE'} end
if head[1] ~= ARGV[1] or not head[2] or head[2] ~= ARGV[2] or (head[3] or '') ~= ARGV[3] then return {'STALE'} end
local given = (head[4] or '') .. ARGV[3]
-- 256 commits of 16 digits, each with a blank before it; who stood at an older one would tell once more.
if #given > 4352 then given = string.sub(given, -4352) end
redis.call('HDEL', KEYS[1], 'lost', 'told')
redis.call('HSET', KEYS[1], 'commit', (string.gsub(head[1], '^lost:', '')))
local epoch = redis.call('HINCRBY', KEYS[1], 'epoch', 1)
redis.call('HSET', KEYS[1], 'given', given, 'given_epoch', epoch)
redis.call('PUBLISH', ARGV[4], ARGV[5])
return {'OK'}
