-- Fleet health: what is expected of devices, the state that each is in, and the incidents that follow. Nothing here is
-- written by ingest.

-- What people say about a device, beside its name and group. Rows of `devices` are left alone, for ingest reads them.
create table device_settings (
    device        integer primary key references devices (id) on delete cascade,
    -- A JSON object.
    policy        text    not null default '{}',
    -- When its policy was changed, or it moved to another group: waiting began anew then.
    policy_since  integer,
    -- The last pause; without an end until somebody ends it.
    paused_from   integer,
    paused_until  integer,
    -- Since when the roster expects it.
    expected_from integer,
    -- 1 when nothing is to be expected of it.
    is_excused    integer not null default 0,
    note          text
) strict;

create table device_tags (
    device integer not null references devices (id) on delete cascade,
    tag    text    not null,
    primary key (device, tag)
) strict, without rowid;

create index idx_device_tags_tag on device_tags (tag, device);

-- Groups about which something is said. Devices may be in groups that have no row.
create table groups (
    name         text    not null primary key,
    policy       text    not null default '{}',
    policy_since integer,
    paused_from  integer,
    paused_until integer,
    note         text
) strict, without rowid;

create table fleet_state (
    id            integer primary key check (id = 1),
    policy        text    not null default '{}',
    policy_since  integer,
    paused_from   integer,
    paused_until  integer,
    -- Every change of a policy, pause, window, tag or roster counts it up.
    version       integer not null default 0,
    -- When the last sweep began that went through.
    swept_at      integer,
    -- The last sign of life, and the last clean end.
    alive_at      integer,
    stopped_at    integer
) strict;

insert into fleet_state (id) values (1);

-- What has changed since the last sweep, so that it evaluates these devices again. `scope` is 'fleet', 'group', 'tag' or
-- 'device', and `key` the name of it.
create table fleet_changes (
    version integer primary key,
    scope   text    not null,
    key     text    not null
) strict;

-- When nobody could be heard.
create table outages (
    from_at  integer not null primary key,
    until_at integer not null,
    -- 'stopped', 'down' or 'refusing'.
    cause    text    not null,
    node     text    not null
) strict;

create table windows (
    id        integer primary key autoincrement,
    name      text    not null,
    -- 'fleet', 'group', 'device' or 'tag', and which of them.
    scope     text    not null,
    key       text    not null,
    -- 'closed' or 'quiet'.
    effect    text    not null,
    timezone  text    not null,
    -- Weekdays and times, as JSON; null for the whole time.
    weekly    text,
    starts_at integer,
    ends_at   integer
) strict;

-- The state of each device. `due_at` and `late_at` hold as long as the device is not heard after `heard_at`.
create table device_health (
    device          integer primary key references devices (id) on delete cascade,
    "group"         text    not null,
    state           text    not null,
    since           integer not null,
    -- A JSON array.
    problems        text    not null,
    -- 1 when a report is expected of it, and it is not paused.
    is_expected     integer not null,
    is_overdue      integer not null,
    is_behind       integer not null,
    -- Milliseconds after a report.
    silent_after    integer,
    grace           integer not null,
    due_at          integer,
    late_at         integer,
    -- When it must be evaluated again, heard or not.
    check_at        integer,
    patience        integer,
    behind_after    integer not null,
    next_due        integer,
    waiting_since   integer,
    heard_at        integer,
    policy_version  integer not null,
    -- 1 until incidents have been made from this state.
    is_unreconciled integer not null
) strict;

create index idx_device_health_group on device_health ("group", state);
create index idx_device_health_state on device_health (state, since, device);
create index idx_device_health_unreconciled on device_health ("group") where is_unreconciled = 1;
create index idx_device_health_overdue on device_health (device) where is_overdue = 1;

-- The jobs that are expected by name, that are not ok, or whose failures are counted over several runs.
create table job_health (
    device        integer not null references devices (id) on delete cascade,
    job           text    not null,
    is_expected   integer not null,
    state         text    not null,
    reason        text,
    since         integer,
    next_due      integer,
    waiting_since integer,
    heard_at      integer,
    -- The job's figures when it was evaluated.
    seen_failures integer not null,
    seen_failed   integer not null,
    primary key (device, job)
) strict, without rowid;

-- How many devices are in a state, and of how many of them a report is expected.
create table group_states (
    "group"  text    not null,
    state    text    not null,
    devices  integer not null,
    expected integer not null,
    primary key ("group", state)
) strict, without rowid;

-- Kept for 30 days, also when the device is deleted.
create table state_changes (
    id        integer primary key autoincrement,
    at        integer not null,
    device_id text    not null,
    -- Null for a device that is evaluated for the first time.
    "from"    text,
    "to"      text    not null,
    reason    text
) strict;

