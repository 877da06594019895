-- Enters a session into its tenant's usage, or what a change of it needs, if that stays within what the tenant may have.
--
-- KEYS: usage. ARGV: id, its bytes and the sequence number that these are of (where it has no entry), the bytes that it
-- needs beside them, the token of a change ('' for none), the time, most sessions, most bytes in all ('' for any)
local found = redis.call('HGET', KEYS[1], ARGV[1])
local total = redis.call('HGET', KEYS[1], 'total')
local sessions = redis.call('HLEN', KEYS[1]) - (total and 1 or 0)
-- What needs no more than there is is not asked: a change that makes a session smaller.
local asked = ARGV[5] == '' or tonumber(ARGV[4]) > 0
if not found and ARGV[5] == '' and ARGV[7] ~= '' and sessions >= tonumber(ARGV[7]) then return {'sessions', sessions} end
local all = tonumber(total or 0)
local more = tonumber(ARGV[4])
if not found then more = more + tonumber(ARGV[2]) end
if asked and more > 0 and ARGV[8] ~= '' and all + more > tonumber(ARGV[8]) then
  return {'state', string.format('%.0f', all)}
end
local entry = found or (ARGV[2] .. ' ' .. ARGV[3])
if ARGV[5] ~= '' then entry = entry .. ' ' .. ARGV[5] .. ':' .. ARGV[4] .. ':' .. ARGV[6] end
redis.call('HSET', KEYS[1], ARGV[1], entry)
redis.call('HINCRBY', KEYS[1], 'total', string.format('%.0f', more))
return {'OK'}
