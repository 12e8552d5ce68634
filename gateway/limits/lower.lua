-- The cap is as low as it can be: what is owed now, or what is to be left to it. It is never raised: more than its cap is
-- owed by a hash that running requests were written to after a loss, and PostgreSQL has not given it that yet. PostgreSQL
-- is told next, and lowers its own only if nothing changed.
--
-- KEYS  1 account
-- ARGV  what is left to it at least, in micro-credits (may be missing: 0), incarnation of the server
-- Reply {version, epoch, cap in micro-credits, birth}; a version of -1: there is no such account
local account = KEYS[1]
local incarnation = table.remove(ARGV)
local sums = redis.call('HMGET', account, 'p', 'v', 'ep', 'u', 'h', 'r', 'b', 'c')
if not sums[1] or sums[6] ~= incarnation then
  return {'-1', '0', '0', ''}
end
local owed = tonumber(sums[4] or '0') + tonumber(sums[5] or '0')
local cap = int(math.min(math.max(owed, tonumber(ARGV[1] or '0')), tonumber(sums[8] or '0')))
redis.call('HSET', account, 'c', cap)
return {sums[2], sums[3], cap, sums[7]}
