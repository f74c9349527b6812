drop table device_states;
