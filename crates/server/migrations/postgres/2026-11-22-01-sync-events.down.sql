-- loses: every device and every sync event
drop table sync_events;
drop table device_jobs;
drop table devices;
