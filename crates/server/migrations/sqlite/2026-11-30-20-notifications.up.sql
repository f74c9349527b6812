-- Notifications: who is told of incidents, by which channels, and what waits to be sent.

-- Where messages go.
create table channels (
    id            integer primary key autoincrement,
    name          text    not null unique,
    -- 'webhook', 'slack', 'discord', 'teams', 'ntfy', 'telegram' or 'email'.
    kind          text    not null,
    -- What may be shown, as a JSON object.
    config        text    not null,
    -- What may not, encrypted; null until it was stored.
    secrets       blob,
    is_enabled    integer not null,
    -- 1 when it gets what no route matches.
    is_default    integer not null,
    template      text,
    created_at    integer not null,
    -- Attempts that failed since the last one that did not.
    failures      integer not null default 0,
    failing_since integer,
    last_error    text,
    -- Nothing is sent before.
    next_send_at  integer,
    -- Who sends at present, and until when nobody else may.
    lease         text,
    leased_until  integer
) strict;

-- Which incidents go where, in this order.
create table routes (
    position integer primary key,
    -- A JSON object.
    route    text    not null
) strict;

create table notify_state (
    id      integer primary key check (id = 1),
    -- Every change of a channel or of the routes counts it up.
    version integer not null default 0
) strict;

insert into notify_state (id) values (1);

-- Messages that are to be sent, or were.
create table notifications (
    id              integer primary key autoincrement,
    channel         integer not null references channels (id) on delete cascade,
    -- What is told together: 'incidents', 'digest' or 'test', and the group.
    kind            text    not null,
    "group"         text    not null,
    -- 'pending', 'sent', 'failed' or 'dropped'.
    state           text    not null,
    created_at      integer not null,
    due_at          integer not null,
    -- When its text was made. From then on it stays as it is.
    frozen_at       integer,
    content_type    text,
    body            blob,
    -- What is sent instead when the receiver does not understand it.
    plain           blob,
    attempts        integer not null default 0,
    -- How often the receiver did not want it.
    refusals        integer not null default 0,
    last_attempt_at integer,
    last_error      text,
    ended_at        integer
) strict;

create unique index idx_notifications_bundle on notifications (channel, kind, "group")
    where state = 'pending' and frozen_at is null;
create index idx_notifications_due on notifications (channel, due_at, id) where state = 'pending';
create index idx_notifications_listed on notifications (channel, state, id);
create index idx_notifications_state on notifications (state, id);
create index idx_notifications_ended_at on notifications (ended_at) where ended_at is not null;

create table notification_items (
    notification integer not null references notifications (id) on delete cascade,
    incident     integer not null references incidents (id) on delete cascade,
    -- 'opened', 'reopened', 'reminder', 'flapping' or 'resolved'.
    what         text    not null,
    at           integer not null,
    primary key (notification, incident, what)
) strict, without rowid;

create index idx_notification_items_incident on notification_items (incident, notification);
