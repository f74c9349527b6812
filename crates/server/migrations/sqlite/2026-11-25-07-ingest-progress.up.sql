-- When the tables refuse an event that was acknowledged, the events of its record are stored one by one. This is how
-- many of the record after `settled` are done, so that a crash in between stores none twice and leaves none out.
alter table ingest_state add column settled_events integer not null default 0;
