-- Reads one path again and again; "{device}" in it becomes one of 5,000 devices.
local path = os.getenv("BENCH_PATH")

function init(args)
   math.randomseed(os.time())
end

function request()
   return wrk.format("GET", (path:gsub("{device}", string.format("pi-%05d", math.random(0, 4999)))))
end

function done(summary, latency)
   local errors = summary.errors
   io.write(string.format("RESULT %.0f %d %.2f %.2f %.2f %.2f\n",
      summary.requests / summary.duration * 1e6,
      errors.connect + errors.read + errors.write + errors.status + errors.timeout,
      latency:percentile(50) / 1000, latency:percentile(95) / 1000,
      latency:percentile(99) / 1000, latency.max / 1000))
end
