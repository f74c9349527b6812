-- loses: policies, tags, notes, pauses, windows and the roster
-- loses: the states of devices, and incidents
-- loses: the scope `operate`: its keys can only read
create table api_keys_without_operate (
    id         integer primary key autoincrement,
    hash       blob    not null unique,
    hint       text    not null,
    name       text,
    scope      text    not null check (scope in ('ingest', 'read', 'admin')),
    device_id  text,
    "group"    text,
    created_at integer not null,
    expires_at integer,
    revoked_at integer,
    last_used  integer,
    check (scope = 'ingest' or (device_id is null and "group" is null))
) strict;
insert into api_keys_without_operate
select id, hash, hint, name, iif(scope = 'operate', 'read', scope), device_id, "group", created_at, expires_at,
       revoked_at, last_used
  from api_keys;
delete from sqlite_sequence where name = 'api_keys_without_operate';
insert into sqlite_sequence (name, seq) select 'api_keys_without_operate', seq from sqlite_sequence where name = 'api_keys';
drop table api_keys;
alter table api_keys_without_operate rename to api_keys;

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
