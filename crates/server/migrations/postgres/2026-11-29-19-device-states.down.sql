-- loses: nothing
-- What it drops is made from the other tables.
drop table device_states;
