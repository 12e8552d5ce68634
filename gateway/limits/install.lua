-- Put a state of PostgreSQL here, unless a newer one is here already. Never additive: a hash that is missing, or that was
-- built on a process of the server that is gone, is built anew; what is held and what waits in the outbox is counted from
-- the keys themselves, and the new hash has no cap until PostgreSQL gives it one.
--
-- KEYS  1 account  2 holds  3 outbox  4 mirror
-- ARGV  1-7 state  8 mirror TTL in s  9 TTL of the account in s (0: the usual)  10 incarnation of the server
-- Reply {OK | BUILT, birth}
local account, holds, outbox, mirror = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local incarnation = ARGV[10]
local sums = redis.call('HMGET', account, 'p', 'v', 'u', 'h', 'r', 'b', 'l')
local balance, unposted, held, birth = sums[1], tonumber(sums[3] or '0'), tonumber(sums[4] or '0'), sums[6]
local status = 'OK'
if not balance or sums[5] ~= incarnation then
  status = 'BUILT'
  local now, us = clock(sums[7])
  unposted, held = sum_outbox(outbox), 0
  for _, text in ipairs(redis.call('HVALS', holds)) do
    held = held + parse_hold(text)
  end
  birth = incarnation .. ':' .. int(us)
  redis.call('HSET', account, 'u', int(unposted), 'h', int(held), 'c', '0', 'r', incarnation, 'b', birth)
end
balance = take_state(account, balance, sums[2], birth)
refresh_ttl(account, unposted, held)
if ARGV[9] ~= '0' and redis.call('TTL', account) > tonumber(ARGV[9]) then
  redis.call('EXPIRE', account, ARGV[9])
end
write_mirror(mirror, tonumber(balance), unposted, tonumber(ARGV[8]))
return {status, birth}
