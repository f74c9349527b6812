//! The Node service's database: its tables as its own migration made them, rows as it left them, and what
//! there is to see of them.

use pisync::store::Target;
use tokio_postgres::Client;

use super::{postgres::connect, server::unused_address, store::TestDatabase};

/// What the Node service's own migration made.
pub(crate) const SCHEMA: &str = "
    create table devices (
        id serial primary key,
        device_id varchar(255) unique not null,
        created_at timestamp default current_timestamp,
        updated_at timestamp default current_timestamp
    );
    create table sync_events (
        id serial primary key,
        device_id varchar(255) not null references devices (device_id) on delete cascade,
        timestamp timestamp not null,
        total_files_synced integer not null default 0,
        total_errors integer not null default 0,
        internet_speed decimal(10, 2),
        created_at timestamp default current_timestamp,
        updated_at timestamp default current_timestamp
    );
    create index idx_sync_events_device_id on sync_events (device_id);
    create index idx_sync_events_timestamp on sync_events (timestamp);
    create index idx_sync_events_created_at on sync_events (created_at);
    create function update_updated_at_column() returns trigger as $$
    begin
        new.updated_at = current_timestamp;
        return new;
    end;
    $$ language plpgsql;
    create trigger update_devices_updated_at before update on devices
        for each row execute function update_updated_at_column();
    create trigger update_sync_events_updated_at before update on sync_events
        for each row execute function update_updated_at_column();
    create table migrations (
        id serial primary key,
        filename varchar(255) unique not null,
        executed_at timestamp default current_timestamp
    );
    insert into migrations (filename) values ('001_create_devices_and_sync_events_tables.js');
";

/// A device or two.
pub(crate) const FEW_EVENTS: &str = "
    insert into devices (device_id) values ('pi-1'), ('pi-2');
    insert into sync_events (device_id, timestamp, total_errors, internet_speed)
    values ('pi-1', '2025-06-17 10:30:00', 2, 45.6), ('pi-2', '2025-06-17 10:31:00', 0, null);
";

/// Everything that makes the Node service's tables what they are, by its name.
const DESCRIBE: &str = "
    select string_agg(line, E'\\n' order by line)
      from (
          select format('%s.%s %s %s %s null: %s, default: %s', table_name, ordinal_position, column_name,
                        data_type, coalesce(character_maximum_length, numeric_precision), is_nullable,
                        column_default)
            from information_schema.columns
           where table_schema = 'public' and table_name in ('devices', 'sync_events', 'migrations')
          union all
          select indexdef from pg_indexes
           where schemaname = 'public' and tablename in ('devices', 'sync_events', 'migrations')
          union all
          select format('%s %s %s', conrelid::regclass, conname, pg_get_constraintdef(oid))
            from pg_constraint where connamespace = 'public'::regnamespace
             and conrelid::regclass::text in ('devices', 'sync_events', 'migrations')
          union all select pg_get_triggerdef(oid) from pg_trigger where not tgisinternal
          union all
          select pg_get_functiondef(oid) from pg_proc where pronamespace = 'public'::regnamespace
          union all
          select format('%s as %s owned by %s', seqrelid::regclass, seqtypid::regtype, refobjid::regclass)
            from pg_sequence
            join pg_depend on classid = 'pg_class'::regclass and objid = seqrelid and deptype in ('a', 'i')
           where refobjid::regclass::text in ('devices', 'sync_events', 'migrations')
          union all
          select format('%s: %s', relname, privilege)
            from pg_class, unnest(relacl) as privilege
           where relname in ('devices', 'sync_events')
      ) as lines (line)
";

/// All rows, with the transactions that wrote them: the same row written again would be a change.
const ROWS: &str = "
    select concat(
        (select string_agg(concat(devices, xmin), ',' order by id) from devices),
        (select string_agg(concat(sync_events, xmin), ',' order by id) from sync_events),
        (select string_agg(concat(migrations, xmin), ',' order by id) from migrations))
";

/// A connection to a test's database. The time zone is one in which nothing happens.
pub(crate) async fn client_of(database: &TestDatabase) -> Client {
    let Target::Postgres(target) = &database.target else {
        panic!("the Node service had PostgreSQL")
    };
    let mut config = target.config.clone();
    config.options("-c timezone=UTC");
    connect(&config).await
}

