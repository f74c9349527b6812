-- The Node service's tables and names, with columns added. Every unique key leads with device_id, so
-- that the tables can be distributed by it. Device ids compare byte by byte (collate "C"): a locale's
-- comparison costs several times as much in every index and foreign key look-up, and all nodes touch
-- rows in that order.

create sequence devices_id_seq as bigint;
create sequence sync_events_id_seq as bigint;

create table devices (
    id         bigint not null default nextval('devices_id_seq'),
    device_id  varchar(255) collate "C" not null,
    created_at timestamptz not null default now(),
    -- When the device was last seen, to the minute; device_jobs.last_received is exact.
    updated_at timestamptz not null default now(),
    name       text collate "C",
    "group"    text collate "C",
    primary key (device_id)
) with (fillfactor = 80);

alter sequence devices_id_seq owned by devices.id;

-- What each device's job adds up to, kept in the transaction that stores the events. Only the primary
-- key is indexed, and pages keep room: so updates are heap-only.
create table device_jobs (
    device_id            varchar(255) collate "C" not null references devices (device_id) on delete cascade,
    job                  varchar(100) collate "C" not null,
    total_syncs          bigint not null,
    failed_syncs         bigint not null,
    total_files_synced   bigint not null,
    total_errors         bigint not null,
    speed_sum            bigint not null,
    speed_count          bigint not null,
    first_sync           timestamptz not null,
    last_sync            timestamptz not null,
    last_success         timestamptz,
    last_failure         timestamptz,
    consecutive_failures bigint not null,
    last_received        timestamptz not null,
    primary key (device_id, job)
) with (fillfactor = 60);

comment on column device_jobs.job is 'empty for events that name no job';
comment on column device_jobs.speed_sum is 'sum of internet_speed in hundredths of Mbps';

create table sync_events (
    id                 bigint not null default nextval('sync_events_id_seq'),
    device_id          varchar(255) collate "C" not null,
    timestamp          timestamptz not null,
    total_files_synced integer not null default 0,
    total_errors       integer not null default 0,
    internet_speed     numeric(10, 2),
    created_at         timestamptz not null default now(),
    updated_at         timestamptz not null default now(),
    job                varchar(100) collate "C",
    duration_seconds   numeric(11, 3),
    bytes_synced       bigint,
    metadata           text,
    constraint sync_events_device_id_fkey
        foreign key (device_id) references devices (device_id) on delete cascade,
    -- One b-tree is both the primary key and the index for history and streaks: a second one would
    -- cost every insert as much again.
    constraint idx_sync_events_device_id primary key (device_id, timestamp, id, created_at)
) partition by range (created_at);

alter sequence sync_events_id_seq owned by sync_events.id;

create index idx_sync_events_timestamp on sync_events using brin (timestamp);
create index idx_sync_events_created_at on sync_events using brin (created_at);
