-- The lease of a hold ran out: its gateway died or stalled. Charge its last checkpoint.
--
-- KEYS  1 account  2 holds  3 deadlines  4 outbox  5 tombstone  6 mirror
-- ARGV  1 request id  2 on_expiry: checkpoint | hold | release  3 mirror TTL in s
-- Reply ALIVE (renewed meanwhile) | DUP | OK
local account, holds, deadlines, outbox, tombstone, mirror = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6]
local rid = ARGV[1]
local deadline = redis.call('ZSCORE', deadlines, rid)
local verdict = redis.call('GET', tombstone)
local taken_at = string.match(verdict or 'admitted:0', '^admitted:(%d+)$')
if not deadline or not taken_at then
  return 'DUP'
end
local sums = redis.call('HMGET', account, 'p', 'u', 'h', 'l', 'v')
if tonumber(deadline) > clock(sums[4]) then
  return 'ALIVE'
end
local amount, used, held = drop_hold(account, holds, deadlines, rid, sums[3])
redis.call('ZREM', deadlines, rid)
local charge = used or 0
if ARGV[2] == 'hold' then
  charge = amount or 0
elseif ARGV[2] == 'release' then
  charge = 0
end
redis.call('SET', tombstone, 'orphaned:' .. int(charge) .. ':' .. taken_at, 'EX', ORPHAN_TOMBSTONE_TTL_S)
if charge > 0 then
  redis.call('XADD', outbox, '*', 'r', rid, 'k', 'orphan', 'a', int(charge), 'd', int(charge), 'm',
    '{"basis":"' .. ARGV[2] .. '"}', 'v', sums[5] or '-1')
end
if sums[1] then
  local unposted = tonumber(sums[2] or '0') + charge
  redis.call('HSET', account, 'u', int(unposted), 'h', int(held))
  refresh_ttl(account, unposted, held)
  if charge > 0 then
    write_mirror(mirror, tonumber(sums[1]), unposted, tonumber(ARGV[3]))
  end
else
  redis.call('HDEL', account, 'h')
end
return 'OK'
