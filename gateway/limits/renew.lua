-- The request still runs: its hold and its concurrency leases last another lease.
--
-- KEYS  1 account  2 holds  3 deadlines  4 tombstone  5.. the demands' counters
-- ARGV  1 request id  2 lease in ms  3 used so far in micro-credits  4.. the demands' rows
-- Reply 1, or 0 when the hold is gone (swept after a stall); the settle will book the difference.
local account, holds, deadlines, tombstone = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local rid, lease = ARGV[1], tonumber(ARGV[2])
local now = clock(redis.call('HGET', account, 'l'))
local k, a = 5, 4
while a <= #ARGV do
  local kind = KINDS[ARGV[a]]
  if kind.renew then
    kind.renew(k, a, now, rid)
  end
  k, a = k + kind.keys, a + kind.width
end
-- It tells the settle when the demands were taken, so it lasts as long as the request.
if string.sub(redis.call('GET', tombstone) or '', 1, 9) == 'admitted:' then
  redis.call('EXPIRE', tombstone, TOMBSTONE_TTL_S)
end
local text = redis.call('HGET', holds, rid)
if not text then
  return 0
end
local amount, used = parse_hold(text)
redis.call('HSET', holds, rid, int(amount) .. ':' .. int(math.max(used, math.min(amount, tonumber(ARGV[3])))))
redis.call('ZADD', deadlines, 'XX', int(now + lease), rid)
return 1
