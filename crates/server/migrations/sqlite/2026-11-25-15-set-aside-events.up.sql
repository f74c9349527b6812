-- When the first of a job's events comes to count that are dated, or were received, too far in the future to count now.
-- Null when it has none.
alter table device_jobs add column set_aside_until integer;
