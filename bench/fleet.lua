-- The fleet of bench/devices. Everything follows from a device's number, so each run makes the same fleet. BENCH_DEVICES
-- is their number. Each reports five days ago, three days ago, 30 hours ago, two hours ago, and at the top of the hour.
--
-- 1 % are broken: they fail three times and are silent since 30 hours ago. A tenth fails every other time, the others one
-- time in twenty, but neither within the last day. Then a hundred devices alone fail, at any size of the fleet. So the
-- failures of 24 hours stay as many, and those of 7 days grow with the fleet.
local fleet = { devices = tonumber(os.getenv("BENCH_DEVICES")) }

local HOUR = 3600
local ROUNDS = { 120 * HOUR, 72 * HOUR, 30 * HOUR, 2 * HOUR }
local LAST_DAY = 4
-- Those that fail today report more often.
local FAILING_ROUNDS = { 120 * HOUR, 72 * HOUR, 30 * HOUR, 4 * HOUR, 3 * HOUR, 2 * HOUR }

-- A whole number below `limit` that looks like chance.
local function chance(number, round, limit)
   local value = (number * 16 + round + 1) * 48271 % 2147483647
   value = value * 48271 % 2147483647
   return value * 48271 % 2147483647 % limit
end

local function is_broken(number) return number % 100 == 7 end
local function fails_today(number) return number < 2000 and number % 20 == 1 end

-- Numbers begin with 0.
function fleet.id(number) return string.format("pi-%06d", number) end

-- The group's number, of 294, or nil for the 2 % that have none. Group 0 has 50 devices at any size of the fleet (of
-- 1,000 and more); the others have equal parts of it.
function fleet.group(number)
   if number < 1000 and number % 20 == 2 then return 0 end
   if number % 50 ~= 49 then return 1 + number % 293 end
end

-- How long ago a device has reported.
function fleet.rounds(number)
   return fails_today(number) and FAILING_ROUNDS or ROUNDS
end

function fleet.reports_in(number, round) return round < LAST_DAY or not is_broken(number) end

-- How many seconds before a round's time a device reports, up to 50 minutes.
function fleet.early(number, round) return chance(number, round + 8, 3000000) / 1000 end

-- What a report says of the run.
function fleet.fields(number, round)
   local errors = 0
   if round >= LAST_DAY then
      if fails_today(number) then errors = 1 end
   elseif is_broken(number) or chance(number, round, 20) < (number % 10 == 3 and 10 or 1) then
      errors = 1 + number % 3
   end
   return string.format('"total_files_synced":%d,"total_errors":%d,"internet_speed":%.2f',
      chance(number, round, 500), errors, chance(number, round, 10000) / 100)
end

-- The devices that report at the top of the hour, which is the round after those that are loaded.
function fleet.reporting_now()
   local numbers = {}
   for number = 0, fleet.devices - 1 do
      if fleet.reports_in(number, LAST_DAY) then numbers[#numbers + 1] = number end
   end
   return numbers
end
fleet.THIS_HOUR = 7

return fleet
