-- Batches of 1,000 events as NDJSON: what 5,000 devices have kept back for up to an hour.
local bodies = {}
local headers = { ["Content-Type"] = "application/x-ndjson" }
local key = os.getenv("BENCH_KEY") or ""
if key ~= "" then headers["Authorization"] = "Bearer " .. key end

function init(args)
   math.randomseed(os.time())
   local now = os.time()
   for i = 1, 40 do
      local lines = {}
      for line = 1, 1000 do
         local errors = 0
         if math.random(10) == 1 then errors = math.random(5) end
         lines[line] = string.format(
            '{"device_id":"pi-%05d","timestamp":"%s","total_files_synced":%d,"total_errors":%d,"internet_speed":%.2f}\n',
            math.random(5000), os.date("!%Y-%m-%dT%H:%M:%S.000Z", now - math.random(3600)),
            math.random(500), errors, math.random() * 100)
      end
      bodies[i] = wrk.format("POST", "/api/sync-events", headers, table.concat(lines))
   end
end

local next_body = 0
function request()
   next_body = next_body % #bodies + 1
   return bodies[next_body]
end

dofile("bench/report.lua")
