-- Every script's last words: one line for bench/run, which runs wrk from the root of the project.
-- Requests/s, errors, percentiles in milliseconds.
function done(summary, latency)
   local errors = summary.errors
   io.write(string.format("RESULT %.0f %d %.2f %.2f %.2f %.2f\n",
      summary.requests / summary.duration * 1e6,
      errors.connect + errors.read + errors.write + errors.status + errors.timeout,
      latency:percentile(50) / 1000, latency:percentile(95) / 1000,
      latency:percentile(99) / 1000, latency.max / 1000))
end
