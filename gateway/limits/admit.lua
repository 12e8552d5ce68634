-- Take every demand and the credit hold, or nothing.
--
-- KEYS  1 account  2 holds  3 deadlines  4 outbox  5 tombstone of this request  6.. one counter per demand
-- ARGV  1 request id  2 hold in micro-credits (0: free, no balance needed)  3 lease in ms  4 outbox entries at most
--       5.. four per demand: algorithm, limit, window ms, cost
-- Reply {status, now ms, available micro-credits, used 1, retry ms 1, used 2, retry ms 2, ...}
--   OK        taken                                  GONE      the request was already settled or cancelled
--   DUP       taken by an earlier copy of this call  MISS      the balance is not here: install it and ask again
--   NOCREDIT  the balance is too small               INFLIGHT  enough, but held by requests in flight
--   FULL      the outbox is at its bound             DENY      a demand does not fit (retry ms > 0 marks which)
local account, holds, deadlines, outbox, tombstone = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local rid, hold, lease = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local now = clock(account)
local demands = (#ARGV - 4) / 4

-- Reads only, and every key is touched: a key of a foreign type fails here, before anything is written.
local reply = {'OK', int(now), '0'}
local fits = true
for d = 1, demands do
  local a = 4 * d + 1
  local used, retry = KINDS[ARGV[a]].check(KEYS[5 + d], tonumber(ARGV[a + 1]), tonumber(ARGV[a + 2]),
    tonumber(ARGV[a + 3]), now)
  reply[2 + 2 * d] = int(used)
  reply[3 + 2 * d] = int(retry)
  fits = fits and retry == 0
end

if redis.call('EXISTS', tombstone) == 1 then
  reply[1] = 'GONE'
  return reply
end
if redis.call('HEXISTS', holds, rid) == 1 then
  reply[1] = 'DUP'
  return reply
end
if hold > 0 then
  local sums = redis.call('HMGET', account, 'p', 'u', 'h')
  if not sums[1] then
    reply[1] = 'MISS'
    return reply
  end
  local owned = tonumber(sums[1]) - tonumber(sums[2] or '0')
  local available = owned - tonumber(sums[3] or '0')
  reply[3] = int(available)
  if available < hold then
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
  -- The lease first: its key is the one that was not read above, and nothing is written when it is of a foreign type.
  redis.call('ZADD', deadlines, int(now + lease), rid)
  -- Until a heartbeat says more, a flat price is owed in full: that is what a gateway that dies now leaves behind.
  redis.call('HSET', holds, rid, int(hold) .. ':' .. int(hold))
  redis.call('HINCRBY', account, 'h', int(hold))
end
for d = 1, demands do
  local a = 4 * d + 1
  KINDS[ARGV[a]].take(KEYS[5 + d], tonumber(ARGV[a + 1]), tonumber(ARGV[a + 2]), tonumber(ARGV[a + 3]), now, rid)
end
redis.call('HSET', account, 'l', int(now))
if hold > 0 then
  redis.call('PERSIST', account)
elseif redis.call('TTL', account) == -1 then
  refresh_ttl(account)
end
return reply
