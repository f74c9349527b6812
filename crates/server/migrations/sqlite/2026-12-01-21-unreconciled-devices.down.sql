-- loses: nothing
-- Incidents are made from all states again.
alter table device_health add column is_unreconciled integer not null default 1;
create index idx_device_health_unreconciled on device_health ("group") where is_unreconciled = 1;
drop table unreconciled_devices;
