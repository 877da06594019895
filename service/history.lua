-- The history's lines of the steps after ARGV[1], oldest first, at most ARGV[2] of them. KEYS: head, history
-- One line a step, so the position follows from the step; a script, since a step may come between two commands.
local step = redis.call('HGET', KEYS[1], 'step')
if not step then return {} end
local after, count = tonumber(ARGV[1]), redis.call('LLEN', KEYS[2])
step = tonumber(step)
if step <= after then return {} end
local start = math.max(count - (step - after), 0)
return redis.call('LRANGE', KEYS[2], start, start + tonumber(ARGV[2]) - 1)
