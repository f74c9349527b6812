-- Roll-ups: what events add up to, by the day and hour of their own dates in UTC. A background task
-- folds stored events into them; whoever reads adds those that are not folded yet.

create table device_days (
    device_id          varchar(255) collate "C" not null references devices (device_id) on delete cascade,
    day                date not null,
    total_syncs        bigint not null,
    failed_syncs       bigint not null,
    total_files_synced bigint not null,
    total_errors       bigint not null,
    speed_sum          bigint not null,
    speed_count        bigint not null,
    primary key (device_id, day)
) with (fillfactor = 80);

comment on column device_days.speed_sum is 'sum of internet_speed in hundredths of Mbps';

-- Finds who failed in some days, and how often, without reading the days of those who did not.
create index idx_device_days_failed on device_days (day, device_id) include (failed_syncs)
 where failed_syncs > 0;

create table fleet_hours (
    hour               timestamptz primary key,
    total_syncs        bigint not null,
    failed_syncs       bigint not null,
    total_files_synced bigint not null,
    total_errors       bigint not null,
    speed_sum          bigint not null,
    speed_count        bigint not null
) with (fillfactor = 50);

comment on column fleet_hours.speed_sum is 'sum of internet_speed in hundredths of Mbps';

create table roll_up_state (
    id            integer primary key check (id = 1),
    -- Events received until then are folded; null before the first.
    folded_until  timestamptz,
    -- Events received before this are gone, or about to go; null while all are kept.
    raw_since     timestamptz,
    -- Events dated before this no longer change streaks.
    streaks_since timestamptz,
    -- When the two above were moved: servers that write must hear of it before events go.
    announced_at  timestamptz
);

insert into roll_up_state (id) values (1);

-- The events that are not folded yet are found through this index. Pages that it has not summarised
-- are all read, and by default it leaves that to the next vacuum.
drop index idx_sync_events_created_at;
create index idx_sync_events_created_at on sync_events using brin (created_at)
  with (autosummarize = on);

-- What a device calls its events. With it, sending an event again changes nothing.
alter table sync_events add column event_id varchar(64) collate "C";

-- A partitioned table cannot hold a unique (device_id, event_id), so the keys are a table of their own,
-- pruned by age. No foreign key: the events' own one has been checked in the same transaction, and a
-- deleted device's keys go with it.
create table event_keys (
    device_id  varchar(255) collate "C" not null,
    event_id   varchar(64) collate "C" not null,
    -- The event: sync_events.id and timestamp.
    id         bigint not null,
    timestamp  timestamptz not null,
    created_at timestamptz not null,
    primary key (device_id, event_id)
);

create index idx_event_keys_created_at on event_keys using brin (created_at);
