-- Writes the session's last commit over itself, so that a barrier behind it covers all that was written before.
-- KEYS: head. ARGV: the commit that it must be ('' for any)
local head = redis.call('HGET', KEYS[1], 'commit')
if not head then return {'GONE'} end
if ARGV[1] ~= '' and ARGV[1] ~= head then return {'STALE'} end
redis.call('HSET', KEYS[1], 'commit', head)
return {'OK'}
