-- sliding_log: exact, one unit per request. The times of admission in ms, oldest first.
-- row: window ms
KINDS.sliding_log = {
  keys = 1,
  width = 4,
  check = function(k, a, now)
    local limit, window = tonumber(ARGV[a + 2]), tonumber(ARGV[a + 3])
    local log = redis.call('GET', KEYS[k]) or ''
    if #log > 0 and is_ahead(unpack_d('>d', log, #log - 7), now) then
      log = ''
    end
    local first = 1
    while first < #log and unpack_d('>d', log, first) <= now - window do
      first = first + 8
    end
    local used = (#log - first + 1) / 8
    if used < limit then
      return used, 0, log, first
    end
    -- It fits when so many of the oldest have left that there is room for one.
    return used, unpack_d('>d', log, first + (used - limit) * 8) + window - now
  end,
  take = function(k, a, now, rid, log, first)
    redis.call('SET', KEYS[k], string.sub(log, first) .. pack('>d', now), 'PX', int(tonumber(ARGV[a + 3]) + 1000))
  end,
  settle = function(k, a, now, rid, taken_at, actual)
    if actual > 0 then
      return
    end
    local log, entry = redis.call('GET', KEYS[k]) or '', pack('>d', taken_at)
    local at = string.find(log, entry, 1, true)
    while at and at % 8 ~= 1 do
      at = string.find(log, entry, at + 1, true)
    end
    if at and #log == 8 then
      redis.call('DEL', KEYS[k])
    elseif at then
      redis.call('SET', KEYS[k], string.sub(log, 1, at - 1) .. string.sub(log, at + 8), 'KEEPTTL')
    end
  end,
}

-- sliding_buckets: conservative. The sum of all amounts, the index of the first bucket, then the amount of each bucket
-- from that one on. Bucket j covers [j*grain, (j+1)*grain); it counts whole until its last millisecond has left the
-- window, so the promise holds and a denial lasts less than one grain longer than needed.
-- row: window ms
local BUCKETS = 60
local ZERO = pack('>d', 0)

local function grain_of(window)
  return math.ceil(window / BUCKETS)
end

-- What still counts: the text, where its first live bucket stands in it, the sum and that bucket's index.
local function read_buckets(key, window, now)
  local text, grain = redis.call('GET', key), grain_of(window)
  if not text then
    return '', 17, 0, 0
  end
  local sum, first = unpack_d('>dd', text)
  if is_ahead((first + (#text - 24) / 8) * grain, now) then
    return '', 17, 0, 0
  end
  local live, at = math.floor((now - window + 1) / grain), 17
  while first < live and at < #text do
    sum = sum - unpack_d('>d', text, at)
    first, at = first + 1, at + 8
  end
  return text, at, sum, first
end

local function add_to_buckets(key, window, now, amount, text, at, sum, first)
  local grain = grain_of(window)
  local index, count = math.floor(now / grain), (#text - at + 1) / 8
  local body
  if count <= 0 then
    first, body = index, pack('>d', amount)
  elseif index < first + count then
    -- The newest bucket is this one, or a later one before the clock was set back.
    body = string.sub(text, at, -9) .. pack('>d', unpack_d('>d', text, #text - 7) + amount)
  else
    body = string.sub(text, at) .. string.rep(ZERO, index - first - count) .. pack('>d', amount)
  end
  redis.call('SET', key, pack('>dd', sum + amount, first) .. body, 'PX', int(window + grain + 1000))
end

KINDS.sliding_buckets = {
  keys = 1,
  width = 4,
  check = function(k, a, now)
    local cost, limit, window = tonumber(ARGV[a + 1]), tonumber(ARGV[a + 2]), tonumber(ARGV[a + 3])
    local text, at, sum, first = read_buckets(KEYS[k], window, now)
    local excess = sum + cost - limit
    if excess <= 0 then
      return sum, 0, text, at, sum, first
    end
    for position = at, #text - 7, 8 do
      excess, first = excess - unpack_d('>d', text, position), first + 1
      if excess <= 0 then
        return sum, first * grain_of(window) - 1 + window - now
      end
    end
    return sum, window
  end,
  take = function(k, a, now, rid, text, at, sum, first)
    add_to_buckets(KEYS[k], tonumber(ARGV[a + 3]), now, tonumber(ARGV[a + 1]), text, at, sum, first)
  end,
  settle = function(k, a, now, rid, taken_at, actual)
    local key, taken, window = KEYS[k], tonumber(ARGV[a + 1]), tonumber(ARGV[a + 3])
    if actual > taken then
      add_to_buckets(key, window, now, actual - taken, read_buckets(key, window, now))
    elseif actual < taken then
      -- The reserve goes back to the bucket it came from, if that still counts.
      local text = redis.call('GET', key) or ''
      if #text < 24 then
        return
      end
      local sum, first = unpack_d('>dd', text)
      local at = 17 + (math.floor(taken_at / grain_of(window)) - first) * 8
      if at < 17 or at > #text - 7 then
        return
      end
      local amount = unpack_d('>d', text, at)
      local back = math.min(taken - actual, amount)
      redis.call('SET', key, pack('>dd', sum - back, first) .. string.sub(text, 17, at - 1)
        .. pack('>d', amount - back) .. string.sub(text, at + 8), 'KEEPTTL')
    end
  end,
}

-- sliding_sessions: exact, one unit for each session that is new. Zset, member digest of the session, score ms of its
-- first admission. A session that has a record (the second key) or is in the window already costs nothing.
-- Instead of the retry ms: -2 it has a record, -1 it is in the window.
-- row: window ms, digest
KINDS.sliding_sessions = {
  keys = 2,
  width = 5,
  check = function(k, a, now)
    local limit, window = tonumber(ARGV[a + 2]), tonumber(ARGV[a + 3])
    local oldest, newest = '(' .. int(now - window), '(' .. int(now + CLOCK_STEP_MAX_MS)
    local used = redis.call('ZCOUNT', KEYS[k], oldest, newest)
    local seen = tonumber(redis.call('ZSCORE', KEYS[k], ARGV[a + 4]) or '-inf')
    if redis.call('EXISTS', KEYS[k + 1]) == 1 then
      return used, -2, false
    elseif seen > now - window and not is_ahead(seen, now) then
      return used, -1, false
    elseif used < limit then
      return used, 0, true
    end
    local blocking = redis.call('ZRANGEBYSCORE', KEYS[k], oldest, newest, 'WITHSCORES', 'LIMIT', int(used - limit), 1)
    return used, tonumber(blocking[2]) + window - now
  end,
  take = function(k, a, now, rid, new)
    if new then
      redis.call('ZREMRANGEBYSCORE', KEYS[k], '-inf', int(now - tonumber(ARGV[a + 3])))
      redis.call('ZREMRANGEBYSCORE', KEYS[k], int(now + CLOCK_STEP_MAX_MS), '+inf')
      redis.call('ZADD', KEYS[k], int(now), ARGV[a + 4])
      redis.call('PEXPIRE', KEYS[k], int(tonumber(ARGV[a + 3]) + 1000))
    end
  end,
  -- Another request of the session may run on its place by now, so it stays taken.
  settle = function() end,
}
