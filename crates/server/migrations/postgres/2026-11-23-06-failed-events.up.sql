-- Finds who failed within some hours, whatever else has happened in them. Sums by device go by the day, so that
-- hours are counted event by event; failures are few, and most are the newest: they go to the end of the index.
-- When they were received tells in which months to look, and need not be looked up in the rows.
create index idx_sync_events_failed on sync_events (timestamp, device_id) include (created_at)
 where total_errors > 0;
