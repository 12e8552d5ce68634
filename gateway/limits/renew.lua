-- The request still runs: its hold and its concurrency leases last another lease.
--
-- KEYS  1 account  2 holds  3 deadlines  4.. one counter per demand
-- ARGV  1 request id  2 lease in ms  3 used so far in micro-credits  4.. three per demand: algorithm, limit, window ms
-- Reply 1, or 0 when the hold is gone (swept after a stall); the settle will book the difference.
local account, holds, deadlines = KEYS[1], KEYS[2], KEYS[3]
local rid, lease = ARGV[1], tonumber(ARGV[2])
local now = clock(account)
for d = 1, (#ARGV - 3) / 3 do
  local a = 3 * d + 1
  KINDS[ARGV[a]].renew(KEYS[3 + d], tonumber(ARGV[a + 1]), tonumber(ARGV[a + 2]), now, rid)
end
local text = redis.call('HGET', holds, rid)
if not text then
  return 0
end
local amount, used = parse_hold(text)
redis.call('HSET', holds, rid, int(amount) .. ':' .. int(math.max(used, math.min(amount, tonumber(ARGV[3])))))
redis.call('ZADD', deadlines, 'XX', int(now + lease), rid)
return 1
