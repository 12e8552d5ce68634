-- The request still runs: its hold and its concurrency leases last another lease. A hold that this server has lost, or
-- never had, is written again, and one of which it has lost a part grows to what the request knows: what runs is owed.
--
-- KEYS  1 account  2 holds  3 deadlines  4 tombstone  5.. the demands' counters
-- ARGV  1 request id  2 lease in ms  3 used so far in micro-credits  4 held, 0 for none  5.. the demands' rows,
--       incarnation of the server
-- Reply {status, epoch, owed, birth}: OK | GONE (swept after a stall, or settled; the settle books the difference) | MISS
-- (there is no account to hold anything in). owed: held and unposted, all in all.
local account, holds, deadlines, tombstone = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local incarnation = table.remove(ARGV)
local rid, lease, used_now, amount_now = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local sums = redis.call('HMGET', account, 'p', 'u', 'h', 'l', 'ep', 'b', 'r')
local now = clock(sums[4])
local k, a = 5, 5
while a <= #ARGV do
  local kind = KINDS[ARGV[a]]
  if kind.renew then
    kind.renew(k, a, now, rid)
  end
  k, a = k + kind.keys, a + kind.width
end
local verdict = redis.call('GET', tombstone)
-- It tells the settle when the demands were taken, so it lasts as long as the request.
if verdict and string.sub(verdict, 1, 9) == 'admitted:' then
  redis.call('EXPIRE', tombstone, TOMBSTONE_TTL_S)
end
local held = tonumber(sums[3] or '0')
local birth = sums[7] == incarnation and sums[6] or ''
local reply = {'OK', sums[5] or '0', int(tonumber(sums[2] or '0') + held), birth or ''}
if amount_now == 0 then
  return reply
end
local text = redis.call('HGET', holds, rid)
if not text then
  if verdict and string.sub(verdict, 1, 9) ~= 'admitted:' then
    reply[1] = 'GONE'
    return reply
  elseif not sums[1] then
    reply[1] = 'MISS'
    return reply
  end
  redis.call('HSET', holds, rid, int(amount_now) .. ':' .. int(math.min(amount_now, used_now)))
  redis.call('ZADD', deadlines, int(now + lease), rid)
  redis.call('HSET', account, 'h', int(held + amount_now))
  redis.call('PERSIST', account)
  if not verdict then
    redis.call('SET', tombstone, 'admitted:' .. int(now), 'EX', TOMBSTONE_TTL_S)
  end
  reply[3] = int(tonumber(sums[2] or '0') + held + amount_now)
  return reply
end
local amount, used = parse_hold(text)
if amount_now > amount then
  -- A server that came back with an older state of its own knows nothing of what was granted since.
  if sums[1] then
    redis.call('HSET', account, 'h', int(held + amount_now - amount))
  end
  reply[3] = int(tonumber(sums[2] or '0') + held + amount_now - amount)
  amount = amount_now
end
redis.call('HSET', holds, rid, int(amount) .. ':' .. int(math.max(used, math.min(amount, used_now))))
redis.call('ZADD', deadlines, 'XX', int(now + lease), rid)
return reply
