-- What a fleet posts: 5,000 devices, recent timestamps, one report in ten with errors. With EVENT_IDS set,
-- each report has an event_id of its own.
local heads, tails = {}, {}
local event_ids = (os.getenv("EVENT_IDS") or "") ~= ""
local MARK = "00000000000000"

local headers = { ["Content-Type"] = "application/json" }
local key = os.getenv("BENCH_KEY") or ""
if key ~= "" then headers["Authorization"] = "Bearer " .. key end

function init(args)
   math.randomseed(os.time())
   local now = os.time()
   for i = 1, 20000 do
      local errors = 0
      if math.random(10) == 1 then errors = math.random(5) end
      local event_id = event_ids and string.format('"event_id":"%s",', MARK) or ""
      local request = wrk.format("POST", "/api/sync-event", headers, string.format(
         '{"device_id":"pi-%05d",%s"timestamp":"%s","total_files_synced":%d,"total_errors":%d,"internet_speed":%.2f}',
         math.random(5000), event_id, os.date("!%Y-%m-%dT%H:%M:%S.000Z", now - math.random(3600)),
         math.random(500), errors, math.random() * 100))
      local first = event_ids and request:find(MARK, 1, true)
      heads[i] = first and request:sub(1, first - 1) or request
      tails[i] = first and request:sub(first + #MARK) or ""
   end
end

local number = 0
local run = os.time() % 1000000
function request()
   number = number + 1
   local body = number % #heads + 1
   if not event_ids then return heads[body] end
   return heads[body] .. string.format("%06d%08d", run, number) .. tails[body]
end

dofile("bench/report.lua")
