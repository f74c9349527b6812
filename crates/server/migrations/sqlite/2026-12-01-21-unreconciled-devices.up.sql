-- The devices from whose state incidents are still to be made. As a column of `device_health` it cost as much as the state: each
-- change of it changed every index.
create table unreconciled_devices (
    "group" text    not null,
    device  integer not null,
    -- The device's state.
    state   text    not null,
    primary key ("group", device)
) strict, without rowid;

insert into unreconciled_devices select "group", device, state from device_health where is_unreconciled = 1;

drop index idx_device_health_unreconciled;
alter table device_health drop column is_unreconciled;
