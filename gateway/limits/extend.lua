-- A running request needs more than it holds.
--
-- KEYS  1 account  2 holds  3 deadlines  4 tombstone
-- ARGV  1 request id  2 more, in micro-credits  3 used so far  4 capped: 0 no, 1 yes, 2 yes and nothing can change it
--       5 incarnation of the server
-- Reply {status, granted, epoch, need, birth}: OK | GONE (it has ended here) | MISS | LOST | CAP (raise it to `need`, and
-- ask again) | REFUSED (nothing is left; `need` waits to be posted, and may be missing from the balance already)
local account, holds = KEYS[1], KEYS[2]
local rid, more, capped = ARGV[1], tonumber(ARGV[2]), ARGV[4]
local sums = redis.call('HMGET', account, 'p', 's', 'u', 'h', 'c', 'ep', 'r', 'b')
if not sums[1] then
  return {'MISS', '0', '0', '0', ''}
end
local reply = {'OK', '0', sums[6], '0', sums[8]}
local text = redis.call('HGET', holds, rid)
if sums[7] ~= ARGV[5] then
  reply[1] = 'LOST'
  return reply
elseif not text then
  reply[1] = 'GONE'
  return reply
end
local unposted, held = tonumber(sums[3] or '0'), tonumber(sums[4] or '0')
local granted = math.min(more, tonumber(sums[1]) - tonumber(sums[2] or '0') - unposted - held)
local room = tonumber(sums[5] or '0') - unposted - held
if granted > 0 and capped ~= '0' and granted > room then
  if capped == '1' then
    reply[1], reply[4] = 'CAP', int(unposted + held + granted)
    return reply
  end
  granted = room
end
if granted <= 0 then
  reply[1], reply[4] = 'REFUSED', int(unposted)
  return reply
end
local amount, used = parse_hold(text)
amount = amount + granted
redis.call('HSET', holds, rid, int(amount) .. ':' .. int(math.max(used, math.min(amount, tonumber(ARGV[3])))))
redis.call('HSET', account, 'h', int(held + granted))
reply[2] = int(granted)
return reply
