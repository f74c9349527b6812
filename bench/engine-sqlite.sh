#!/usr/bin/env bash
# How fast SQLite itself stores what batches of 1,000 events hold: the same rows into the same tables, from a
# table beside them, with a synced commit for each thousand. Prints rows per second.
#
# Usage: bench/engine-sqlite.sh DATABASE, which `pisync migrate up` has made
set -euo pipefail
settings="pragma journal_mode = wal; pragma synchronous = full; pragma foreign_keys = on;
          pragma wal_autocheckpoint = 65536; pragma cache_size = -16384;"
sqlite3 "$1" >/dev/null <<SQL
$settings
create temp table numbers as
with recursive number (n) as (select 0 union all select n + 1 from number where n < 4999) select n from number;
insert or ignore into devices (device_id, created_at) select printf('pi-%05d', n), 0 from numbers;
create table rows as
with recursive number (n) as (select 0 union all select n + 1 from number where n < 199999)
select n / 1000 as batch, 1 + abs(random()) % 5000 as device, 1795348800000 - abs(random()) % 3600000 as timestamp,
       n % 500 as files, abs(random()) % 10 = 0 as errors, n % 10000 as speed
  from number;
create index rows_batch on rows (batch);
SQL
began=$EPOCHREALTIME
{
    echo "$settings"
    for batch in $(seq 0 199); do
        echo "begin immediate;
        insert into sync_events (device, timestamp, total_files_synced, total_errors, internet_speed, created_at)
        select device, timestamp, files, errors, speed, 1795348800000 from rows where batch = $batch;
        insert into device_jobs (
            device, job, total_syncs, failed_syncs, total_files_synced, total_errors, speed_sum, speed_count, first_sync,
            last_sync, last_success, last_failure, consecutive_failures, last_received
        )
        select device, '', count(*), sum(errors), sum(files), sum(errors), sum(speed), count(*), min(timestamp),
               max(timestamp), max(timestamp) filter (where errors = 0), max(timestamp) filter (where errors > 0), 0,
               1795348800000
          from rows where batch = $batch group by device
            on conflict (device, job) do update
               set total_syncs = total_syncs + excluded.total_syncs,
                   failed_syncs = failed_syncs + excluded.failed_syncs,
                   total_files_synced = total_files_synced + excluded.total_files_synced,
                   total_errors = total_errors + excluded.total_errors,
                   speed_sum = speed_sum + excluded.speed_sum,
                   speed_count = speed_count + excluded.speed_count,
                   first_sync = min(first_sync, excluded.first_sync),
                   last_sync = max(last_sync, excluded.last_sync),
                   last_success = max(last_success, excluded.last_success),
                   last_failure = max(last_failure, excluded.last_failure),
                   last_received = excluded.last_received;
        commit;"
    done
} | sqlite3 "$1" >/dev/null
awk "BEGIN { printf \"%.0f\n\", 200000 / ($EPOCHREALTIME - $began) }"
