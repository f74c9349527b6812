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

update roll_up_state set folded_id = (select max(id) from sync_events);
commit;
