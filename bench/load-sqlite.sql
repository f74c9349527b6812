-- Fills an empty PiSync database on SQLite from inside, as load-postgres.sql does. The number of events
-- stands in the temporary table load (events).
pragma journal_mode = wal;
pragma synchronous = off;
pragma cache_size = -262144;
begin;
insert into devices (device_id, created_at)
with recursive numbers (number) as (select 0 union all select number + 1 from numbers where number < 4999)
select printf('pi-%05d', number), (unixepoch() - 110 * 86400) * 1000 from numbers;

insert into sync_events (device, timestamp, total_files_synced, total_errors, internet_speed, created_at)
with recursive numbers (number) as (
    select 1 union all select number + 1 from numbers where number < (select events from load)
),
moments as (
    select number,
           unixepoch() * 1000 - 900 * ((select events from load) - number) as at
      from numbers
)
select 1 + number % 5000, at, number % 500,
       case when abs(random()) % 10 = 0 then 1 + number % 5 else 0 end, number % 10000, at
  from moments;

insert into device_jobs
select event.device, '', count(*), sum(total_errors > 0), sum(total_files_synced), sum(total_errors),
       sum(internet_speed), count(internet_speed), min(timestamp), max(timestamp),
       max(iif(total_errors = 0, timestamp, null)), max(iif(total_errors > 0, timestamp, null)),
       sum(total_errors > 0 and timestamp > coalesce(last_success, -1)), max(created_at)
  from sync_events event
  join (select device, max(iif(total_errors = 0, timestamp, null)) as last_success
          from sync_events group by device) success on success.device = event.device
 group by event.device;

insert into device_days
select device, timestamp / 86400000 * 86400000, count(*), sum(total_errors > 0), sum(total_files_synced), sum(total_errors),
       sum(internet_speed), count(internet_speed)
  from sync_events group by 1, 2;
insert into fleet_hours
select timestamp / 3600000 * 3600000, count(*), sum(total_errors > 0), sum(total_files_synced), sum(total_errors),
       sum(internet_speed), count(internet_speed)
  from sync_events group by 1;
update roll_up_state set folded_id = (select max(id) from sync_events);
commit;
