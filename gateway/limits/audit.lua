-- What an org's keys say now, and where they contradict each other. Writes nothing.
--
-- KEYS  1 account  2 holds  3 deadlines  4 outbox  5 mirror
-- ARGV  1 what names of tombstones begin with  2 outbox entries that are looked at, at most  3 incarnation of the server
-- Reply {now in ms, state, holds, their sum, end of the oldest lease in ms or '', outbox entries, their sum or '' when they
-- are too many, id of the oldest or '', mirror or '', trouble 1, its request, trouble 2, ...}
-- state: {p, v, s, c, ep, pe, b, u, h} of the account, empty where there is none; of a process that is gone: {b}
local account, holds, deadlines, outbox, mirror = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local TOLD_MAX = 20
local reply, told = {}, 0

local function tell(trouble, rid)
  told = told + 1
  if told <= TOLD_MAX then
    reply[#reply + 1], reply[#reply + 2] = trouble, rid
  end
end

local sums = redis.call('HMGET', account, 'p', 'v', 's', 'c', 'ep', 'pe', 'b', 'u', 'h', 'l', 'r')
local now = clock(sums[10])
local state = {}
if sums[1] and sums[11] ~= ARGV[3] then
  state = {sums[7]}
elseif sums[1] then
  for i = 1, 9 do
    state[i] = sums[i] or '0'
  end
end

local held = redis.call('HGETALL', holds)
local sum = 0
for i = 1, #held, 2 do
  local rid = held[i]
  local amount, used = parse_hold(held[i + 1])
  sum = sum + (amount or 0)
  if not amount or used > amount then
    tell('hold_unreadable', rid)
  end
  if not redis.call('ZSCORE', deadlines, rid) then
    tell('hold_without_lease', rid)
  end
  local verdict = redis.call('GET', ARGV[1] .. rid)
  if not verdict then
    tell('hold_without_tombstone', rid)
  elseif string.sub(verdict, 1, 9) ~= 'admitted:' then
    tell('hold_that_has_ended', rid)
  end
end
for _, rid in ipairs(redis.call('ZRANGE', deadlines, '0', '-1')) do
  if redis.call('HEXISTS', holds, rid) == 0 then
    tell('lease_without_hold', rid)
  end
end
local oldest_lease = redis.call('ZRANGE', deadlines, '0', '0', 'WITHSCORES')

local entries = redis.call('XLEN', outbox)
local oldest_entry = redis.call('XRANGE', outbox, '-', '+', 'COUNT', '1')
local unposted = ''
if entries <= tonumber(ARGV[2]) then
  unposted = int(sum_outbox(outbox))
end
local head = {
  int(now), state, int(#held / 2), int(sum), oldest_lease[2] or '', int(entries), unposted,
  oldest_entry[1] and oldest_entry[1][1] or '', redis.call('GET', mirror) or '',
}
for i = 1, #reply do
  head[#head + 1] = reply[i]
end
return head
