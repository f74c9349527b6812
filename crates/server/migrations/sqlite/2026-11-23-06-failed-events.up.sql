-- Finds who failed within some hours, whatever else has happened in them. Sums by device go by the day, so that
-- hours are counted event by event; failures are few, and most are the newest: they go to the end of the index.
-- SQLite does not see that the last column need not be looked up in the rows, unless it is there.
create index idx_sync_events_failed on sync_events (timestamp, device, total_errors) where total_errors > 0;
