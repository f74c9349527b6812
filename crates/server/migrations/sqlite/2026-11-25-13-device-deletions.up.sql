-- Devices that are being deleted, a part at a time. A device stays in sight until its last part goes, so that
-- an interrupted deletion can go on.

create table device_deletions (
    device_id      text    not null primary key,
    -- Events received until then go with the device; what it reports later stays.
    received_until integer not null,
    -- Who asked for it, and when, for the audit log.
    requested_at   integer not null,
    via            text    not null,
    key_id         integer,
    address        text,
    -- How many of its events are gone.
    deleted_events integer not null
) strict, without rowid;
