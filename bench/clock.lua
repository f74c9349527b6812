-- The present in seconds, with microseconds. wrk's Lua has no such clock.
local ffi = require("ffi")
ffi.cdef [[
   typedef struct { long sec; long usec; } pisync_time;
   int gettimeofday(pisync_time *, void *);
]]
local clock = ffi.new("pisync_time")
return function()
   ffi.C.gettimeofday(clock, nil)
   return tonumber(clock.sec) + tonumber(clock.usec) / 1e6
end
