-- Who may do what, and who did what. Small tables: no request reads them, servers hold the keys in memory.

create table api_keys (
    id         bigint generated always as identity primary key,
    -- SHA-256 of the key; the key itself is kept nowhere.
    hash       bytea not null unique,
    -- Its first characters, by which a person tells keys apart.
    hint       text not null,
    name       text,
    scope      text not null check (scope in ('ingest', 'read', 'admin')),
    device_id  varchar(255) collate "C",
    "group"    text collate "C",
    created_at timestamptz not null,
    expires_at timestamptz,
    revoked_at timestamptz,
    last_used  timestamptz,
    check (scope = 'ingest' or (device_id is null and "group" is null))
);

comment on column api_keys.last_used is 'to the hour';

-- One row that every change of a key counts up: how servers notice it.
create table api_key_changes (
    version bigint not null
);
insert into api_key_changes values (0);

create table audit_log (
    id      bigint generated always as identity primary key,
    at      timestamptz not null,
    via     text not null,
    key_id  bigint,
    address text,
    action  text not null,
    subject text not null,
    details text not null
);

comment on column audit_log.via is 'how whoever did it came in: key, local, open or command line';
comment on column audit_log.details is 'a JSON object';

create function audit_log_is_append_only() returns trigger language plpgsql as $$
begin
    raise exception 'audit_log is append-only';
end
$$;
create trigger audit_log_is_append_only before update or delete or truncate on audit_log
    for each statement execute function audit_log_is_append_only();
