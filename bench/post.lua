-- What a fleet posts: 5,000 devices, recent timestamps, one report in ten with errors.
local bodies = {}

function init(args)
   math.randomseed(os.time())
   local now = os.time()
   for i = 1, 20000 do
      local errors = 0
      if math.random(10) == 1 then errors = math.random(5) end
      bodies[i] = wrk.format("POST", "/api/sync-event", {
         ["Content-Type"] = "application/json",
      }, string.format(
         '{"device_id":"pi-%05d","timestamp":"%s","total_files_synced":%d,"total_errors":%d,"internet_speed":%.2f}',
         math.random(5000), os.date("!%Y-%m-%dT%H:%M:%S.000Z", now - math.random(3600)),
         math.random(500), errors, math.random() * 100))
   end
end

local next_body = 0
function request()
   next_body = next_body % #bodies + 1
   return bodies[next_body]
end

-- One line for the script that drives wrk: requests, errors, percentiles in milliseconds.
function done(summary, latency)
   local errors = summary.errors
   io.write(string.format("RESULT %.0f %d %.2f %.2f %.2f %.2f\n",
      summary.requests / summary.duration * 1e6,
      errors.connect + errors.read + errors.write + errors.status + errors.timeout,
      latency:percentile(50) / 1000, latency:percentile(95) / 1000,
      latency:percentile(99) / 1000, latency.max / 1000))
end
