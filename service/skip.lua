-- Counts a gradient that was skipped, if the session is still there. KEYS: head
if redis.call('EXISTS', KEYS[1]) == 0 then return {'GONE'} end
redis.call('HINCRBY', KEYS[1], 'skipped', 1)
return {'OK'}
