-- PostgreSQL has these outbox entries: forget them here and take its state. Repeating it changes nothing.
--
-- KEYS  1 account  2 outbox  3 mirror
-- ARGV  1-7 state  8 mirror TTL in s  9.. outbox entry ids, incarnation of the server
-- Reply the micro-credits that waited no longer
local account, outbox, mirror = KEYS[1], KEYS[2], KEYS[3]
local incarnation = table.remove(ARGV)
local posted = 0
for i = 9, #ARGV do
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
local sums = redis.call('HMGET', account, 'p', 'u', 'h', 'v', 'r', 'b')
if sums[1] then
  local balance, unposted = sums[1], tonumber(sums[2] or '0') - posted
  redis.call('HSET', account, 'u', int(unposted))
  -- A hash of a process that is gone is built anew before it is used.
  if sums[5] == incarnation then
    balance = take_state(account, balance, sums[4], sums[6])
  end
  refresh_ttl(account, unposted, tonumber(sums[3] or '0'))
  write_mirror(mirror, tonumber(balance), unposted, tonumber(ARGV[8]))
end
if redis.call('XLEN', outbox) == 0 then
  redis.call('DEL', outbox)
end
return int(posted)
