-- PostgreSQL has these outbox entries: forget them here and take its balance. Repeating it changes nothing.
--
-- KEYS  1 account  2 outbox  3 mirror
-- ARGV  1 balance in micro-credits  2 its ledger version  3 mirror TTL in s  4.. outbox entry ids
local account, outbox, mirror = KEYS[1], KEYS[2], KEYS[3]
local posted = 0
for i = 4, #ARGV do
  local found = redis.call('XRANGE', outbox, ARGV[i], ARGV[i])
  if found[1] then
    local fields = found[1][2]
    for f = 1, #fields, 2 do
      if fields[f] == 'd' then
        posted = posted + tonumber(fields[f + 1])
      end
    end
    redis.call('XDEL', outbox, ARGV[i])
  end
end
local sums = redis.call('HMGET', account, 'p', 'u', 'h', 'v')
if sums[1] then
  local balance, unposted = sums[1], tonumber(sums[2] or '0') - posted
  if tonumber(ARGV[2]) > tonumber(sums[4] or '-1') then
    balance = ARGV[1]
    redis.call('HSET', account, 'p', balance, 'v', ARGV[2])
  end
  redis.call('HSET', account, 'u', int(unposted))
  refresh_ttl(account, unposted, tonumber(sums[3] or '0'))
  write_mirror(mirror, tonumber(balance), unposted, ARGV[3])
end
if redis.call('XLEN', outbox) == 0 then
  redis.call('DEL', outbox)
end
return int(posted)
