-- loses: figures by day and hour of events that are no longer kept
drop table roll_up_state;
drop table fleet_hours;
drop table device_days;
