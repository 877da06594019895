-- Removes all keys of a session. KEYS: head, log, history, blobs, then the snapshot's. ARGV: snap ('' for any),
-- commit ('' for any), channel, message
local head = redis.call('HMGET', KEYS[1], 'snap', 'commit')
if not head[2] then return {'GONE'} end
if ARGV[1] ~= head[1] or (ARGV[2] ~= '' and ARGV[2] ~= head[2]) then return {'STALE'} end
local blobs = redis.call('SMEMBERS', KEYS[4])
for i = 1, #blobs do redis.call('UNLINK', blobs[i]) end
for i = 1, #KEYS do redis.call('UNLINK', KEYS[i]) end
redis.call('PUBLISH', ARGV[3], ARGV[4])
return {'OK'}
