-- How far each import has come, kept in the transactions that store its events: one that was interrupted
-- goes on after them, and a file that was imported already is known again.

create table imports (
    -- Random.
    id         blob    not null primary key,
    -- What the input was called.
    name       text    not null,
    -- SHA-256 over its first records, by which it is recognised.
    head       blob    not null,
    -- Records taken so far, and SHA-256 over all of them.
    records    integer not null,
    digest     blob    not null,
    -- Those of them that were wrong and not stored.
    rejected   integer not null,
    finished   integer not null,
    updated_at integer not null
) strict, without rowid;
