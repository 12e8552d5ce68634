-- Put an org's posted balance here, unless a newer one is here already. Never additive: what is held and what waits
-- in the outbox is counted from the keys themselves when the account is new.
--
-- KEYS  1 account  2 holds  3 outbox  4 mirror
-- ARGV  1 balance in micro-credits  2 ledger version  3 mirror TTL in s  4 TTL of the account in s (0: the usual)
local account, holds, outbox, mirror = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local sums = redis.call('HMGET', account, 'p', 'u', 'h', 'v')
local balance, unposted, held = sums[1], tonumber(sums[2] or '0'), tonumber(sums[3] or '0')
if not balance then
  balance, unposted, held = ARGV[1], 0, 0
  for _, entry in ipairs(redis.call('XRANGE', outbox, '-', '+')) do
    for f = 1, #entry[2], 2 do
      if entry[2][f] == 'd' then
        unposted = unposted + tonumber(entry[2][f + 1])
      end
    end
  end
  for _, text in ipairs(redis.call('HVALS', holds)) do
    held = held + parse_hold(text)
  end
  redis.call('HSET', account, 'p', balance, 'v', ARGV[2], 'u', int(unposted), 'h', int(held))
elseif tonumber(ARGV[2]) > tonumber(sums[4] or '-1') then
  balance = ARGV[1]
  redis.call('HSET', account, 'p', balance, 'v', ARGV[2])
end
refresh_ttl(account, unposted, held)
if ARGV[4] ~= '0' and redis.call('TTL', account) > tonumber(ARGV[4]) then
  redis.call('EXPIRE', account, ARGV[4])
end
write_mirror(mirror, tonumber(balance), unposted, ARGV[3])
return 'OK'
