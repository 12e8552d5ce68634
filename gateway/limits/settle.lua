-- End a request's hold: charge what was used, give the rest back, correct the limits. Any number of times, one effect.
--
-- KEYS  1 account  2 holds  3 deadlines  4 outbox  5 tombstone  6 mirror  7.. one counter per demand
-- ARGV  1 request id  2 charge in micro-credits (0: released)  3 meta (JSON, for the ledger)  4 mirror TTL in s
--       5 time of admission in ms (0: never admitted)  6.. five per demand: algorithm, limit, window ms, taken, actual
-- Reply OK | DUP | MISS: a charge is due but this server lost the account, so it must be posted to PostgreSQL directly.
local account, holds, deadlines, outbox, tombstone, mirror = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6]
local rid, charge, taken_at = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[5])

local verdict = redis.call('GET', tombstone)
if verdict and string.sub(verdict, 1, 8) == 'settled:' then
  return 'DUP'
end
-- The sweeper may have charged this request after its lease ran out; a settle outranks that and books the difference.
local swept = verdict and tonumber(string.match(verdict, '^orphaned:(%d+)$')) or nil
if charge > 0 and redis.call('HEXISTS', account, 'p') == 0 then
  return 'MISS'
end

-- Money first: should a counter fail (a key of a foreign type), what is owed is written and a repeat finds it done.
local now = clock(account)
drop_hold(account, holds, deadlines, rid)
if charge > 0 or swept then
  -- What is given back beyond the sweeper's charge is spendable once PostgreSQL has it: until then it might be seen twice,
  -- in a balance that was read after the posting and here.
  local delta = math.max(0, charge - (swept or 0))
  redis.call('XADD', outbox, '*', 'r', rid, 'k', 'settle', 'a', int(charge), 'd', int(delta), 'm', ARGV[3])
  if delta > 0 then
    redis.call('HINCRBY', account, 'u', int(delta))
    write_mirror(account, mirror, ARGV[4])
  end
end
redis.call('SET', tombstone, 'settled:' .. int(charge), 'EX', TOMBSTONE_TTL_S)
for d = 1, (#ARGV - 5) / 5 do
  local a = 5 * d + 1
  KINDS[ARGV[a]].settle(KEYS[6 + d], tonumber(ARGV[a + 1]), tonumber(ARGV[a + 2]), tonumber(ARGV[a + 3]),
    tonumber(ARGV[a + 4]), taken_at, now, rid)
end
if redis.call('EXISTS', account) == 1 then
  refresh_ttl(account)
end
return 'OK'
