-- Appends a batch of entries to a session's log, if nobody else has since the commit `parent`.
--
-- KEYS: head, log, history, blobs, then `staged` temporary names, then as many final names
-- ARGV: parent, commit, number of log elements, number of history records, number of staged chunks, channel,
--       message, then the log elements, the history records, and field/value pairs for the head
-- Returns {outcome}, of OK {outcome, epoch}: whoever goes on from here is to know what was accepted before.
local found = redis.call('HMGET', KEYS[1], 'commit', 'epoch')
local head, epoch = found[1], found[2]
if not head then return {'GONE'} end
if head == ARGV[2] then -- the same call, sent twice; it writes, or a barrier behind it would cover nothing
  redis.call('HSET', KEYS[1], 'commit', head)
  return {'OK', epoch}
end
if head ~= ARGV[1] then return {'STALE'} end
local elements, records, staged = tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])
for i = 1, staged do
  if redis.call('EXISTS', KEYS[4 + i]) == 0 then return {'LOST'} end
end
for i = 1, staged do
  local final = KEYS[4 + staged + i]
  redis.call('RENAME', KEYS[4 + i], final)
  redis.call('PERSIST', final)
  redis.call('SADD', KEYS[4], final)
end
local at = 7
for i = 1, elements do redis.call('RPUSH', KEYS[2], ARGV[at + i]) end
at = at + elements
if records > 0 then
  for i = 1, records do redis.call('RPUSH', KEYS[3], ARGV[at + i]) end
  redis.call('LTRIM', KEYS[3], -10000, -1)
end
at = at + records
redis.call('HINCRBY', KEYS[1], 'seq', elements)
redis.call('HSET', KEYS[1], 'commit', ARGV[2], unpack(ARGV, at + 1))
redis.call('PUBLISH', ARGV[6], ARGV[7])
return {'OK', epoch}
