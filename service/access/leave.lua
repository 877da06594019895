-- Takes a session out of its tenant's usage. KEYS: usage. ARGV: id
local found = redis.call('HGET', KEYS[1], ARGV[1])
if not found then return 0 end
-- First what makes the hash smaller: a store that is full lets the rest of a script through once it has begun to write.
redis.call('HDEL', KEYS[1], ARGV[1])
if redis.call('HLEN', KEYS[1]) == 1 then
  redis.call('DEL', KEYS[1])
else
  local bytes = tonumber(string.match(found, '^%d+'))
  for size in string.gmatch(found, ':(%d+):') do bytes = bytes + tonumber(size) end
  redis.call('HINCRBY', KEYS[1], 'total', string.format('%.0f', -bytes))
end
return 1
