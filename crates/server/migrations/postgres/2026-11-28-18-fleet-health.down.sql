-- loses: policies, tags, notes, pauses, windows and the roster
-- loses: the states of devices, and incidents
-- loses: the scope `operate`: its keys can only read
alter table api_keys drop constraint api_keys_scope_check;
update api_keys set scope = 'read' where scope = 'operate';
alter table api_keys add constraint api_keys_scope_check check (scope in ('ingest', 'read', 'admin'));

alter table group_days drop column most_degraded;
alter table group_days drop column most_silent;
alter table group_days drop column most_failing;
alter table group_hours drop column most_degraded;
alter table group_hours drop column most_silent;
alter table group_hours drop column most_failing;

drop table incident_entries;
drop table incident_members;
drop table incidents;
drop table run_starts;
drop table state_changes;
drop table group_states;
drop table job_health;
drop table device_health;
drop table windows;
drop table outages;
drop table fleet_changes;
drop table fleet_state;
drop table groups;
drop table device_tags;
drop table device_settings;
