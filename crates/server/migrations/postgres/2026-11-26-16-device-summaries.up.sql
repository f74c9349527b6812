-- Lists of devices in the order of a figure, and counts of devices, must not read a row per device. These tables are
-- kept beside ingest: a background task brings them up to date, and readers add the devices that have changed since.

-- What a device's jobs add up to. Times are milliseconds since 1970-01-01T00:00Z.
create table device_summaries (
    device_id            varchar(255) collate "C" primary key references devices (device_id) on delete cascade,
    last_seen            bigint,
    last_sync            bigint,
    last_success         bigint,
    -- The smallest integer for a device that never failed.
    last_failure         bigint not null,
    -- Null for a device that never reported, which comes last in every order.
    total_syncs          bigint,
    failed_syncs         bigint,
    consecutive_failures bigint
) with (fillfactor = 80);

insert into device_summaries
select device_id, floor(extract(epoch from max(j.last_received)) * 1000)::bigint,
       floor(extract(epoch from max(j.last_sync)) * 1000)::bigint,
       floor(extract(epoch from max(j.last_success)) * 1000)::bigint,
       coalesce(floor(extract(epoch from max(j.last_failure)) * 1000)::bigint, -9223372036854775808),
       sum(j.total_syncs)::bigint, sum(j.failed_syncs)::bigint, max(j.consecutive_failures)
  from devices
  left join device_jobs j using (device_id)
 group by device_id;

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
    measure text collate "C" not null,
    bucket  bigint not null,
    devices bigint not null,
    primary key (measure, bucket)
) with (fillfactor = 50);

insert into device_counts
select 'last_seen', floor(last_seen / 60000.0)::bigint, count(*)
  from device_summaries
 where last_seen is not null
 group by 2
union all
select 'failed_syncs', least(coalesce(failed_syncs, 0), 100), count(*) from device_summaries group by 2
union all
select 'consecutive_failures', least(coalesce(consecutive_failures, 0), 100), count(*) from device_summaries group by 2;

-- Devices whose figures were changed by something else than a new event above the watermark.
create table stale_summaries (
    id        bigint generated always as identity primary key,
    device_id varchar(255) collate "C" not null
);

-- What all aggregated events add up to.
create table fleet_totals (
    id                 integer primary key check (id = 1),
    total_syncs        bigint not null,
    failed_syncs       bigint not null,
    total_files_synced bigint not null,
    total_errors       bigint not null,
    speed_sum          bigint not null,
    speed_count        bigint not null
) with (fillfactor = 50);

insert into fleet_totals
select 1, coalesce(sum(total_syncs), 0)::bigint, coalesce(sum(failed_syncs), 0)::bigint,
       coalesce(sum(total_files_synced), 0)::bigint, coalesce(sum(total_errors), 0)::bigint,
       coalesce(sum(speed_sum), 0)::bigint, coalesce(sum(speed_count), 0)::bigint
  from fleet_hours;

-- The summaries of all devices are right, but for those that were first seen, or have events received, after this;
-- null before the first.
alter table roll_up_state add column summarized_until timestamptz;
update roll_up_state set summarized_until = folded_until;

create index idx_devices_name on devices (name, device_id);
create index idx_devices_created_at on devices (created_at, device_id);
create index idx_devices_group on devices ("group", device_id);
