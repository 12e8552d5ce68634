-- Take every demand and the credit hold, or nothing.
--
-- KEYS  1 account  2 holds  3 deadlines  4 outbox  5 tombstone of this request  6.. the demands' counters
-- ARGV  1 request id  2 wanted hold in micro-credits (0: free, no balance needed)  3 the least hold that will do
--       4 owed as soon as it runs  5 lease in ms  6 outbox entries at most  7 demands that may refuse; those behind them
--       are shadows  8 capped: 0 no, 1 yes, 2 yes and nothing can change it  9.. the demands' rows, incarnation of the
--       server
-- Reply {status, now us, available, owned, held by this request, epoch, need, birth, used 1, retry ms 1, used 2, ...}
--   OK        taken                                  GONE      the request was already settled or cancelled
--   DUP       taken by an earlier copy of this call  MISS      the balance is not here: install it and ask again
--   NOCREDIT  the balance is too small               LOST      the hash is of a process that is gone: install, ask again
--   INFLIGHT  enough, but held or set aside          PERIOD    the grant period is over: turn it and ask again
--   FULL      the outbox is at its bound             CAP       raise the cap to `need` and ask again
--   DENY      a demand does not fit (retry ms > 0 marks which)
-- need: of CAP as it says; of NOCREDIT and INFLIGHT what waits to be posted, which may be missing from the balance already.
-- A retry ms below 0 says that the demand fits and costs nothing; why, its kind tells.
-- A shadow that does not fit is not taken: it counts as it would if it refused.
local account, holds, deadlines, outbox, tombstone = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local incarnation = table.remove(ARGV)
local rid, hold, least, enforced, capped = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[7]), ARGV[8]
local sums = redis.call('HMGET', account, 'p', 'u', 'h', 'l', 's', 'c', 'ep', 'pe', 'r', 'b')
local now, us = clock(sums[4])

-- Reads only, and every counter is touched: a key of a foreign type fails here, before anything is written.
local reply = {'OK', int(us), '0', '0', '0', sums[7] or '0', '0', sums[10] or ''}
local found = {}
local fits = true
local k, a, demands = 6, 9, 0
while a <= #ARGV do
  local kind = KINDS[ARGV[a]]
  local used, retry, s1, s2, s3, s4 = kind.check(k, a, now)
  demands = demands + 1
  reply[7 + 2 * demands], reply[8 + 2 * demands] = int(used), int(retry)
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
  reply[5] = int(parse_hold(redis.call('HGET', holds, rid) or '0:0'))
  return reply
end
local unposted, held = tonumber(sums[2] or '0'), tonumber(sums[3] or '0')
if hold > 0 then
  if not sums[1] then
    reply[1] = 'MISS'
    return reply
  elseif sums[9] ~= incarnation then
    reply[1] = 'LOST'
    return reply
  end
  local period_ends = tonumber(sums[8] or '0')
  if period_ends > 0 and now >= period_ends then
    reply[1] = 'PERIOD'
    return reply
  end
  local owned = tonumber(sums[1]) - unposted
  local available = owned - tonumber(sums[5] or '0') - held
  reply[3], reply[4] = int(available), int(owned)
  hold = math.min(hold, available)
  if hold < least then
    reply[1] = owned < least and 'NOCREDIT' or 'INFLIGHT'
    reply[7] = int(unposted)
    return reply
  end
  local room = tonumber(sums[6] or '0') - unposted - held
  if capped ~= '0' and hold > room then
    if capped == '1' then
      reply[1], reply[7] = 'CAP', int(unposted + held + hold)
      return reply
    elseif room < least then
      reply[1] = 'INFLIGHT'
      return reply
    end
    hold = room
  end
  if redis.call('XLEN', outbox) >= tonumber(ARGV[6]) then
    reply[1] = 'FULL'
    return reply
  end
end
if not fits then
  reply[1] = 'DENY'
  return reply
end

if hold > 0 then
  -- Until a heartbeat says more, this is what a gateway that dies now leaves behind.
  redis.call('HSET', holds, rid, int(hold) .. ':' .. int(math.min(hold, tonumber(ARGV[4]))))
  reply[5] = int(hold)
  -- These two keys were not read above: nothing is left written when either is of a foreign type.
  local leased = redis.pcall('ZADD', deadlines, int(now + tonumber(ARGV[5])), rid)
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
k, a = 6, 9
for d = 1, demands do
  local kind, state = KINDS[ARGV[a]], found[d]
  if state then
    kind.take(k, a, now, rid, state[1], state[2], state[3], state[4])
  end
  k, a = k + kind.keys, a + kind.width
end
return reply
