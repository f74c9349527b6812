-- When the first of a job's events comes to count that are dated, or were received, too far in the future to count now.
-- Null when it has none.
alter table device_jobs add column set_aside_until timestamptz;
comment on column device_jobs.set_aside_until is 'when to count the job again: it has events from a clock that was ahead';
