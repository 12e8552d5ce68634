-- Shared by every script. All keys of one call carry the org's hash tag, so they live in one cluster slot.
--
-- Account hash, fields:  p  posted balance in micro-credits, as PostgreSQL had it at version v
--                        v  ledger version of p
--                        u  settled but not yet posted: what the outbox holds
--                        h  held by requests in flight: the sum of the holds hash
--                        l  last time seen, ms: this server's clock never goes back for this org
-- available = p - u - h

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

-- Time in ms. A clock that stepped back a little is held until it catches up; one that stepped back a lot is believed.
local function clock(account)
  local t = redis.call('TIME')
  local now = tonumber(t[1]) * 1000 + math.floor(tonumber(t[2]) / 1000)
  local last = tonumber(redis.call('HGET', account, 'l') or '0')
  if last > now and last - now < CLOCK_STEP_MAX_MS then
    return last
  end
  return now
end

-- Whole credits for the application to read, in the key it has always read. "0" is written as "0".
local function write_mirror(account, mirror, ttl_s)
  local sums = redis.call('HMGET', account, 'p', 'u')
  if sums[1] then
    local ucredits = math.max(0, tonumber(sums[1]) - tonumber(sums[2] or '0'))
    redis.call('SET', mirror, int(math.floor(ucredits / UCREDITS_PER_CREDIT)), 'EX', ttl_s)
  end
end

-- An account that owes nothing may be forgotten after a day without use; one with holds or an outbox never.
local function refresh_ttl(account)
  local sums = redis.call('HMGET', account, 'u', 'h')
  if tonumber(sums[1] or '0') == 0 and tonumber(sums[2] or '0') == 0 then
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

local function drop_hold(account, holds, deadlines, rid)
  local text = redis.call('HGET', holds, rid)
  if not text then
    return nil
  end
  local amount, used = parse_hold(text)
  redis.call('ZREM', deadlines, rid)
  redis.call('HDEL', holds, rid)
  if redis.call('HINCRBY', account, 'h', int(-amount)) < 0 then
    redis.call('HDEL', account, 'h')  -- the account was lost and not installed since: there was no sum to take it from
  end
  return amount, used
end

-- Limit kinds: name -> {check, take, settle, renew}.
--   check(key, limit, window, cost, now)                     -> used, retry_ms (0: it fits). Reads only.
--   take(key, limit, window, cost, now, rid)
--   settle(key, limit, window, taken, actual, taken_at, now, rid)  what was really used; 0 gives all back
--   renew(key, limit, window, now, rid)                      the request still runs
local KINDS = {}
