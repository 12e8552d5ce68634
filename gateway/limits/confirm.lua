-- Which charges still wait here. One that was settled into the hash of this birth and waits no longer is in PostgreSQL.
--
-- KEYS  1 account  2 outbox
-- ARGV  1 incarnation of the server
-- Reply {birth, id of the oldest entry}; empty where there is none
local sums = redis.call('HMGET', KEYS[1], 'r', 'b')
local birth = sums[1] == ARGV[1] and sums[2] or ''
local oldest = redis.call('XRANGE', KEYS[2], '-', '+', 'COUNT', '1')
return {birth, oldest[1] and oldest[1][1] or ''}
