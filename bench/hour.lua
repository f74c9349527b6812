-- The top of the hour: 100,000 devices report once each. Says how many seconds it took; wrk then waits for its time
-- to be over, or for SIGINT.
local DEVICES = 100000
local headers = { ["Content-Type"] = "application/json" }
local key = os.getenv("BENCH_KEY") or ""
if key ~= "" then headers["Authorization"] = "Bearer " .. key end

local ffi = require("ffi")
ffi.cdef [[
   typedef struct { long sec; long usec; } pisync_time;
   int gettimeofday(pisync_time *, void *);
]]
local clock = ffi.new("pisync_time")
local function seconds()
   ffi.C.gettimeofday(clock, nil)
   return tonumber(clock.sec) + tonumber(clock.usec) / 1e6
end

local now = os.date("!%Y-%m-%dT%H:%M:%S.000Z")
-- wrk asks for one request that it does not send.
local sent, stored, began = -1, 0, nil
function request()
   sent = sent + 1
   if sent == 1 then began = seconds() end
   -- The connections that have nothing left to report wait for the others.
   if sent > DEVICES then return wrk.format("GET", "/health/live") end
   return wrk.format("POST", "/api/sync-event", headers, string.format(
      '{"device_id":"school-%06d","timestamp":"%s","total_files_synced":%d,"total_errors":%d,"internet_speed":%.2f}',
      sent, now, sent % 500, sent % 10 == 0 and 1 or 0, sent % 100))
end

function response(status)
   if status ~= 201 then return end
   stored = stored + 1
   if stored == DEVICES then
      io.write(string.format("HOUR %.1f\n", seconds() - began))
      io.flush()
      wrk.thread:stop()
   end
end

dofile("bench/report.lua")
