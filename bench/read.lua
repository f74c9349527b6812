-- Reads one path again and again; "{device}" in it becomes one of 5,000 devices.
local path = os.getenv("BENCH_PATH")
local headers = {}
local key = os.getenv("BENCH_KEY") or ""
if key ~= "" then headers["Authorization"] = "Bearer " .. key end

function init(args)
   math.randomseed(os.time())
end

function request()
   local asked = path:gsub("{device}", string.format("pi-%05d", math.random(0, 4999)))
   return wrk.format("GET", asked, headers)
end

dofile("bench/report.lua")
