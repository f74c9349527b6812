-- loses: nothing
drop table device_states;
