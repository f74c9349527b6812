-- Lists of devices in the order of a figure, and counts of devices, must not read a row per device. These tables are
-- kept beside ingest: a background task brings them up to date, and readers add the devices that have changed since.

-- What a device's jobs add up to.
create table device_summaries (
    device               integer primary key references devices (id) on delete cascade,
    -- Ends the indexes: equal figures are listed in the order of device ids.
    device_id            text    not null,
    last_seen            integer,
    last_sync            integer,
    last_success         integer,
    -- The smallest integer for a device that never failed.
    last_failure         integer not null,
    -- Null for a device that never reported, which comes last in every order.
    total_syncs          integer,
    failed_syncs         integer,
    consecutive_failures integer
) strict;

insert into device_summaries
select d.id, d.device_id, max(j.last_received), max(j.last_sync), max(j.last_success),
       ifnull(max(j.last_failure), -9223372036854775808), sum(j.total_syncs), sum(j.failed_syncs),
       max(j.consecutive_failures)
  from devices d
  left join device_jobs j on j.device = d.id
 group by d.id;

create index idx_device_summaries_last_seen on device_summaries (last_seen, device_id);
create index idx_device_summaries_last_sync on device_summaries (last_sync, device_id);
create index idx_device_summaries_last_success on device_summaries (last_success, device_id);
create index idx_device_summaries_total_syncs on device_summaries (total_syncs, device_id);
create index idx_device_summaries_failed_syncs on device_summaries (failed_syncs, device_id);
create index idx_device_summaries_consecutive_failures on device_summaries (consecutive_failures, device_id);
-- Who fails most, and latest.
create index idx_device_summaries_failures on device_summaries (failed_syncs, last_failure, device_id)
 where failed_syncs > 0;
create index idx_device_summaries_streaks on device_summaries (consecutive_failures, last_failure, device_id)
 where consecutive_failures > 0;

-- How many devices have a figure in each bucket: 'last_seen' by the minute since 1970, 'failed_syncs' and
-- 'consecutive_failures' by their number, those above 100 as 100.
create table device_counts (
    measure text    not null,
    bucket  integer not null,
    devices integer not null,
    primary key (measure, bucket)
) strict, without rowid;

insert into device_counts
select 'last_seen', (last_seen - (last_seen % 60000 + 60000) % 60000) / 60000, count(*)
  from device_summaries
 where last_seen is not null
 group by 2
union all
select 'failed_syncs', min(ifnull(failed_syncs, 0), 100), count(*) from device_summaries group by 2
union all
select 'consecutive_failures', min(ifnull(consecutive_failures, 0), 100), count(*) from device_summaries group by 2;

-- Devices whose figures were changed by something else than a new event.
create table stale_summaries (
    id     integer primary key autoincrement,
    device integer not null
) strict;

-- What all aggregated events add up to.
create table fleet_totals (
    id                 integer primary key check (id = 1),
    total_syncs        integer not null,
    failed_syncs       integer not null,
    total_files_synced integer not null,
    total_errors       integer not null,
    speed_sum          integer not null,
    speed_count        integer not null
) strict;

insert into fleet_totals
select 1, ifnull(sum(total_syncs), 0), ifnull(sum(failed_syncs), 0), ifnull(sum(total_files_synced), 0),
       ifnull(sum(total_errors), 0), ifnull(sum(speed_sum), 0), ifnull(sum(speed_count), 0)
  from fleet_hours;

-- The summaries of all devices are right, but for those with events above this id, and for devices above that number.
alter table roll_up_state add column summarized_id integer not null default 0;
alter table roll_up_state add column summarized_device integer not null default 0;
update roll_up_state
   set summarized_id = folded_id, summarized_device = ifnull((select max(id) from devices), 0);

create index idx_devices_name on devices (name, device_id);
create index idx_devices_created_at on devices (created_at, device_id);
create index idx_devices_group on devices ("group", device_id);
