-- Loads the fleet of fleet.lua: batches of what up to 400 devices of one group have reported, through the API, so that
-- every table is as the program leaves it. Each group has a key, whose new devices join the group. BENCH_KEYS is a file
-- of keys, one per line, in the order of the groups. Says how many events were stored in how many seconds.
local DEVICES_IN_BATCH = 400
local fleet = dofile("bench/fleet.lua")
local now = dofile("bench/clock.lua")
local started = os.time()

local keys = {}
for line in io.lines(os.getenv("BENCH_KEYS")) do keys[#keys + 1] = line end

-- Batches of devices of the same group; those without a group come last.
local members = {}
for group = 0, #keys do members[group] = {} end
for number = 0, fleet.devices - 1 do
   local of_group = members[fleet.group(number) or #keys]
   of_group[#of_group + 1] = number
end
local batches = {}
for group = 0, #keys do
   for first = 1, #members[group], DEVICES_IN_BATCH do
      batches[#batches + 1] = { group = group, first = first }
   end
end

local function body_of(batch)
   local lines, of_group = {}, members[batch.group]
   for place = batch.first, math.min(batch.first + DEVICES_IN_BATCH - 1, #of_group) do
      local number = of_group[place]
      for round, ago in ipairs(fleet.rounds(number)) do
         if fleet.reports_in(number, round) then
            local at = started - ago - fleet.early(number, round)
            lines[#lines + 1] = string.format('{"device_id":"%s","timestamp":"%s.%03dZ",%s}', fleet.id(number),
               os.date("!%Y-%m-%dT%H:%M:%S", math.floor(at)), at % 1 * 1000, fleet.fields(number, round))
         end
      end
   end
   return table.concat(lines, "\n")
end

local function send(batch)
   local headers = { ["Content-Type"] = "application/x-ndjson" }
   local key = keys[batch.group + 1] or os.getenv("BENCH_KEY") or ""
   if key ~= "" then headers["Authorization"] = "Bearer " .. key end
   return wrk.format("POST", "/api/sync-events", headers, body_of(batch))
end

-- wrk asks for one request that it does not send.
local sent, answered, events, began = -1, 0, 0, now()
function request()
   sent = sent + 1
   -- The connections that have nothing left to load wait for the others.
   if sent > #batches then return wrk.format("GET", "/health/live") end
   return send(batches[math.max(sent, 1)])
end

function response(status, _, body)
   local accepted = body:match('"accepted":(%d+)')
   if not accepted and status == 200 then return end
   if status ~= 200 or not body:find('"rejected":0', 1, true) then
      io.stderr:write("a batch was answered ", status, ": ", body:sub(1, 500), "\n")
      os.exit(1)
   end
   answered = answered + 1
   events = events + tonumber(accepted)
   if answered == #batches then
      io.write(string.format("LOADED %d %.2f\n", events, now() - began))
      os.exit(0)
   end
end