create index idx_state_changes_at on state_changes (at);

-- Runs that devices have started. A row is looked at when `due_at` has come, and goes once its run is over.
create table run_starts (
    device      integer not null references devices (id) on delete cascade,
    job         text    not null,
    run_id      text    not null,
    received_at integer not null,
    timestamp   integer,
    due_at      integer,
    primary key (device, job, run_id)
) strict, without rowid;

create index idx_run_starts_due_at on run_starts (due_at) where due_at is not null;

create table incidents (
    id                 integer primary key autoincrement,
    -- 'device', 'group' or 'fleet', and which of them.
    scope              text    not null,
    subject            text    not null,
    -- The group to which the subject belongs; empty for none.
    "group"            text    not null,
    kind               text    not null,
    severity           text    not null,
    since              integer not null,
    opened_at          integer not null,
    resolved_at        integer,
    resolution         text,
    acknowledged_at    integer,
    acknowledged_by    text,
    acknowledged_until integer,
    acknowledged_note  text,
    reopened           integer not null default 0,
    -- The reopenings of the last 24 hours, as a JSON array.
    reopenings         text    not null default '[]',
    flapping_since     integer,
    -- When it may be resolved, if nothing happens before.
    calm_at            integer,
    -- When it must be looked at again.
    next_at            integer,
    -- Figures for people, as a JSON object.
    summary            text    not null default '{}'
) strict;

create unique index idx_incidents_open on incidents (scope, subject, kind) where resolved_at is null;
create index idx_incidents_subject on incidents (scope, subject, kind, id);
create index idx_incidents_opened_at on incidents (opened_at, id);
create index idx_incidents_resolved_at on incidents (resolved_at, id) where resolved_at is not null;
-- Lists of open and of resolved incidents, by what they can be asked for.
create index idx_incidents_open_listed on incidents (scope, kind, opened_at, id) where resolved_at is null;
create index idx_incidents_over_listed on incidents (scope, kind, opened_at, id) where resolved_at is not null;
create index idx_incidents_group on incidents ("group", scope, kind, opened_at, id) where resolved_at is null;
create index idx_incidents_over_subject on incidents (scope, subject, kind, opened_at, id) where resolved_at is not null;
create index idx_incidents_over_group on incidents ("group", scope, kind, opened_at, id) where resolved_at is not null;
create index idx_incidents_next_at on incidents (next_at) where resolved_at is null and next_at is not null;

-- The devices that an incident of a group or of the fleet is about.
create table incident_members (
    incident  integer not null references incidents (id) on delete cascade,
    device_id text    not null,
    -- Their jobs, as a JSON array.
    jobs      text    not null,
    joined_at integer not null,
    left_at   integer,
    -- 1 while its report is only late.
    presumed  integer not null,
    primary key (incident, device_id)
) strict, without rowid;

create index idx_incident_members_device on incident_members (device_id, incident);

create table incident_entries (
    incident integer not null references incidents (id) on delete cascade,
    id       integer not null,
    at       integer not null,
    what     text    not null,
    "by"     text,
    -- A JSON object.
    details  text    not null,
    primary key (incident, id)
) strict, without rowid;

-- The most devices of a group that were in a state at once, within an hour and a day.
alter table group_hours add column most_failing integer not null default 0;
alter table group_hours add column most_silent integer not null default 0;
alter table group_hours add column most_degraded integer not null default 0;
alter table group_days add column most_failing integer not null default 0;
alter table group_days add column most_silent integer not null default 0;
alter table group_days add column most_degraded integer not null default 0;

-- The scope `operate` comes to the keys. SQLite cannot change a check, so the table is made anew.
create table api_keys_with_operate (
    id         integer primary key autoincrement,
    -- SHA-256 of the key; the key itself is kept nowhere.
    hash       blob    not null unique,
    -- Its first characters, by which a person tells keys apart.
    hint       text    not null,
    name       text,
    scope      text    not null check (scope in ('ingest', 'read', 'operate', 'admin')),
    device_id  text,
    "group"    text,
    created_at integer not null,
    expires_at integer,
    revoked_at integer,
    -- To the hour.
    last_used  integer,
    check (scope = 'ingest' or (device_id is null and "group" is null))
) strict;
insert into api_keys_with_operate
select id, hash, hint, name, scope, device_id, "group", created_at, expires_at, revoked_at, last_used from api_keys;
-- The id of a deleted key never comes back.
delete from sqlite_sequence where name = 'api_keys_with_operate';
insert into sqlite_sequence (name, seq) select 'api_keys_with_operate', seq from sqlite_sequence where name = 'api_keys';
drop table api_keys;
alter table api_keys_with_operate rename to api_keys;
