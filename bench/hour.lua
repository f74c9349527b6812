-- The top of the hour: 100,000 devices that are new report once each, or with BENCH_DEVICES the fleet of fleet.lua. Says
-- how many seconds it took and how many reports were refused; wrk then waits for its time to be over, or for SIGINT.
local seconds = dofile("bench/clock.lua")
local headers = { ["Content-Type"] = "application/json" }
local key = os.getenv("BENCH_KEY") or ""
if key ~= "" then headers["Authorization"] = "Bearer " .. key end

local devices, id, fields = 100000, nil, nil
if os.getenv("BENCH_DEVICES") then
   local fleet = dofile("bench/fleet.lua")
   local numbers = fleet.reporting_now()
   devices = #numbers
   id = function(place) return fleet.id(numbers[place]) end
   fields = function(place) return fleet.fields(numbers[place], fleet.THIS_HOUR) end
else
   id = function(place) return string.format("school-%06d", place) end
   fields = function(place)
      return string.format('"total_files_synced":%d,"total_errors":%d,"internet_speed":%.2f',
         place % 500, place % 10 == 0 and 1 or 0, place % 100)
   end
end

-- The present as text; each second is written once.
local second, text = 0, ""
local function present()
   local at = seconds()
   if math.floor(at) ~= second then
      second = math.floor(at)
      text = os.date("!%Y-%m-%dT%H:%M:%S", second)
   end
   return string.format("%s.%03dZ", text, at % 1 * 1000)
end

-- wrk asks for one request that it does not send.
local sent, stored, refused, began = -1, 0, 0, nil
function request()
   sent = sent + 1
   if sent == 1 then began = seconds() end
   -- The connections that have nothing left to report wait for the others.
   if sent > devices then return wrk.format("GET", "/health/live") end
   local place = math.max(sent, 1)
   return wrk.format("POST", "/api/sync-event", headers,
      string.format('{"device_id":"%s","timestamp":"%s",%s}', id(place), present(), fields(place)))
end

function response(status)
   -- Of the requests that wait for others.
   if status == 200 then return end
   if status == 201 then stored = stored + 1 else refused = refused + 1 end
   if stored + refused == devices then
      io.write(string.format("HOUR %.2f %d\n", seconds() - began, refused))
      io.flush()
      wrk.thread:stop()
   end
end

dofile("bench/report.lua")
