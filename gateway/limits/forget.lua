-- Drop an org from the list of active ones, unless it was marked again since the caller looked.
--
-- KEYS  1 list of active orgs     ARGV  1 org id  2 score the caller saw
if redis.call('ZSCORE', KEYS[1], ARGV[1]) == ARGV[2] then
  return redis.call('ZREM', KEYS[1], ARGV[1])
end
return 0
