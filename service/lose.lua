-- Marks a session that does not stand where a service saw it stand: the store went back. Nobody appends to it then,
-- since no memory stands at the commit that the head gets. Of several that saw it the one that saw most counts; the
-- commits at which all of them saw it are kept beside it, for what is accepted is what was told.
--
-- KEYS: head
-- ARGV: commit, sequence number and epoch that the head was found with, what is to be known of it (JSON), the sequence
--       number that was seen, its epoch, its commit, channel, message
local head = redis.call('HMGET', KEYS[1], 'commit', 'seq', 'lost', 'epoch', 'told', 'given_epoch')
if not head[1] then return {'GONE'} end
local before = head[4] or '0'
if head[1] ~= ARGV[1] or head[2] ~= ARGV[2] or before ~= ARGV[3] then return {'STALE'} end
local more = not head[3] or tonumber(cjson.decode(head[3])['seq']) < tonumber(ARGV[5])
local told = head[3] and head[5] or ''
local new = not string.find(told, ARGV[7], 1, true)
local epoch = math.max(tonumber(before), tonumber(ARGV[6]))
if not more and not new and epoch == tonumber(before) then return {'OK'} end
redis.call('HSET', KEYS[1], 'epoch', epoch)
if head[6] == before then redis.call('HSET', KEYS[1], 'given_epoch', epoch) end -- who accepted kept `given`
if more then redis.call('HSET', KEYS[1], 'lost', ARGV[4]) end
if new then redis.call('HSET', KEYS[1], 'told', told .. ' ' .. ARGV[7]) end
if not head[3] then redis.call('HSET', KEYS[1], 'commit', 'lost:' .. head[1]) end
redis.call('PUBLISH', ARGV[8], ARGV[9])
return {'OK'}
