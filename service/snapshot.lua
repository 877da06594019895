-- Puts a snapshot in the place of the one named `old`, and cuts the log up to where it stands. With `old` empty
-- it makes the session, which must not exist.
--
-- KEYS: head, log, blobs, trail, then `staged` temporary names, as many final names, then the names that go away
-- ARGV: old, seq, number of staged chunks, inline snapshot ('' if staged), its name, mark of the entry seq in the log,
--       number of entries that are cut off, number of commits, the commits of the last of these entries, of all where
--       they are fewer than the trail takes, then pairs for the head
local old, seq, staged = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local cut, commits = tonumber(ARGV[7]), tonumber(ARGV[8])
local head = redis.call('HMGET', KEYS[1], 'snap', 'base', 'trail', 'lost')
local have, base = head[1], tonumber(head[2])
if old == '' then
  if have then return {'EXISTS'} end
elseif not have then
  return {'GONE'}
elseif have ~= old or head[4] then
  return {'STALE'}
else
  -- A store that went back has not all that its writer had: the snapshot must be of a state that this log leads to.
  local at = seq - base - 1
  local entry = at >= 0 and redis.call('LINDEX', KEYS[2], at)
  if not entry or not string.find(entry, ARGV[6], 1, true) then return {'STALE'} end
end
for i = 1, staged do
  if redis.call('EXISTS', KEYS[4 + i]) == 0 then return {'LOST'} end
end
if staged == 0 then redis.call('SET', ARGV[5], ARGV[4]) end
for i = 1, staged do
  redis.call('RENAME', KEYS[4 + i], KEYS[4 + staged + i])
  redis.call('PERSIST', KEYS[4 + staged + i])
end
if old ~= '' then
  redis.call('LTRIM', KEYS[2], seq - base, -1)
  -- The trail ends at the base, or is none: whoever cuts the log without it leaves one that must not be believed.
  if head[3] ~= head[2] or commits < cut then redis.call('DEL', KEYS[4]) end
  if commits > 0 and cut == seq - base then
    -- By the thousand: each call costs, and Lua's stack takes no more than some thousand at once.
    for i = 1, commits, 1000 do
      redis.call('RPUSH', KEYS[4], unpack(ARGV, 8 + i, 8 + math.min(i + 999, commits)))
    end
    redis.call('LTRIM', KEYS[4], -10000, -1)
    redis.call('SADD', KEYS[3], KEYS[4]) -- so that it goes when the session goes
    redis.call('HSET', KEYS[1], 'trail', seq)
  end
end
for i = 5 + 2 * staged, #KEYS do
  redis.call('UNLINK', KEYS[i])
  redis.call('SREM', KEYS[3], KEYS[i])
end
redis.call('HSET', KEYS[1], 'base', seq, unpack(ARGV, 9 + commits))
return {'OK'}
