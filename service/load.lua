-- Head and log as of one moment, and whether a place where somebody saw the session stand is on its line.
--
-- KEYS: head, log, trail
-- ARGV: the sequence number after which the log is wanted (-1: all of it, -2: nothing), then the place: its sequence
--       number ('' for none), its commit, its commit as the parent of an entry
-- Returns {head fields, line, elements}, without elements where none are wanted or the log does not reach back so far.
-- The line is 'off' where another commit is at the place, or the session does not get there. What is too long ago to be
-- known counts as 'on'.
local fields = redis.call('HGETALL', KEYS[1])
if #fields == 0 then return {} end
local head = redis.call('HMGET', KEYS[1], 'base', 'seq', 'commit', 'trail')
local base, seq = tonumber(head[1]), tonumber(head[2])
if not base or not seq then return {fields, 'on'} end -- of another format: whoever reads it will see

local line, at = 'on', tonumber(ARGV[2])
if at then
  local commit = string.gsub(head[3], '^lost:', '')
  local entry = at >= base and redis.call('LINDEX', KEYS[2], at - base)
  local cut = at < base and head[4] == head[1] and redis.call('LINDEX', KEYS[3], at - base - 1)
  if at > seq or (at == seq and commit ~= ARGV[3]) then line = 'off' end
  if entry and not string.find(entry, ARGV[4], 1, true) then line = 'off' end
  if cut and cut ~= ARGV[3] then line = 'off' end
end

local after = tonumber(ARGV[1])
if after == -2 then return {fields, line} end
if after < 0 then after = base end
if after < base then return {fields, line} end
return {fields, line, redis.call('LRANGE', KEYS[2], after - base, -1)}
