-- Shared by every script. All keys of one call carry one hash tag, so they live in one cluster slot: the org's, or that
-- of the limits that no org owns.
--
-- Account hash, fields:  p  posted balance in micro-credits, as PostgreSQL had it at version v
--                        v  ledger version of p
--                        u  settled but not yet posted: what the outbox holds
--                        h  held by requests in flight: the sum of the holds hash
--                        l  last time seen, ms: this server's clock never goes back for this org
-- available = p - u - h
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

-- Whole credits for the application to read, in the key it has always read. "0" is written as "0".
local function write_mirror(mirror, posted, unposted, ttl_s)
  local ucredits = math.max(0, posted - unposted)
  redis.call('SET', mirror, int(math.floor(ucredits / UCREDITS_PER_CREDIT)), 'EX', ttl_s)
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
