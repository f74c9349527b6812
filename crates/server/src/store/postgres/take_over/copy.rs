//! The steps of taking over, within the one transaction. `run` calls them in order. They must never commit.

use std::collections::BTreeSet;

use jiff::civil::Date;
use pisync_core::{LONGEST_LEAD, Timestamp};
use tokio_postgres::{Error, Transaction};

use super::{
    report::Progress,
    survey::{TAKE_OVER_TABLE, column},
};
use crate::store::{
    Sums,
    migrations::embedded_for_postgres,
    postgres::{
        aggregated_events,
        migrations::{CREATE_TABLE, run},
        partitions::{Partition, months_ahead},
        roll_ups, summaries,
        verify::{job_columns, recounted},
    },
};

/// The columns of an event in our table, with their sources in the Node service's table. $1 is the time zone.
const EVENT: &str = "
    id, device_id, timestamp, total_files_synced, total_errors, internet_speed, created_at, updated_at
";
const EVENT_READ: &str = "
    id, device_id, timestamp at time zone $1, total_files_synced, total_errors,
    nullif(internet_speed, 'NaN'), coalesce(created_at, timestamp) at time zone $1,
    coalesce(updated_at, created_at, timestamp) at time zone $1
";

/// Renames the Node service's tables, and makes ours with the migrations of an empty database.
pub(super) async fn make_tables(
    transaction: &Transaction<'_>,
    now: Timestamp,
) -> Result<(), Error> {
    /// Tables, their indexes and their sequences. Each is called `node_…` from here on.
    const PUT_ASIDE: &str = "
        do $$
        declare
            node constant regclass[] := array['devices', 'sync_events']::regclass[];
            relation record;
        begin
            for relation in
                select oid::regclass as name, relname, relkind
                  from pg_class
                 where oid = any (node)
                    or oid in (select indexrelid from pg_index where indrelid = any (node))
                    or oid in (
                           select objid from pg_depend
                            where classid = 'pg_class'::regclass and refclassid = 'pg_class'::regclass
                              and refobjid = any (node) and deptype in ('a', 'i'))
                   and relkind = 'S'
            loop
                execute format(
                    'alter %s %s rename to %I',
                    case relation.relkind when 'r' then 'table' when 'S' then 'sequence' else 'index' end,
                    relation.name, 'node_' || relation.relname);
            end loop;
        end
        $$
    ";
    /// The privileges of others on the tables, as statements that grant them on our tables.
    const GRANTS: &str = "
        select format('grant %s on %s %I to %s%s', privilege_type,
                      case relkind when 'S' then 'sequence' else 'table' end, relname,
                      case grantee when 0 then 'public' else quote_ident(pg_get_userbyid(grantee)) end,
                      case when is_grantable then ' with grant option' else '' end)
          from pg_class, aclexplode(relacl)
         where oid in (
                   'devices'::regclass, 'sync_events'::regclass,
                   to_regclass('devices_id_seq'), to_regclass('sync_events_id_seq'))
           and grantee <> relowner
    ";
    let grants = column(&transaction.query(GRANTS, &[]).await?)?;
    transaction.batch_execute(PUT_ASIDE).await?;
    transaction.batch_execute(CREATE_TABLE).await?;
    for migration in embedded_for_postgres() {
        run(transaction, &migration, 1, now).await?;
    }
    transaction.batch_execute(&grants.join(";\n")).await
}

