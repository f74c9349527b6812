-- The order of devices by their state, for lists. A sweep writes it with `device_health`.
create table device_states (
    device_id varchar(255) collate "C" primary key references devices (device_id) on delete cascade,
    -- 0 for the most urgent state: silent, failing, degraded, never, ok, paused.
    urgency   bigint not null,
    -- Milliseconds since 1970.
    since     bigint not null
);

insert into device_states
select device_id,
       case state when 'silent' then 0 when 'failing' then 1 when 'degraded' then 2 when 'never' then 3 when 'ok' then 4 else 5 end,
       floor(extract(epoch from since) * 1000)
  from device_health;

create index idx_device_states_urgency on device_states (urgency, since, device_id);
create index idx_device_states_since on device_states (since, device_id);
