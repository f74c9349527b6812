-- What pages ask of days and of groups: the range of speeds, durations and bytes by device and day, runs by group, and
-- what a device did lately. All of it is kept while events are aggregated.

-- Null for days that were aggregated before, until `pisync verify --repair` has counted them again. Where they are
-- counted, speed_min and speed_max are null when no event measured a speed, and duration_max when none took a time.
-- Speeds are in hundredths of Mbps, durations in milliseconds.
alter table device_days add column speed_min bigint;
alter table device_days add column speed_max bigint;
alter table device_days add column duration_sum bigint;
alter table device_days add column duration_count bigint;
alter table device_days add column duration_max bigint;
-- Stops at 2^62 - 1.
alter table device_days add column bytes_sum bigint;

-- When devices moved to another group. An event belongs to the former group of the first move after it: it was received
-- before changed_at, or its id is below changed_id, which is 0 unless moves were copied from SQLite. Neither column of a
-- device's later move is smaller than that of an earlier one. Groups that are empty texts stand for none, here and below.
create table group_changes (
    id           bigint generated always as identity primary key,
    device_id    varchar(255) collate "C" not null references devices (device_id) on delete cascade,
    changed_at   timestamptz not null,
    changed_id   bigint not null,
    former_group text collate "C" not null
);

create index idx_group_changes_time on group_changes (device_id, changed_at, id);
create index idx_group_changes_id on group_changes (device_id, changed_id, id);

-- The runs of devices that moved, but for those in their first group: device_days has the sum of all groups.
create table device_day_groups (
    device_id   varchar(255) collate "C" not null references devices (device_id) on delete cascade,
    day         date not null,
    "group"     text collate "C" not null,
    runs        bigint not null,
    failed_runs bigint not null,
    primary key (device_id, day, "group")
) with (fillfactor = 80);

create table group_days (
    "group"     text collate "C" not null,
    day         date not null,
    runs        bigint not null,
    failed_runs bigint not null,
    primary key ("group", day)
) with (fillfactor = 50);

create index idx_group_days_day on group_days (day);

insert into group_days
select coalesce("group", ''), day, sum(total_syncs)::bigint, sum(failed_syncs)::bigint
  from device_days
  join devices using (device_id)
 group by 1, 2;

-- Of the last 14 days, or for as long as events are kept, if that is shorter.
create table group_hours (
    "group"     text collate "C" not null,
    hour        timestamptz not null,
    runs        bigint not null,
    failed_runs bigint not null,
    primary key ("group", hour)
) with (fillfactor = 50);

create index idx_group_hours_hour on group_hours (hour);

-- Runs and failed runs of the 30 days before `day`, and the average speed of the 7 days before it, in hundredths of
-- Mbps; null when none was measured.
create table device_digest (
    device_id  varchar(255) collate "C" primary key references devices (device_id) on delete cascade,
    day        date not null,
    runs_30d   bigint not null,
    failed_30d bigint not null,
    speed_7d   bigint,
    -- Whether the device's days have changed since.
    is_stale   boolean not null
) with (fillfactor = 80);

create index idx_device_digest_speed on device_digest (speed_7d, device_id) where speed_7d is not null;
create index idx_device_digest_stale on device_digest (device_id) where is_stale;

-- Hours before this are not counted by group: they are over for long, or were aggregated before this migration.
alter table roll_up_state add column group_hours_since timestamptz not null default '1970-01-01 00:00+00';
update roll_up_state
   set group_hours_since = coalesce(
           (select least(max(hour), date_trunc('hour', now(), 'UTC') + interval '31 days') + interval '1 hour'
              from fleet_hours
            having count(*) > 0),
           group_hours_since
       );

-- How often the tables of groups were repaired: two repairs at once must not both change them.
alter table roll_up_state add column group_repairs bigint not null default 0;

-- The day whose digests are made, and the last device that has its own; null once all devices have.
alter table roll_up_state add column digest_day date;
alter table roll_up_state add column digest_device text collate "C";