/// Copies devices, then events month by month. Each month's table is filled without an index. It is indexed and checked
/// when it becomes a partition.
pub(super) async fn copy(
    transaction: &Transaction<'_>,
    time_zone: &str,
    now: Timestamp,
    report: &mut (dyn FnMut(&Progress<'_>) + Send),
) -> Result<(), Error> {
    const DEVICES: &str = "
        with node as (
            select *,
                   (select min(coalesce(event.created_at, event.timestamp))
                      from node_sync_events event
                     where event.device_id = device.device_id
                       and (device.created_at is null or device.updated_at is null)) as first_received,
                   (select max(coalesce(event.created_at, event.timestamp))
                      from node_sync_events event
                     where event.device_id = device.device_id and device.updated_at is null) as last_received
              from node_devices device
        )
        insert into devices (id, device_id, created_at, updated_at)
        select id, device_id,
               coalesce(coalesce(created_at, first_received, updated_at) at time zone $1, $2),
               coalesce(coalesce(updated_at, last_received, created_at) at time zone $1, $2)
          from node
    ";
    const MONTHS: &str = "
        select distinct (date_trunc('month', coalesce(created_at, timestamp) at time zone $1, 'UTC')
                         at time zone 'UTC')::date
          from node_sync_events
    ";
    transaction.execute(DEVICES, &[&time_zone, &now.to_jiff()]).await?;
    let months = transaction.query(MONTHS, &[&time_zone]).await?;
    let months = months.iter().map(|row| row.try_get(0)).collect::<Result<BTreeSet<Date>, _>>()?;
    // Clients that wait for the tables find partitions for new events.
    let months: BTreeSet<_> = months.into_iter().chain(months_ahead(now)).collect();
    let mut so_far = 0;
    for partition in months.into_iter().filter_map(Partition::of) {
        transaction.batch_execute(&partition.create()).await?;
        let events = fill(transaction, &partition, time_zone).await?;
        transaction.batch_execute(&partition.attach()).await?;
        so_far += events;
        if events > 0 {
            report(&Progress::Copied { month: partition.month(), events, so_far });
        }
    }
    Ok(())
}

/// Copies the events of a month into its table.
async fn fill(
    transaction: &Transaction<'_>,
    partition: &Partition,
    time_zone: &str,
) -> Result<u64, Error> {
    let (first, end) = partition.bounds();
    let table = &partition.table;
    // The first two conditions use the index on created_at. They reach one day further, because the beginning of a
    // month may be a time that a clock had twice.
    let fill = format!(
        "insert into {table} ({EVENT})
         select {EVENT_READ}
           from node_sync_events
          where created_at >= ('{first}'::timestamptz at time zone $1) - interval '1 day'
            and created_at < ('{end}'::timestamptz at time zone $1) + interval '1 day'
            and created_at at time zone $1 >= '{first}'
            and created_at at time zone $1 < '{end}'
         union all
         select {EVENT_READ}
           from node_sync_events
          where created_at is null
            and timestamp at time zone $1 >= '{first}'
            and timestamp at time zone $1 < '{end}'"
    );
    transaction.execute(&fill, &[&time_zone]).await
}

/// Counts the figures that ingest and the background task would have kept up to date.
pub(super) async fn count_figures(
    transaction: &Transaction<'_>,
    now: Timestamp,
    report: &mut (dyn FnMut(&Progress<'_>) + Send),
) -> Result<(), Error> {
    report(&Progress::Counting);
    // Gives the planner statistics for the next queries.
    transaction.batch_execute("analyze devices, sync_events").await?;
    let count = format!(
        "insert into device_jobs ({}) select * from ({}) jobs",
        job_columns(),
        recounted("true", "$1")
    );
    let latest = now.saturating_add_milliseconds(LONGEST_LEAD).to_jiff();
    transaction.execute(&count, &[&latest]).await?;
    report(&Progress::Aggregating);
    roll_ups::aggregate_between(transaction, Timestamp::MIN, roll_ups::final_until(now)).await?;
    transaction.batch_execute(&summaries::rebuild_statements()).await?;
    transaction
        .batch_execute("analyze device_jobs, device_days, fleet_hours, device_summaries")
        .await
}

/// Continues ids where the Node service ended, drops its tables, and records that they were here.
pub(super) async fn finish(
    transaction: &Transaction<'_>,
    time_zone: &str,
    now: Timestamp,
) -> Result<(), Error> {
    for table in ["devices", "sync_events"] {
        // Ids of deleted rows are not assigned again either.
        let set_sequence = format!(
            "select setval('{table}_id_seq', greatest(last, 1), last > 0)
               from (
                   select greatest(
                              (select max(id) from node_{table}),
                              pg_sequence_last_value(pg_get_serial_sequence('node_{table}', 'id')),
                              0
                          ) as last
               ) ids"
        );
        transaction.execute(&set_sequence, &[]).await?;
    }
    let remember = format!(
        "drop table node_sync_events;
         drop table node_devices;
         create table {TAKE_OVER_TABLE} (
             id              integer primary key check (id = 1),
             source_timezone text not null,
             taken_over_at   timestamptz not null
         );
         comment on table {TAKE_OVER_TABLE} is
             'the Node service made this database; its times were read in this time zone'"
    );
    let insert = format!("insert into {TAKE_OVER_TABLE} values (1, $1, $2)");
    transaction.batch_execute(&remember).await?;
    transaction.execute(&insert, &[&time_zone, &now.to_jiff()]).await?;
    Ok(())
}

/// Copies up to `most` events into tables of this session, in our form, and sums them up by day. Answers how many
/// events there were, and how many bytes they take.
pub(super) async fn sample(
    transaction: &Transaction<'_>,
    time_zone: &str,
    most: i64,
) -> Result<(u64, u64), Error> {
    let make = format!(
        "create temporary table sample_events (
             id bigint, device_id varchar(255) collate \"C\", timestamp timestamptz,
             total_files_synced integer, total_errors integer, internet_speed numeric(10, 2),
             created_at timestamptz, updated_at timestamptz
         ) on commit drop;
         create temporary table sample_days (
             device_id varchar(255) collate \"C\", day date, {}, primary key (device_id, day)
         ) on commit drop",
        Sums::sql(|column| format!("{column} bigint"))
    );
    const INDEX: &str =
        "alter table sample_events add primary key (device_id, timestamp, id, created_at)";
    const SIZE: &str =
        "select pg_total_relation_size('sample_events') + pg_total_relation_size('sample_days')";
    let fill = format!(
        "insert into sample_events ({EVENT}) select {EVENT_READ} from sync_events limit $2"
    );
    transaction.batch_execute(&make).await?;
    let sampled = transaction.execute(&fill, &[&time_zone, &most]).await?;
    transaction.batch_execute(INDEX).await?;
    let sum_up = format!(
        "insert into sample_days
         select device_id, (timestamp at time zone 'UTC')::date, {}
           from sample_events
          group by 1, 2",
        aggregated_events::event_sums()
    );
    transaction.batch_execute(&sum_up).await?;
    let bytes: i64 = transaction.query_one(SIZE, &[]).await?.try_get(0)?;
    Ok((sampled, bytes.cast_unsigned()))
}
