-- loses: nothing
alter table ingest_state drop column journal_in_use;
