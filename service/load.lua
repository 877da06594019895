-- Head and log as of one moment. KEYS: head, log. ARGV: the sequence number after which the log is wanted.
-- Returns {head fields, elements}, or {head fields} where the log no longer reaches back so far.
local fields = redis.call('HGETALL', KEYS[1])
if #fields == 0 then return {} end
local base = tonumber(redis.call('HGET', KEYS[1], 'base'))
local after = tonumber(ARGV[1])
if after < 0 then after = base end
if after < base then return {fields} end
return {fields, redis.call('LRANGE', KEYS[2], after - base, -1)}
