-- The order of devices by their state, for lists. A sweep writes it with `device_health`.
create table device_states (
    device    integer primary key references devices (id) on delete cascade,
    device_id text    not null,
    -- 0 for the most urgent state: silent, failing, degraded, never, ok, paused.
    urgency   integer not null,
    since     integer not null
) strict;

insert into device_states
select h.device, d.device_id,
       case h.state when 'silent' then 0 when 'failing' then 1 when 'degraded' then 2 when 'never' then 3 when 'ok' then 4 else 5 end,
       h.since
  from device_health h
  join devices d on d.id = h.device;

create index idx_device_states_urgency on device_states (urgency, since, device_id);
create index idx_device_states_since on device_states (since, device_id);
