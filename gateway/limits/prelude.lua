-- Shared by every script. All keys of one call carry one hash tag, so they live in one cluster slot: the org's, or that
-- of the limits that no org owns.
--
-- Account hash, as PostgreSQL had it at version v:
--     p   posted balance in micro-credits
--     s   what of it is set aside: held in PostgreSQL itself, or possibly owed by a state of Redis that was lost
--     c   cap: the most that may be held and unposted here at once
--     ep  epoch: how often the state of Redis was lost
--     pe  end of the grant period, ms; 0: none
-- and what only this server knows:
--     u   settled but not yet posted: what the outbox holds
--     h   held by requests in flight: the sum of the holds hash
--     l   last time seen, ms: this server's clock never goes back for this org
--     r   incarnation of the server process that the hash was built on
--     b   birth: tells this hash from every other one that the org had, or will have after a loss
-- owned = p - u; available = p - s - u - h. A state is the row {p, v, s, c, ep, pe, b} of PostgreSQL, where b is the birth
-- of the one hash that the cap was given to: any other hash has no cap, and must ask PostgreSQL for one.
-- An outbox entry knows the v that it was written beside: what PostgreSQL answers to its posting is newer.
--
-- Tombstone of a request, text:  admitted:<ms>            it runs; when it was admitted
--                                settled:<charge>         it ended, for so many micro-credits
--                                orphaned:<charge>:<ms>   its lease ran out; what the sweeper charged, when it was admitted

local UCREDITS_PER_CREDIT = 1000000
local CLEAN_ACCOUNT_TTL_S = 86400
local TOMBSTONE_TTL_S = 900
-- Of a swept request, whose gateway may wake up much later: without it a late release would not undo the sweeper's charge.
local ORPHAN_TOMBSTONE_TTL_S = 86400
local CLOCK_STEP_MAX_MS = 60000

-- Lua's own tostring() prints 1e15 as "1e+15"; integers leave here with all their digits, and zero without a sign.
local function int(number)
  return number == 0 and '0' or string.format('%.0f', number)
end

-- Time in ms and in us. A clock that stepped back a little is held until it catches up; one that stepped back a lot is
-- believed. `last` is the account's field `l`, or nil.
local function clock(last)
  local t = redis.call('TIME')
  local us = tonumber(t[1]) * 1000000 + tonumber(t[2])
  local now = math.floor(us / 1000)
  last = tonumber(last or '0')
  if last > now and last - now < CLOCK_STEP_MAX_MS then
    return last, last * 1000
  end
  return now, us
end

-- Whole credits for the application to read, in the key it has always read. "0" is written as "0". Written when that
-- changes what is read there, or when it is half as old as it may get.
local function write_mirror(mirror, posted, unposted, ttl_s)
  local shown = int(math.floor(math.max(0, posted - unposted) / UCREDITS_PER_CREDIT))
  if redis.call('GET', mirror) ~= shown or redis.call('TTL', mirror) < ttl_s / 2 then
    redis.call('SET', mirror, shown, 'EX', ttl_s)
  end
end

-- An account that owes nothing may be forgotten after a day without use; one with holds or an outbox never.
local function refresh_ttl(account, unposted, held)
  if unposted == 0 and held == 0 then
    redis.call('EXPIRE', account, CLEAN_ACCOUNT_TTL_S)
  else
    redis.call('PERSIST', account)
  end
end

-- A hold is kept as `amount:used`.
local function parse_hold(text)
  local amount, used = string.match(text, '^(%d+):(%d+)$')
  return tonumber(amount), tonumber(used)
end

-- The hold is gone; returns its amount and checkpoint, and what the org still holds. `held`: field `h`, or nil.
local function drop_hold(account, holds, deadlines, rid, held)
  local text = redis.call('HGET', holds, rid)
  if not text then
    return nil, nil, tonumber(held or '0')
  end
  local amount, used = parse_hold(text)
  redis.call('ZREM', deadlines, rid)
  redis.call('HDEL', holds, rid)
  -- Below zero: the account was lost and not installed since, there was no sum to take it from.
  return amount, used, math.max(0, tonumber(held or '0') - amount)
end

-- What waits in the outbox, from its entries.
local function sum_outbox(outbox)
  local sum = 0
  for _, entry in ipairs(redis.call('XRANGE', outbox, '-', '+')) do
    for f = 1, #entry[2], 2 do
      if entry[2][f] == 'd' then
        sum = sum + tonumber(entry[2][f + 1])
      end
    end
  end
  return sum
end

-- A state of PostgreSQL, ARGV[1] to [7], is written over an older one of the same hash. Returns the balance that counts.
local function take_state(account, balance, version, birth)
  if tonumber(ARGV[2]) <= tonumber(version or '-1') then
    return balance
  end
  local cap = ARGV[7] == birth and ARGV[4] or '0'
  redis.call('HSET', account, 'p', ARGV[1], 'v', ARGV[2], 's', ARGV[3], 'c', cap, 'ep', ARGV[5], 'pe', ARGV[6])
  return ARGV[1]
end
