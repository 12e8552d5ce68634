-- The exchange of exchange.py for wrk: `wrk -s post.lua URL -- BODY_FILE 'name: value' ...`
-- Ends with the one line of JSON that load.py reads.
function init(args)
  local file = assert(io.open(args[1], "rb"))
  wrk.method, wrk.body = "POST", file:read("*a")
  file:close()
  for position = 2, #args do
    local name, value = string.match(args[position], "^([^:]+): (.*)$")
    wrk.headers[name] = value
  end
end

function done(summary, latency, requests)
  local errors = summary.errors
  local bad = errors.connect + errors.read + errors.write + errors.status + errors.timeout
  io.write(string.format('{"requests": %d, "bad": %d, "seconds": %.6f, "p50_ms": %.3f, "p99_ms": %.3f, "events": 0}\n',
    summary.requests, bad, summary.duration / 1e6, latency:percentile(50) / 1000, latency:percentile(99) / 1000))
end
