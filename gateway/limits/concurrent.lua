-- concurrent: leases. Zset, member request id, score ms at which the lease ends; `window` is the lease's length.
-- When a slot will be free nobody knows; a second is the shortest wait a client can be told.
local SLOT_RETRY_MS = 1000

KINDS.concurrent = {
  check = function(key, limit, window, cost, now)
    local used = redis.call('ZCOUNT', key, '(' .. int(now), '+inf')
    return used, used + cost > limit and SLOT_RETRY_MS or 0
  end,
  take = function(key, limit, window, cost, now, rid)
    redis.call('ZREMRANGEBYSCORE', key, '-inf', int(now))
    redis.call('ZADD', key, int(now + window), rid)
    redis.call('PEXPIRE', key, int(window + 1000))
  end,
  settle = function(key, limit, window, taken, actual, taken_at, now, rid)
    redis.call('ZREM', key, rid)
  end,
  renew = function(key, limit, window, now, rid)
    if redis.call('ZADD', key, 'XX', 'CH', int(now + window), rid) == 1 then
      redis.call('PEXPIRE', key, int(window + 1000))
    end
  end,
}
