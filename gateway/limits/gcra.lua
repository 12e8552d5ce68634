-- gcra: a bucket that leaks `rate` per window and holds `limit` (the burst) at most. Two numbers: its level times the
-- window, so that both stay integers, and when that was so in ms.
-- row: window ms, rate
local function read_level(key, rate, now)
  local text = redis.call('GET', key)
  if not text then
    return 0
  end
  local level, at = unpack_d('>dd', text)
  if is_ahead(at, now) then
    return 0
  end
  return math.max(0, level - math.max(0, now - at) * rate)
end

local function write_level(key, level, rate, now)
  redis.call('SET', key, pack('>dd', level, now), 'PX', int(ceil_div(level, rate) + 1000))
end

KINDS.gcra = {
  keys = 1,
  width = 5,
  check = function(k, a, now)
    local window, rate = tonumber(ARGV[a + 3]), tonumber(ARGV[a + 4])
    local level = read_level(KEYS[k], rate, now)
    local excess = level + (tonumber(ARGV[a + 1]) - tonumber(ARGV[a + 2])) * window
    return ceil_div(level, window), excess > 0 and ceil_div(excess, rate) or 0, level
  end,
  take = function(k, a, now, rid, level)
    write_level(KEYS[k], level + tonumber(ARGV[a + 1]) * tonumber(ARGV[a + 3]), tonumber(ARGV[a + 4]), now)
  end,
  settle = function(k, a, now, rid, taken_at, actual)
    local window, rate = tonumber(ARGV[a + 3]), tonumber(ARGV[a + 4])
    local change = (actual - tonumber(ARGV[a + 1])) * window
    if change < 0 then
      -- What has leaked since may have been this request's own: only the rest is certain to stand in the bucket still.
      change = math.min(0, change + math.max(0, now - taken_at) * rate)
    end
    if change ~= 0 then
      write_level(KEYS[k], math.max(0, read_level(KEYS[k], rate, now) + change), rate, now)
    end
  end,
}
