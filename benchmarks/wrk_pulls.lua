-- wrk [options] -s wrk_pulls.lua URL -- PATH
--
-- Gets one PATH as safetensors, over and over. No response() is defined, since wrk would then copy every reply into
-- Lua. Ends with one line of figures.
function init(args)
  wrk.path = args[1]
  wrk.headers["Accept"] = "application/vnd.safetensors"
end

function done(summary, latency)
  local errors = summary.errors
  io.write(string.format(
    "figures requests=%d seconds=%.6f bytes=%d p50=%.4f p99=%.4f refused=%d broken=%d\n",
    summary.requests, summary.duration / 1e6, summary.bytes, latency:percentile(50) / 1e3,
    latency:percentile(99) / 1e3, errors.status, errors.connect + errors.read + errors.write + errors.timeout))
end
