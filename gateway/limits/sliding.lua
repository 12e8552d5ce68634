-- sliding_log: exact. Zset, member request id, score ms of admission. One unit per request.
KINDS.sliding_log = {
  check = function(key, limit, window, cost, now)
    local used = redis.call('ZCOUNT', key, '(' .. int(now - window), '+inf')
    local excess = used + cost - limit
    if excess <= 0 then
      return used, 0
    end
    -- It fits when the excess-th oldest admission leaves the window.
    local blocking = redis.call('ZRANGEBYSCORE', key, '(' .. int(now - window), '+inf',
      'WITHSCORES', 'LIMIT', int(excess - 1), 1)
    return used, tonumber(blocking[2]) + window - now
  end,
  take = function(key, limit, window, cost, now, rid)
    redis.call('ZREMRANGEBYSCORE', key, '-inf', int(now - window))
    redis.call('ZADD', key, int(now), rid)
    redis.call('PEXPIRE', key, int(window + math.ceil(window / 60) + 1000))
  end,
  settle = function(key, limit, window, taken, actual, taken_at, now, rid)
    if actual == 0 then
      redis.call('ZREM', key, rid)
    end
  end,
  renew = function() end,
}

-- sliding_buckets: conservative. Hash: bucket index -> amount, s = sum of all stored buckets, f = oldest stored index.
-- Bucket j covers [j*grain, (j+1)*grain); it counts whole until its last millisecond has left the window, so the
-- promise holds and a denial lasts at most one grain longer than needed.
local BUCKETS = 60

local function grain_of(window)
  return math.ceil(window / BUCKETS)
end

local function first_live(window, now)
  return math.floor((now - window + 1) / grain_of(window))
end

-- Indices and amount of the stored buckets that have left the window. At most BUCKETS + 2 can be stored: every take
-- drops what has left.
local function stale(key, oldest, live)
  local names = {}
  for index = oldest, math.min(live - 1, oldest + BUCKETS + 1) do
    names[#names + 1] = int(index)
  end
  local amount = 0
  if #names > 0 then
    for _, value in ipairs(redis.call('HMGET', key, unpack(names))) do
      amount = amount + tonumber(value or '0')
    end
  end
  return names, amount
end

local function add(key, window, amount, now)
  local live = first_live(window, now)
  local oldest = tonumber(redis.call('HGET', key, 'f') or live)
  if oldest < live then
    local names, gone = stale(key, oldest, live)
    redis.call('HDEL', key, unpack(names))
    redis.call('HINCRBY', key, 's', int(-gone))
    oldest = live
  end
  redis.call('HSET', key, 'f', int(oldest))
  redis.call('HINCRBY', key, int(math.floor(now / grain_of(window))), int(amount))
  redis.call('HINCRBY', key, 's', int(amount))
  redis.call('PEXPIRE', key, int(window + grain_of(window) + 1000))
end

KINDS.sliding_buckets = {
  check = function(key, limit, window, cost, now)
    local stored = redis.call('HMGET', key, 's', 'f')
    if not stored[1] then
      return 0, 0
    end
    local live = first_live(window, now)
    local oldest = tonumber(stored[2])
    local used = tonumber(stored[1])
    if oldest < live then
      local _, gone = stale(key, oldest, live)
      used = used - gone
      oldest = live
    end
    local excess = used + cost - limit
    if excess <= 0 then
      return used, 0
    end
    local grain = grain_of(window)
    local names = {}
    for index = oldest, math.floor(now / grain) do
      names[#names + 1] = int(index)
    end
    for position, value in ipairs(redis.call('HMGET', key, unpack(names))) do
      excess = excess - tonumber(value or '0')
      if excess <= 0 then
        return used, (oldest + position) * grain - 1 + window - now
      end
    end
    return used, window
  end,
  take = function(key, limit, window, cost, now, rid)
    add(key, window, cost, now)
  end,
  settle = function(key, limit, window, taken, actual, taken_at, now, rid)
    if actual > taken then
      add(key, window, actual - taken, now)
    elseif actual < taken then
      -- The reserve goes back to the bucket it came from, if that still counts.
      local bucket = int(math.floor(taken_at / grain_of(window)))
      local back = math.min(taken - actual, tonumber(redis.call('HGET', key, bucket) or '0'))
      if back > 0 then
        redis.call('HINCRBY', key, bucket, int(-back))
        redis.call('HINCRBY', key, 's', int(-back))
      end
    end
  end,
  renew = function() end,
}
