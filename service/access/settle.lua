-- Corrects what a session takes to what its head says, unless the entry is of a newer one; gives back what was taken for
-- a change, and for those that are too old to come to anything.
--
-- KEYS: usage. ARGV: id, bytes, sequence number of the head, token of the change ('' for none), the time before which
-- changes are too old, '1' to make an entry that is missing. Says whether an entry was made.
local found = redis.call('HGET', KEYS[1], ARGV[1])
if not found and ARGV[6] ~= '1' then return 0 end
local bytes, seq, changes = string.match(found or '0 0', '^(%d+) (%d+)(.*)$')
local more, kept = 0, ''
if tonumber(ARGV[3]) >= tonumber(seq) then
  more = tonumber(ARGV[2]) - tonumber(bytes)
  bytes, seq = ARGV[2], ARGV[3]
end
for change, token, size, at in string.gmatch(changes, '( (%w+):(%d+):(%d+))') do
  if token == ARGV[4] or tonumber(at) < tonumber(ARGV[5]) then more = more - tonumber(size) else kept = kept .. change end
end
local entry = bytes .. ' ' .. seq .. kept
if entry == found then return 0 end
redis.call('HSET', KEYS[1], ARGV[1], entry)
redis.call('HINCRBY', KEYS[1], 'total', string.format('%.0f', more))
return found and 0 or 1
