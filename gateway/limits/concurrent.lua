-- concurrent: leases. Zset, member request id, score ms at which the lease ends.
-- row: lease ms
-- When a slot will be free nobody knows; a second is the shortest wait a client can be told.
local SLOT_RETRY_MS = 1000

KINDS.concurrent = {
  keys = 1,
  width = 4,
  check = function(k, a, now)
    local used = redis.call('ZCOUNT', KEYS[k], '(' .. int(now), '+inf')
    return used, used + tonumber(ARGV[a + 1]) > tonumber(ARGV[a + 2]) and SLOT_RETRY_MS or 0
  end,
  take = function(k, a, now, rid)
    local lease = tonumber(ARGV[a + 3])
    redis.call('ZREMRANGEBYSCORE', KEYS[k], '-inf', int(now))
    redis.call('ZADD', KEYS[k], int(now + lease), rid)
    redis.call('PEXPIRE', KEYS[k], int(lease + 1000))
  end,
  settle = function(k, a, now, rid)
    redis.call('ZREM', KEYS[k], rid)
  end,
  renew = function(k, a, now, rid)
    local lease = tonumber(ARGV[a + 3])
    if redis.call('ZADD', KEYS[k], 'XX', 'CH', int(now + lease), rid) == 1 then
      redis.call('PEXPIRE', KEYS[k], int(lease + 1000))
    end
  end,
}
