-- What an admission would find now. Writes nothing.
--
-- KEYS  1 account  2.. the demands' counters
-- ARGV  1.. the demands' rows
-- Reply {now us, used 1, retry ms 1, used 2, retry ms 2, ...}
local now, us = clock(redis.call('HGET', KEYS[1], 'l'))
local reply = {int(us)}
local k, a = 2, 1
while a <= #ARGV do
  local kind = KINDS[ARGV[a]]
  local used, retry = kind.check(k, a, now)
  reply[#reply + 1], reply[#reply + 2] = int(used), int(retry)
  k, a = k + kind.keys, a + kind.width
end
return reply
