-- PostgreSQL has these outbox entries: forget them here and take its state. Repeating it changes nothing.
--
-- KEYS  1 account  2 outbox  3 mirror
-- ARGV  1-7 state  8 mirror TTL in s  9.. outbox entry ids, incarnation of the server
-- Reply {status, micro-credits that wait no longer, version, epoch}
--   OK     done
--   OLDER  PostgreSQL is older than it was when one of them was written: it was restored
--   SAME   or as old: it was restored, or had the charge already
-- Of the last two nothing is done: PostgreSQL must go on after this version and epoch first.
local account, outbox, mirror = KEYS[1], KEYS[2], KEYS[3]
local incarnation = table.remove(ARGV)
local sums = redis.call('HMGET', account, 'p', 'u', 'h', 'v', 'r', 'b', 'ep')
local posted, found, known = 0, {}, -1
for i = 9, #ARGV do
  local entry = redis.call('XRANGE', outbox, ARGV[i], ARGV[i])[1]
  if entry then
    found[#found + 1] = ARGV[i]
    local fields = entry[2]
    for f = 1, #fields, 2 do
      if fields[f] == 'd' then
        posted = posted + tonumber(fields[f + 1])
      elseif fields[f] == 'v' then
        known = math.max(known, tonumber(fields[f + 1]))
      end
    end
  end
end
-- An entry is posted after it was written, so PostgreSQL answers with a newer state than was known here by then. If not, what
-- the entry takes may never be seen in the balance here, and to subtract it would let it be spent again and again.
local version = tonumber(ARGV[2])
if known >= version and known <= tonumber(sums[4] or '-1') then
  return {known > version and 'OLDER' or 'SAME', '0', sums[4], sums[7] or '0'}
end
for i = 1, #found do
  redis.call('XDEL', outbox, found[i])
end
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
return {'OK', int(posted), '0', '0'}
