-- loses: nothing
-- What it drops is made from the other tables.
drop index idx_devices_group;
drop index idx_devices_created_at;
drop index idx_devices_name;
alter table roll_up_state drop column summarized_until;
drop table fleet_totals;
drop table stale_summaries;
drop table device_counts;
drop table device_summaries;
