-- Limit kinds: algorithm -> {keys, width, check, take, settle, renew}.
--
-- A demand is `keys` consecutive KEYS from k on, and a row of `width` ARGV from a on:
--   ARGV[a] algorithm  ARGV[a+1] cost  ARGV[a+2] limit  ARGV[a+3].. what the kind's params() gives
--
--   check(k, a, now)              -> used, retry_ms (0: it fits; less: and costs nothing), and what take() wants to
--                                    know. Reads only.
--   take(k, a, now, rid, ...)        what check() gave for it
--   settle(k, a, now, rid, taken_at, actual)   what was really used of the cost taken at taken_at; 0 gives all back
--   renew(k, a, now, rid)            the request still runs; nil where nothing has to be done
local KINDS = {}

-- The counters are strings of big-endian doubles: exact up to 2^53, and one GET and one SET whatever they hold.
local pack, unpack_d = struct.pack, struct.unpack

-- Whether something was counted before the clock was set back, and so far that `clock` did not wait: it is forgotten, or
-- whoever used up a limit then would be refused for as long as the step was.
local function is_ahead(at, now)
  return at - now >= CLOCK_STEP_MAX_MS
end

-- The least integer q with q * divisor >= number, also where the division itself is rounded.
local function ceil_div(number, divisor)
  local q = math.floor(number / divisor)
  while q * divisor < number do
    q = q + 1
  end
  while (q - 1) * divisor >= number do
    q = q - 1
  end
  return q
end
