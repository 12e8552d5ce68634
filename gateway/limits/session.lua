-- A turn of a conversation has ended: remember it. Counters only grow, so turns that overlap never lose an update.
--
-- KEYS  1 record  2 index of the org's sessions
-- ARGV  1 idle TTL in ms  2 absolute TTL in ms  3 sessions per org at most  4 tokens  5 model ('' unknown)
local record, index = KEYS[1], KEYS[2]
local t = redis.call('TIME')
local now = tonumber(t[1]) * 1000 + math.floor(tonumber(t[2]) / 1000)
local idle, absolute = tonumber(ARGV[1]), tonumber(ARGV[2])
local created = tonumber(redis.call('HGET', record, 'created') or '0')
if now - created >= absolute then
  redis.call('DEL', record)
  created = now
end
if created == now then
  redis.call('HSET', record, 'created', int(now))
end
redis.call('HINCRBY', record, 'turn', 1)
redis.call('HINCRBY', record, 'tokens', ARGV[4])
redis.call('HSET', record, 'seen', int(now))
if ARGV[5] ~= '' then
  redis.call('HSET', record, 'model', ARGV[5])
end
redis.call('PEXPIRE', record, int(math.min(idle, created + absolute - now)))
-- The index only bounds how many sessions an org can keep; the longest idle one makes room.
redis.call('ZREMRANGEBYSCORE', index, '-inf', int(now - idle))
redis.call('ZADD', index, int(now), record)
redis.call('PEXPIRE', index, int(idle))
local surplus = redis.call('ZCARD', index) - tonumber(ARGV[3])
if surplus > 0 then
  for _, oldest in ipairs(redis.call('ZRANGE', index, 0, int(surplus - 1))) do
    redis.call('DEL', oldest)
    redis.call('ZREM', index, oldest)
  end
end
return redis.call('HGET', record, 'turn')