/// The Node service's tables, without their rows.
pub(crate) async fn describe_tables(database: &TestDatabase) -> String {
    client_of(database).await.query_one(DESCRIBE, &[]).await.unwrap().get(0)
}

/// The Node service's tables and rows: the same text as long as nobody has touched anything.
pub(crate) async fn describe(database: &TestDatabase) -> String {
    let rows: String = client_of(database).await.query_one(ROWS, &[]).await.unwrap().get(0);
    describe_tables(database).await + &rows
}

/// A fleet's history of eight months, from January 2026 on: ties, reports that come late and out of order,
/// one failure in nine, devices that have failed for weeks, and devices that never reported.
pub(crate) fn history(devices: u32, events: u32) -> String {
    format!(
        "insert into devices (device_id, created_at, updated_at)
         select 'pi-' || n, timestamp '2026-01-01' + n * interval '1 second',
                timestamp '2026-08-31' + n * interval '1 second'
           from generate_series(1, {devices} + 3) n;
         insert into sync_events (
             device_id, timestamp, total_files_synced, total_errors, internet_speed, created_at, updated_at
         )
         select 'pi-' || device, dated, hash % 500,
                case when hash % 9 = 0 or (device % 20 = 0 and n > {events} * 0.9) then 1 + hash % 4 else 0 end,
                case when hash % 5 > 0 then (hash % 20000) / 100.0 end,
                received, received + interval '1 millisecond'
           from (
               select n, hash, 1 + hash % {devices} as device, received,
                      -- To the minute, so that some fall together; some reports are a day late.
                      date_trunc('minute', received) - case when hash % 31 = 0 then interval '1 day'
                                                            else interval '1 minute' end as dated
                 from (
                     select n, abs(hashint4(n)::bigint) as hash,
                            timestamp '2026-01-01' + n * (interval '240 days' / {events}) as received
                       from generate_series(1, {events}) n
                 ) numbered
           ) events;"
    )
}

/// What is odd about a database, after [`history`].
pub(crate) const ODD_ROWS: &str = r"
    update sync_events set created_at = null where id % 701 = 0;
    update sync_events set created_at = null, timestamp = '2024-02-29 12:00' where id = 12;
    alter table sync_events disable trigger update_sync_events_updated_at;
    update sync_events set updated_at = null where id % 503 = 0;
    update sync_events set internet_speed = -3 where id % 401 = 0;
    update sync_events set internet_speed = 'NaN' where id = 7;
    update sync_events set total_files_synced = -5 where id = 8;
    update sync_events set timestamp = '2099-01-01 00:00' where id = 9;
    update sync_events set created_at = '2098-12-31 23:59' where id in (9, 10);
    alter table sync_events enable trigger update_sync_events_updated_at;
    alter table devices disable trigger update_devices_updated_at;
    update devices set created_at = null where id in (2, 3);
    update devices set updated_at = null where id in (3, 4);
    update devices set created_at = null, updated_at = null where device_id = (select max(device_id) from devices);
    alter table devices enable trigger update_devices_updated_at;
    insert into devices (device_id) values (''), (E'pi	tab'), ('pi ü/%'), (repeat('x', 255));
    insert into sync_events (device_id, timestamp, total_errors, created_at)
    select device_id, '2026-03-01 10:00', length(device_id) % 4, '2026-03-01 10:01'
      from devices where device_id not like 'pi-%';
    -- Ids that were given and are gone.
    insert into sync_events (device_id, timestamp) select 'pi-1', '2026-01-01' from generate_series(1, 5);
    delete from sync_events where id > (select max(id) - 5 from sync_events);
";

/// The settings of a Node service, in a file as its users have it.
pub(crate) fn node_settings(target: &Target) -> String {
    let Target::Postgres(target) = target else { panic!("the Node service had PostgreSQL only") };
    let config = &target.config;
    format!(
        "# Server\nPORT={}\nNODE_ENV=development\n\n# Database\nDB_HOST=localhost\nDB_PORT={}\n\
         DB_NAME={}\nDB_USER={}\nDB_PASSWORD=s3cret-word\n\nLOG_LEVEL=http\n",
        unused_address().port(),
        config.get_ports()[0],
        config.get_dbname().unwrap(),
        config.get_user().unwrap(),
    )
}
