-- wrk [options] -s wrk_steps.lua URL -- BODY PATH…
--
-- Posts BODY as JSON to one PATH after another. The requests are made once, so that the client costs little; no
-- response() is defined, since wrk would then copy every reply into Lua. Ends with one line of figures.
local requests, at = {}, 0

function init(args)
  wrk.method = "POST"
  wrk.body = args[1]
  wrk.headers["Content-Type"] = "application/json"
  for i = 2, #args do requests[i - 1] = wrk.format(nil, args[i]) end
end

function request()
  at = at % #requests + 1
  return requests[at]
end

function done(summary, latency)
  local errors = summary.errors
  io.write(string.format(
    "figures requests=%d seconds=%.6f p50=%.4f p99=%.4f refused=%d broken=%d\n",
    summary.requests, summary.duration / 1e6, latency:percentile(50) / 1e3, latency:percentile(99) / 1e3,
    errors.status, errors.connect + errors.read + errors.write + errors.timeout))
end
