-- Take every demand and the credit hold, or nothing.
--
-- KEYS  1 account  2 holds  3 deadlines  4 outbox  5 tombstone of this request  6.. the demands' counters
-- ARGV  1 request id  2 hold in micro-credits (0: free, no balance needed)  3 lease in ms  4 outbox entries at most
--       5 demands that may refuse; those behind them are shadows  6.. the demands' rows
-- Reply {status, now us, available micro-credits, used 1, retry ms 1, used 2, retry ms 2, ...}
--   OK        taken                                  GONE      the request was already settled or cancelled
--   DUP       taken by an earlier copy of this call  MISS      the balance is not here: install it and ask again
--   NOCREDIT  the balance is too small               INFLIGHT  enough, but held by requests in flight
--   FULL      the outbox is at its bound             DENY      a demand does not fit (retry ms > 0 marks which)
-- A retry ms below 0 says that the demand fits and costs nothing; why, its kind tells.
-- A shadow that does not fit is not taken: it counts as it would if it refused.
local account, holds, deadlines, outbox, tombstone = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local rid, hold, enforced = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[5])
local sums = redis.call('HMGET', account, 'p', 'u', 'h', 'l')
local now, us = clock(sums[4])

-- Reads only, and every counter is touched: a key of a foreign type fails here, before anything is written.
local reply = {'OK', int(us), '0'}
local found = {}
local fits = true
local k, a, demands = 6, 6, 0
while a <= #ARGV do
  local kind = KINDS[ARGV[a]]
  local used, retry, s1, s2, s3, s4 = kind.check(k, a, now)
  demands = demands + 1
  reply[2 + 2 * demands], reply[3 + 2 * demands] = int(used), int(retry)
  if retry <= 0 then
    found[demands] = {s1, s2, s3, s4}
  elseif demands <= enforced then
    fits = false
  end
  k, a = k + kind.keys, a + kind.width
end

local verdict = redis.call('GET', tombstone)
if verdict then
  local taken_at = string.match(verdict, '^admitted:(%d+)$')
  reply[1] = taken_at and 'DUP' or 'GONE'
  reply[2] = taken_at and taken_at .. '000' or reply[2]
  return reply
end
local unposted, held = tonumber(sums[2] or '0'), tonumber(sums[3] or '0')
if hold > 0 then
  if not sums[1] then
    reply[1] = 'MISS'
    return reply
  end
  local owned = tonumber(sums[1]) - unposted
  reply[3] = int(owned - held)
  if owned - held < hold then
    reply[1] = owned < hold and 'NOCREDIT' or 'INFLIGHT'
    return reply
  end
  if redis.call('XLEN', outbox) >= tonumber(ARGV[4]) then
    reply[1] = 'FULL'
    return reply
  end
end
if not fits then
  reply[1] = 'DENY'
  return reply
end

if hold > 0 then
  -- Until a heartbeat says more, a flat price is owed in full: that is what a gateway that dies now leaves behind.
  redis.call('HSET', holds, rid, int(hold) .. ':' .. int(hold))
  -- These two keys were not read above: nothing is left written when either is of a foreign type.
  local leased = redis.pcall('ZADD', deadlines, int(now + tonumber(ARGV[3])), rid)
  if type(leased) == 'table' then
    redis.call('HDEL', holds, rid)
    return leased
  end
  redis.call('HSET', account, 'l', int(now), 'h', int(held + hold))
  if held == 0 and unposted == 0 then
    redis.call('PERSIST', account)
  end
else
  redis.call('HSET', account, 'l', int(now))
  if not sums[1] and not sums[4] then
    refresh_ttl(account, unposted, held)
  end
end
redis.call('SET', tombstone, 'admitted:' .. int(now), 'EX', TOMBSTONE_TTL_S)
k, a = 6, 6
for d = 1, demands do
  local kind, state = KINDS[ARGV[a]], found[d]
  if state then
    kind.take(k, a, now, rid, state[1], state[2], state[3], state[4])
  end
  k, a = k + kind.keys, a + kind.width
end
return reply
