-- loses: nothing
drop table ingest_state;
