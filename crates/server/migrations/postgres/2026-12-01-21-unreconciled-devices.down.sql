-- loses: nothing
-- Incidents are made from all states again.
alter table device_health add column is_unreconciled boolean not null default true;
create index idx_device_health_unreconciled on device_health ("group") where is_unreconciled;
drop table unreconciled_devices;
