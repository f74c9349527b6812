-- Takes back a take-over of the Node service's database: its tables again, with its names, and all rows in
-- them that they can hold. Times are given back in the time zone in which they were read.
-- loses: the job, duration, bytes and metadata of events
-- loses: names and groups of devices
-- loses: figures of events that are no longer kept (RETENTION_DAYS)
-- loses: of times in an hour that a clock set back had twice, which of the two it was
select set_config('TimeZone', source_timezone, true) from pisync_take_over;

create temporary table given_grants on commit drop as
select format('grant %s on %s %I to %s%s', privilege_type,
              case relkind when 'S' then 'sequence' else 'table' end, relname,
              case grantee when 0 then 'public' else quote_ident(pg_get_userbyid(grantee)) end,
              case when is_grantable then ' with grant option' else '' end) as statement
  from pg_class, aclexplode(relacl)
 where oid in ('devices'::regclass, 'sync_events'::regclass)
   and grantee <> relowner;

do $$
begin
    if exists (select from sync_events where id > 2147483647) then
        raise exception 'there are events with ids above 2147483647, which the Node service''s tables cannot hold';
    end if;
end
$$;

create table given_devices (
    id         integer not null,
    device_id  varchar(255) not null,
    created_at timestamp default current_timestamp,
    updated_at timestamp default current_timestamp
);
insert into given_devices select id, device_id, created_at, updated_at from devices;

create table given_sync_events (
    id                 integer not null,
    device_id          varchar(255) not null,
    timestamp          timestamp not null,
    total_files_synced integer not null default 0,
    total_errors       integer not null default 0,
    internet_speed     decimal(10, 2),
    created_at         timestamp default current_timestamp,
    updated_at         timestamp default current_timestamp
);
insert into given_sync_events
select id, device_id, timestamp, total_files_synced, total_errors, internet_speed, created_at, updated_at
  from sync_events;

alter sequence devices_id_seq owned by none;
alter sequence sync_events_id_seq owned by none;
drop table sync_events;
drop table device_jobs;
drop table devices;
drop table pisync_take_over;

alter table given_devices rename to devices;
alter table given_sync_events rename to sync_events;
alter sequence devices_id_seq as integer owned by devices.id;
alter sequence sync_events_id_seq as integer owned by sync_events.id;
alter table devices
    alter id set default nextval('devices_id_seq'),
    add constraint devices_pkey primary key (id),
    add constraint devices_device_id_key unique (device_id);
alter table sync_events
    alter id set default nextval('sync_events_id_seq'),
    add constraint sync_events_pkey primary key (id),
    add constraint sync_events_device_id_fkey
        foreign key (device_id) references devices (device_id) on delete cascade;
create index idx_sync_events_device_id on sync_events (device_id);
create index idx_sync_events_timestamp on sync_events (timestamp);
create index idx_sync_events_created_at on sync_events (created_at);

-- The function is theirs, and still there unless somebody has dropped it.
do $do$
begin
    if to_regprocedure('update_updated_at_column()') is null then
        create function update_updated_at_column() returns trigger as $$
        begin
            new.updated_at = current_timestamp;
            return new;
        end;
        $$ language plpgsql;
    end if;
end
$do$;
create trigger update_devices_updated_at before update on devices
    for each row execute function update_updated_at_column();
create trigger update_sync_events_updated_at before update on sync_events
    for each row execute function update_updated_at_column();

do $$
declare
    statement text;
begin
    for statement in select given_grants.statement from given_grants loop
        execute statement;
    end loop;
end
$$;
