-- The latest time that was believed when events and event ids were deleted for their age: a clock that jumps ahead
-- must not make everything look old.
create table trusted_time (
    id      integer primary key check (id = 1),
    until   integer not null,
    -- What the clock said last.
    seen    integer not null,
    -- For how many milliseconds servers have run with a clock that is not believed.
    doubted integer not null
) strict;
