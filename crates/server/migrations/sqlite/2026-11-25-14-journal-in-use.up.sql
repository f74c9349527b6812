-- Whether a server has its ingest journal open, or had it when it was killed: then the files must be there, and whoever
-- finds none knows that acknowledged events are missing.
alter table ingest_state add column journal_in_use integer not null default 0;
