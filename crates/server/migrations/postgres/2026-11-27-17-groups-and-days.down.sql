-- loses: in which groups devices were when they reported, where they have moved since
-- loses: range of speeds, durations and bytes by device and day
-- The rest is made from other tables.
alter table roll_up_state drop column digest_device;
alter table roll_up_state drop column digest_day;
alter table roll_up_state drop column group_repairs;
alter table roll_up_state drop column group_hours_since;
drop table device_digest;
drop table group_hours;
drop table group_days;
drop table device_day_groups;
drop table group_changes;
alter table device_days drop column bytes_sum;
alter table device_days drop column duration_max;
alter table device_days drop column duration_count;
alter table device_days drop column duration_sum;
alter table device_days drop column speed_max;
alter table device_days drop column speed_min;
