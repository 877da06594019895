-- Puts a snapshot in the place of the one named `old`, and cuts the log up to where it stands. With `old` empty
-- it makes the session, which must not exist.
--
-- KEYS: head, log, blobs, then `staged` temporary names, as many final names, then the names that go away
-- ARGV: old, seq, number of staged chunks, inline snapshot ('' if staged), its name, mark of the entry seq in the log,
--       then pairs for the head
local old, seq, staged = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local have = redis.call('HGET', KEYS[1], 'snap')
if old == '' then
  if have then return {'EXISTS'} end
elseif not have then
  return {'GONE'}
elseif have ~= old then
  return {'STALE'}
else
  -- A store that went back has not all that its writer had: the snapshot must be of a state that this log leads to.
  local at = seq - tonumber(redis.call('HGET', KEYS[1], 'base')) - 1
  local entry = at >= 0 and redis.call('LINDEX', KEYS[2], at)
  if not entry or not string.find(entry, ARGV[6], 1, true) then return {'STALE'} end
end
for i = 1, staged do
  if redis.call('EXISTS', KEYS[3 + i]) == 0 then return {'LOST'} end
end
if staged == 0 then redis.call('SET', ARGV[5], ARGV[4]) end
for i = 1, staged do
  redis.call('RENAME', KEYS[3 + i], KEYS[3 + staged + i])
  redis.call('PERSIST', KEYS[3 + staged + i])
end
if old ~= '' then
  redis.call('LTRIM', KEYS[2], seq - redis.call('HGET', KEYS[1], 'base'), -1)
end
for i = 4 + 2 * staged, #KEYS do
  redis.call('UNLINK', KEYS[i])
  redis.call('SREM', KEYS[3], KEYS[i])
end
redis.call('HSET', KEYS[1], 'base', seq, unpack(ARGV, 7))
return {'OK'}
