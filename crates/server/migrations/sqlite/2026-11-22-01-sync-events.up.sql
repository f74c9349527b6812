-- Times are milliseconds since 1970-01-01T00:00Z, speeds hundredths of Mbps, durations milliseconds:
-- integers are what SQLite stores and compares fastest. Device ids are interned, so that an event
-- carries a small number instead of a text.

create table devices (
    -- autoincrement: the number of a deleted device never comes back.
    id         integer primary key autoincrement,
    device_id  text    not null unique,
    name       text,
    "group"    text,
    created_at integer not null
) strict;

-- What each device's job adds up to, kept in the transaction that stores the events.
create table device_jobs (
    device               integer not null references devices (id) on delete cascade,
    job                  text    not null,
    total_syncs          integer not null,
    failed_syncs         integer not null,
    total_files_synced   integer not null,
    total_errors         integer not null,
    speed_sum            integer not null,
    speed_count          integer not null,
    first_sync           integer not null,
    last_sync            integer not null,
    last_success         integer,
    last_failure         integer,
    consecutive_failures integer not null,
    last_received        integer not null,
    primary key (device, job)
) strict, without rowid;

create table sync_events (
    id                 integer primary key autoincrement,
    device             integer not null references devices (id) on delete cascade,
    timestamp          integer not null,
    total_files_synced integer not null,
    total_errors       integer not null,
    internet_speed     integer,
    job                text,
    duration           integer,
    bytes_synced       integer,
    metadata           text,
    created_at         integer not null
) strict;

-- The one index that ingest pays for. The row id at its end orders events of the same instant.
create index idx_sync_events_device_id on sync_events (device, timestamp);
