-- Events are acknowledged once they are in the ingest journal, two files beside this one, and are brought into
-- the tables many at a time. This is how far that has come.

create table ingest_state (
    id      integer primary key check (id = 1),
    -- Whose journal this database goes on with. A copy gets another number, so that it never takes a journal
    -- for its own that was written for what it was copied from.
    journal integer not null,
    -- Records of the journal up to this one are in the tables.
    settled integer not null
) strict;

insert into ingest_state (id, journal, settled) values (1, random(), 0);
