-- loses: figures by day and hour of events that are no longer kept
-- loses: the events' event_id, and with it the knowledge which of them were sent before
alter table sync_events drop column event_id;
drop table event_keys;
drop table roll_up_state;
drop table fleet_hours;
drop table device_days;
