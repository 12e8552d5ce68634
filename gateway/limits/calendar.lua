-- calendar: an amount per period. Two numbers: when the period began in ms, and the amount. The gateway knows calendars,
-- this server knows the time: the row tells where the previous, this and the next period begin and the next one ends,
-- so gateways whose clocks differ agree on the period.
-- row: previous start, start, end, next end, in ms
local function period_at(a, now)
  local start, ending = tonumber(ARGV[a + 4]), tonumber(ARGV[a + 5])
  if now < start then
    return tonumber(ARGV[a + 3]), start
  elseif now < ending then
    return start, ending
  end
  return ending, tonumber(ARGV[a + 6])
end

-- The period that is counted in, its end, and the amount so far.
local function read_period(key, a, now)
  local start, ending = period_at(a, now)
  local text, _ = redis.call('GET', key)
  if not text then
    return start, ending, 0
  end
  local stored, amount = unpack_d('>dd', text)
  if stored < start or is_ahead(stored, now) then
    return start, ending, 0
  end
  if stored > start then
    -- A later one: the clock was set back a little. It goes on being counted in.
    _, ending = period_at(a, stored)
  end
  return stored, ending, amount
end

local function write_period(key, start, ending, amount, now)
  redis.call('SET', key, pack('>dd', start, amount), 'PX', int(math.max(0, ending - now) + 1000))
end

KINDS.calendar = {
  keys = 1,
  width = 7,
  check = function(k, a, now)
    local start, ending, used = read_period(KEYS[k], a, now)
    if used + tonumber(ARGV[a + 1]) > tonumber(ARGV[a + 2]) then
      return used, math.max(1, ending - now)
    end
    return used, 0, start, ending, used
  end,
  take = function(k, a, now, rid, start, ending, used)
    write_period(KEYS[k], start, ending, used + tonumber(ARGV[a + 1]), now)
  end,
  settle = function(k, a, now, rid, taken_at, actual)
    local change = actual - tonumber(ARGV[a + 1])
    local start, ending, used = read_period(KEYS[k], a, now)
    -- What is given back must have been taken in the period that is still counted.
    if change > 0 or (change < 0 and start <= taken_at) then
      write_period(KEYS[k], start, ending, math.max(0, used + change), now)
    end
  end,
}
