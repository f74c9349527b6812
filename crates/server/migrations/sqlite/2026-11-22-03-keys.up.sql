-- Who may do what, and who did what. Small tables: no request reads them, servers hold the keys in memory.

create table api_keys (
    id         integer primary key autoincrement,
    -- SHA-256 of the key; the key itself is kept nowhere.
    hash       blob    not null unique,
    -- Its first characters, by which a person tells keys apart.
    hint       text    not null,
    name       text,
    scope      text    not null check (scope in ('ingest', 'read', 'admin')),
    device_id  text,
    "group"    text,
    created_at integer not null,
    expires_at integer,
    revoked_at integer,
    -- To the hour.
    last_used  integer,
    check (scope = 'ingest' or (device_id is null and "group" is null))
) strict;

-- One row that every change of a key counts up: how servers notice it.
create table api_key_changes (
    version integer not null
) strict;
insert into api_key_changes values (0);

create table audit_log (
    id      integer primary key autoincrement,
    at      integer not null,
    -- How whoever did it came in: 'key', 'local', 'open' or 'command line'.
    via     text    not null,
    key_id  integer,
    address text,
    action  text    not null,
    subject text    not null,
    -- A JSON object.
    details text    not null
) strict;

create trigger audit_log_is_not_changed before update on audit_log
begin
    select raise(abort, 'audit_log is append-only');
end;
create trigger audit_log_is_not_shortened before delete on audit_log
begin
    select raise(abort, 'audit_log is append-only');
end;
