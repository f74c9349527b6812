-- loses: nothing
drop index idx_sync_events_failed;
