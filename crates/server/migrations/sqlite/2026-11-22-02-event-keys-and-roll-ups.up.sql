-- Roll-ups: what events add up to, by the day and hour of their own dates in UTC. A background task
-- folds stored events into them; whoever reads adds those that are not folded yet.

create table device_days (
    device             integer not null references devices (id) on delete cascade,
    -- Its midnight.
    day                integer not null,
    total_syncs        integer not null,
    failed_syncs       integer not null,
    total_files_synced integer not null,
    total_errors       integer not null,
    speed_sum          integer not null,
    speed_count        integer not null,
    primary key (device, day)
) strict, without rowid;

-- Finds who failed in some days, and how often, without reading the days of those who did not.
create index idx_device_days_failed on device_days (day, device, failed_syncs) where failed_syncs > 0;

create table fleet_hours (
    -- Its beginning.
    hour               integer primary key,
    total_syncs        integer not null,
    failed_syncs       integer not null,
    total_files_synced integer not null,
    total_errors       integer not null,
    speed_sum          integer not null,
    speed_count        integer not null
) strict;

create table roll_up_state (
    id            integer primary key check (id = 1),
    -- Events up to this id are folded: ids rise in the order of commits.
    folded_id     integer not null,
    -- Events received before this are gone; null while all are kept.
    raw_since     integer,
    -- Events dated before this no longer change streaks.
    streaks_since integer
) strict;

insert into roll_up_state (id, folded_id) values (1, 0);

-- What a device calls its events. With it, sending an event again changes nothing.
alter table sync_events add column event_id text;

-- Outlives the events themselves, and is pruned by age: a table of its own.
create table event_keys (
    device     integer not null references devices (id) on delete cascade,
    event_id   text    not null,
    -- sync_events.id
    id         integer not null,
    created_at integer not null,
    primary key (device, event_id)
) strict, without rowid;

-- Grows at its end only, so ingest hardly pays for it.
create index idx_event_keys_created_at on event_keys (created_at);
