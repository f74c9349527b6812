-- How fast PostgreSQL itself stores what batches of 1,000 events hold: the same rows into the same tables,
-- from a table beside them, with a commit for each thousand. Prints rows per second.
create unlogged table rows as
select number / 1000 as batch, 'pi-' || lpad((random() * 4999)::int::text, 5, '0') collate "C" as device_id,
       now() - interval '1 hour' * random() as timestamp, number % 500 as files,
       case when random() < 0.1 then 1 else 0 end as errors, (number % 10000)::bigint as speed
  from generate_series(0, 199999) as number;
create index on rows (batch);
insert into devices (device_id) select distinct device_id from rows on conflict do nothing;
analyze;
do $$
declare
    started timestamptz := clock_timestamp();
begin
    for one in 0..199 loop
        insert into device_jobs as stored (
            device_id, job, total_syncs, failed_syncs, total_files_synced, total_errors, speed_sum, speed_count, first_sync,
            last_sync, last_success, last_failure, consecutive_failures, last_received
        )
        select device_id, '', count(*), count(*) filter (where errors > 0), sum(files), sum(errors), sum(speed),
               count(*), min(timestamp), max(timestamp), max(timestamp) filter (where errors = 0),
               max(timestamp) filter (where errors > 0), 0, now()
          from rows where batch = one group by device_id order by device_id
            on conflict (device_id, job) do update
               set total_syncs = stored.total_syncs + excluded.total_syncs,
                   failed_syncs = stored.failed_syncs + excluded.failed_syncs,
                   total_files_synced = stored.total_files_synced + excluded.total_files_synced,
                   total_errors = stored.total_errors + excluded.total_errors,
                   speed_sum = stored.speed_sum + excluded.speed_sum,
                   speed_count = stored.speed_count + excluded.speed_count,
                   first_sync = least(stored.first_sync, excluded.first_sync),
                   last_sync = greatest(stored.last_sync, excluded.last_sync),
                   last_success = greatest(stored.last_success, excluded.last_success),
                   last_failure = greatest(stored.last_failure, excluded.last_failure),
                   last_received = excluded.last_received;
        insert into sync_events (device_id, timestamp, total_files_synced, total_errors, internet_speed)
        select device_id, timestamp, files, errors, speed * 0.01 from rows where batch = one order by device_id;
        commit;
    end loop;
    raise notice 'ENGINE %', round(200000 / extract(epoch from clock_timestamp() - started));
end $$;
