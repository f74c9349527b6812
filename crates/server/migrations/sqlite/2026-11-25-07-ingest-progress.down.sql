-- loses: nothing
alter table ingest_state drop column settled_events;
