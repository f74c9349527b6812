-- Reads one path after the other on one connection, and says of each how many milliseconds it took: the first, the
-- median, the 99th percentile, the longest, and how many there were. BENCH_READS is a file with a line per read: how
-- many devices to skip by cursor before, and the path. The pages in between are not measured.
--
-- Each path is read REQUESTS times (200), for at most SECONDS_READ (5). With BENCH_UNTIL, a file, the paths are read in
-- turn instead, with pauses in between, until that file exists.
local now = dofile("bench/clock.lua")
local most = tonumber(os.getenv("REQUESTS") or 200)
local longest = tonumber(os.getenv("SECONDS_READ") or 5)
local until_file = os.getenv("BENCH_UNTIL")
local LEAST = 5
local PAGE, LARGEST_PAGE = 50, 1000

local headers = {}
local key = os.getenv("BENCH_KEY") or ""
if key ~= "" then headers["Authorization"] = "Bearer " .. key end

local reads = {}
for line in io.lines(os.getenv("BENCH_READS")) do
   local skip, path = line:match("^(%d+)\t(.*)$")
   reads[#reads + 1] = { path = path, skip = tonumber(skip), times = {}, spent = 0 }
end

local function say(read)
   local first = read.times[1]
   table.sort(read.times)
   local count = #read.times
   local function percentile(share) return read.times[math.max(1, math.ceil(count * share))] end
   io.write(string.format("READ\t%.2f\t%.2f\t%.2f\t%.2f\t%d\n", first, percentile(0.5), percentile(0.99),
      read.times[count], count))
   io.flush()
end

local current, sent_at = 1, nil

-- The request that comes next, and how many devices it skips.
local function asked()
   local read = reads[current]
   if not read.cursor and read.skip == 0 then return read.path, 0 end
   local skip = math.min(LARGEST_PAGE, read.skip)
   local limit = skip > 0 and skip or PAGE
   local cursor = read.cursor and "&cursor=" .. read.cursor or ""
   return read.path .. "&limit=" .. limit .. cursor, skip
end

function request()
   sent_at = now()
   return wrk.format("GET", (asked()), headers)
end

-- Whether a read was made often enough.
local function is_enough(read)
   return #read.times >= most or (read.spent >= longest and #read.times >= LEAST)
end

function response(status, _, body)
   local took = now() - sent_at
   local read = reads[current]
   local path, skipped = asked()
   if status ~= 200 then
      io.stderr:write(path, " was answered ", status, ": ", body:sub(1, 500), "\n")
      os.exit(1)
   end
   if skipped > 0 then
      read.skip = read.skip - skipped
      read.cursor = body:match('"next_cursor":"(%w+)"')
      if not read.cursor then
         io.stderr:write(path, " has no next page\n")
         os.exit(1)
      end
      return
   end
   read.times[#read.times + 1] = took * 1000
   read.spent = read.spent + took
   if until_file then
      current = current % #reads + 1
      local file = current == 1 and io.open(until_file)
      if file then
         for _, each in ipairs(reads) do say(each) end
         os.exit(0)
      end
   elseif is_enough(read) then
      say(read)
      if current == #reads then os.exit(0) end
      current = current + 1
   end
end

if until_file then
   function delay() return 20 end
end
