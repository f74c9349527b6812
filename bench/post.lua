-- What a fleet posts: 5,000 devices, one report in ten with errors, each dated when it is sent, but for one in
-- twenty that was kept back for up to an hour. LATE is that share (0.05; 1: every report is late, so that nothing
-- arrives in order). With SCRAMBLED set, milliseconds are random: what a device reports within a second arrives in
-- any order. With EVENT_IDS set, each report has an event_id of its own.
local ffi = require("ffi")
ffi.cdef [[
   typedef struct { long sec; long usec; } pisync_time;
   int gettimeofday(pisync_time *, void *);
]]
local clock = ffi.new("pisync_time")

local heads, tails = {}, {}
local event_ids = (os.getenv("EVENT_IDS") or "") ~= ""
local late = tonumber(os.getenv("LATE") or 0.05)
local scrambled = (os.getenv("SCRAMBLED") or "") ~= ""
-- Stands where each request gets its own text, which is as long.
local MARK = '"timestamp":"2026-01-01T00:00:00.000Z"'
if event_ids then MARK = MARK .. ',"event_id":"00000000000000"' end

local headers = { ["Content-Type"] = "application/json" }
local key = os.getenv("BENCH_KEY") or ""
if key ~= "" then headers["Authorization"] = "Bearer " .. key end

function init(args)
   math.randomseed(os.time())
   for i = 1, 20000 do
      local errors = 0
      if math.random(10) == 1 then errors = math.random(5) end
      local request = wrk.format("POST", "/api/sync-event", headers, string.format(
         '{"device_id":"pi-%05d",%s,"total_files_synced":%d,"total_errors":%d,"internet_speed":%.2f}',
         math.random(5000), MARK, math.random(500), errors, math.random() * 100))
      local first = request:find(MARK, 1, true)
      heads[i] = request:sub(1, first - 1) .. '"timestamp":"'
      tails[i] = request:sub(first + #MARK)
   end
end

local seconds = {}
-- A second as text; each is written once.
local function text_of(second)
   local text = seconds[second]
   if not text then
      text = os.date("!%Y-%m-%dT%H:%M:%S.", second)
      seconds[second] = text
   end
   return text
end

local number = 0
local run = os.time() % 1000000
function request()
   number = number + 1
   local body = number % #heads + 1
   ffi.C.gettimeofday(clock, nil)
   local sent = tonumber(clock.sec)
   if late > 0 and math.random() < late then sent = sent - math.random(3600) end
   local millisecond = tonumber(clock.usec) / 1000
   if scrambled then millisecond = math.random(0, 999) end
   local stamp = text_of(sent) .. string.format('%03dZ"', millisecond)
   if event_ids then stamp = stamp .. string.format(',"event_id":"%06d%08d"', run, number) end
   return heads[body] .. stamp .. tails[body]
end

dofile("bench/report.lua")
