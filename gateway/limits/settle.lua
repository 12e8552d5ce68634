-- End a request's hold: charge what was used, give the rest back, correct the limits. Any number of times, one effect.
--
-- KEYS  1 account  2 holds  3 deadlines  4 outbox  5 tombstone  6 mirror  7.. the demands' counters
-- ARGV  1 request id  2 charge in micro-credits (0: released)  3 meta (JSON, for the ledger)  4 mirror TTL in s
--       5.. the demands' rows, each with what was really used behind it, incarnation of the server
-- Reply {status, now us, outbox entry id, birth}: OK | DUP | MISS: a charge is due but this server lost the account, so it
-- must be posted to PostgreSQL directly. Nothing can be told of an entry in a hash without birth but that it was written.
local account, holds, deadlines, outbox, tombstone, mirror = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6]
local incarnation = table.remove(ARGV)
local rid, charge = ARGV[1], tonumber(ARGV[2])
local sums = redis.call('HMGET', account, 'p', 'u', 'h', 'l', 'r', 'b', 'v')
local birth = sums[5] == incarnation and sums[6] or ''
local now, us = clock(sums[4])
local verdict = redis.call('GET', tombstone) or ''
if string.sub(verdict, 1, 8) == 'settled:' then
  return {'DUP', int(us), '', birth}
end
-- The sweeper may have charged this request after its lease ran out; a settle outranks that and books the difference.
local swept, taken_at = string.match(verdict, '^orphaned:(%d+):(%d+)$')
swept, taken_at = tonumber(swept), tonumber(taken_at or string.match(verdict, '^admitted:(%d+)$'))
if charge > 0 and not sums[1] then
  return {'MISS', int(us), '', ''}
end

if charge > 0 or swept then
  -- An outbox of a foreign type fails here, while the hold still stands.
  redis.call('XLEN', outbox)
end
-- Money first: should a counter fail (a key of a foreign type), what is owed is written and a repeat finds it done.
local amount, _, held = drop_hold(account, holds, deadlines, rid, sums[3])
local unposted = tonumber(sums[2] or '0')
local entry = ''
if charge > 0 or swept then
  -- What is given back beyond the sweeper's charge is spendable once PostgreSQL has it: until then it might be seen twice,
  -- in a balance that was read after the posting and here.
  local delta = math.max(0, charge - (swept or 0))
  entry = redis.call('XADD', outbox, '*', 'r', rid, 'k', 'settle', 'a', int(charge), 'd', int(delta), 'm', ARGV[3],
    'v', sums[7] or '-1')
  unposted = unposted + delta
end
if sums[1] then
  if amount or charge > 0 then
    redis.call('HSET', account, 'u', int(unposted), 'h', int(held))
    refresh_ttl(account, unposted, held)
  end
  if charge > 0 then
    write_mirror(mirror, tonumber(sums[1]), unposted, tonumber(ARGV[4]))
  end
elseif amount then
  redis.call('HDEL', account, 'h')
end
redis.call('SET', tombstone, 'settled:' .. int(charge), 'EX', TOMBSTONE_TTL_S)
-- A request that was never admitted took nothing.
local k, a = 7, 5
while taken_at and a <= #ARGV do
  local kind = KINDS[ARGV[a]]
  kind.settle(k, a, now, rid, taken_at, tonumber(ARGV[a + kind.width]))
  k, a = k + kind.keys, a + kind.width + 1
end
return {'OK', int(us), entry, birth}
