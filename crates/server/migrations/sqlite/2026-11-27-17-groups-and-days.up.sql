-- What pages ask of days and of groups: the range of speeds, durations and bytes by device and day, runs by group, and
-- what a device did lately. All of it is kept while events are aggregated.

-- Null for days that were aggregated before, until `pisync verify --repair` has counted them again. Where they are
-- counted, speed_min and speed_max are null when no event measured a speed, and duration_max when none took a time.
alter table device_days add column speed_min integer;
alter table device_days add column speed_max integer;
alter table device_days add column duration_sum integer;
alter table device_days add column duration_count integer;
alter table device_days add column duration_max integer;
-- Stops at 2^62 - 1.
alter table device_days add column bytes_sum integer;

-- When devices moved to another group. An event belongs to the former group of the first move after it: it was received
-- before changed_at, or had been aggregated, which its id shows, when the device moved. Neither column of a device's later
-- move is smaller than that of an earlier one. Groups that are empty texts stand for none, here and below.
create table group_changes (
    id           integer primary key autoincrement,
    device       integer not null references devices (id) on delete cascade,
    changed_at   integer not null,
    changed_id   integer not null,
    former_group text    not null
) strict;

create index idx_group_changes_time on group_changes (device, changed_at, id);
create index idx_group_changes_id on group_changes (device, changed_id, id);

-- The runs of devices that moved, but for those in their first group: device_days has the sum of all groups.
create table device_day_groups (
    device      integer not null references devices (id) on delete cascade,
    day         integer not null,
    "group"     text    not null,
    runs        integer not null,
    failed_runs integer not null,
    primary key (device, day, "group")
) strict, without rowid;

create table group_days (
    "group"     text    not null,
    day         integer not null,
    runs        integer not null,
    failed_runs integer not null,
    primary key ("group", day)
) strict, without rowid;

create index idx_group_days_day on group_days (day);

insert into group_days
select ifnull(d."group", ''), days.day, sum(days.total_syncs), sum(days.failed_syncs)
  from device_days days
  join devices d on d.id = days.device
 group by 1, 2;

-- Of the last 14 days, or for as long as events are kept, if that is shorter.
create table group_hours (
    "group"     text    not null,
    hour        integer not null,
    runs        integer not null,
    failed_runs integer not null,
    primary key ("group", hour)
) strict, without rowid;

create index idx_group_hours_hour on group_hours (hour);

-- Runs and failed runs of the 30 days before `day`, and the average speed of the 7 days before it, in hundredths of
-- Mbps; null when none was measured.
create table device_digest (
    device     integer primary key references devices (id) on delete cascade,
    day        integer not null,
    runs_30d   integer not null,
    failed_30d integer not null,
    speed_7d   integer,
    -- 1 when the device's days have changed since.
    is_stale   integer not null
) strict;

create index idx_device_digest_speed on device_digest (speed_7d, device) where speed_7d is not null;
create index idx_device_digest_stale on device_digest (device) where is_stale = 1;

-- Hours before this are not counted by group: they are over for long, or were aggregated before this migration.
alter table roll_up_state add column group_hours_since integer not null default 0;
update roll_up_state
   set group_hours_since = ifnull(
           (select min(max(hour), (unixepoch() / 3600 + 31 * 24) * 3600000) + 3600000 from fleet_hours), 0
       );

-- How often the tables of groups were repaired: two repairs at once must not both change them.
alter table roll_up_state add column group_repairs integer not null default 0;

-- The day whose digests are made, and the last device that has its own; null once all devices have.
alter table roll_up_state add column digest_day integer;
alter table roll_up_state add column digest_device integer;
