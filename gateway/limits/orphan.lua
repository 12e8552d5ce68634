-- The lease of a hold ran out: its gateway died or stalled. Charge its last checkpoint.
--
-- KEYS  1 account  2 holds  3 deadlines  4 outbox  5 tombstone  6 mirror
-- ARGV  1 request id  2 on_expiry: checkpoint | hold | release  3 mirror TTL in s
-- Reply ALIVE (renewed meanwhile) | DUP | OK
local account, holds, deadlines, outbox, tombstone, mirror = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6]
local rid = ARGV[1]
local deadline = redis.call('ZSCORE', deadlines, rid)
if not deadline or redis.call('EXISTS', tombstone) == 1 then
  return 'DUP'
end
if tonumber(deadline) > clock(account) then
  return 'ALIVE'
end
local amount, used = drop_hold(account, holds, deadlines, rid)
redis.call('ZREM', deadlines, rid)
local charge = used or 0
if ARGV[2] == 'hold' then
  charge = amount or 0
elseif ARGV[2] == 'release' then
  charge = 0
end
redis.call('SET', tombstone, 'orphaned:' .. int(charge), 'EX', ORPHAN_TOMBSTONE_TTL_S)
if charge > 0 then
  redis.call('XADD', outbox, '*', 'r', rid, 'k', 'orphan', 'a', int(charge), 'd', int(charge), 'm',
    '{"basis":"' .. ARGV[2] .. '"}')
  if redis.call('HEXISTS', account, 'p') == 1 then
    redis.call('HINCRBY', account, 'u', int(charge))
    write_mirror(account, mirror, ARGV[3])
  end
end
refresh_ttl(account)
return 'OK'
