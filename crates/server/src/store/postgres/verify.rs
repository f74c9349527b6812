//! Recounts figures from raw events. A page of devices is counted in one snapshot; a repair is one short transaction
//! per device. `pisync verify` and `maintenance` call it. No request waits for a recount, so it has no time limit.

use std::collections::HashSet;

use async_trait::async_trait;
use deadpool_postgres::Transaction;
use pisync_core::{JobFigures, LONGEST_LEAD, Timestamp};
use tokio_postgres::{Error, IsolationLevel, Row, error::SqlState, types::ToSql};

use super::{
    aggregated_events::{self, watermark},
    connect::Object,
    digests,
    errors::store_error,
    expiry, groups,
    locks::ROLL_UP_LOCK,
    misdated,
    roll_ups::{self, sums},
    rows::{optional_time, time},
    state_tables::{self, WrongStates},
    statements::unanswered_failures,
    store::PostgresStore,
    summaries,
};
use crate::store::{
    DayDetails, StateDifferences, StoreError, SumDifference, SummaryDifferences, Sums,
    Verification, Verified, day_details, figure_columns,
    verify::{
        Counted, PAGE_DEVICES, Recount, SumRecount, devices_to_fill, devices_to_repair,
        page_length, repair_hour_statement,
    },
};

/// How many times the repair of a device is retried after a deadlock.
const RETRIES: u32 = 5;

/// The columns of `device_jobs`, in the order of [`recounted`].
pub(super) fn job_columns() -> String {
    format!("device_id, job, {}", figure_columns::job_columns().join(", "))
}

const NO_TIME_LIMIT: &str = "set local statement_timeout = 0";

/// A page: the devices after $1 up to $2, including those that are not registered. Null means no bound.
const PAGE: &str = "($1::text is null or device_id > $1) and ($2::text is null or device_id <= $2)";

/// The sums of the events that match `filter`, in the order of [`job_columns`]. Events dated after the parameter
/// `latest` change no streak. They are shown as the last event only if there are no others. A `received_at` after
/// `latest` is skipped in the same way; the last date replaces it.
pub(super) fn recounted(filter: &str, latest: &str) -> String {
    let (names, sums) = (Sums::names(), aggregated_events::named_event_sums());
    format!(
        "with counted as (
            select device_id, coalesce(job, '') as job,
                   {sums},
                   min(timestamp) as first_sync,
                   coalesce(max(timestamp) filter (where timestamp <= {latest}), max(timestamp)) as last_sync,
                   max(timestamp) filter (where timestamp <= {latest} and total_errors <= 0) as last_success,
                   max(timestamp) filter (where timestamp <= {latest} and total_errors > 0) as last_failure,
                   coalesce(max(created_at) filter (where created_at <= {latest}),
                            max(timestamp) filter (where timestamp <= {latest}), max(created_at))
                       as last_received
              from sync_events
             where {filter}
             group by device_id, coalesce(job, '')
         )
         select device_id, job, {names}, first_sync, last_sync, last_success, last_failure,
                case when last_failure >= coalesce(last_success, '-infinity')
                     then ({}) else 0 end as consecutive_failures,
                last_received
           from counted",
        unanswered_failures("counted")
    )
}

#[async_trait]
impl Verification for PostgresStore {
    async fn verify(
        &self,
        after: Option<&str>,
        now: Timestamp,
        repair: bool,
    ) -> Result<Verified, StoreError> {
        let latest = now.saturating_add_milliseconds(LONGEST_LEAD);
        // Not `call`, because a long history may take any time.
        self.call_unbounded(async |connection| {
            let verified = page(connection, after, latest).await.map_err(store_error)?;
            if repair {
                for device_id in devices_to_fill(&verified) {
                    fill_days(connection, &device_id).await.map_err(store_error)?;
                }
            }
            if repair && verified.raw_since.is_none() {
                for device_id in devices_to_repair(&verified) {
                    repair_device(connection, &device_id, latest).await.map_err(store_error)?;
                }
            }
            Ok(verified)
        })
        .await
    }

    async fn recount_misdated(&self, now: Timestamp) -> Result<u64, StoreError> {
        let latest = now.saturating_add_milliseconds(LONGEST_LEAD);
        self.call_unbounded(async |connection| {
            misdated::recount(connection, latest).await.map_err(store_error)
        })
        .await
    }

    async fn verify_hours(&self) -> Result<Vec<SumDifference>, StoreError> {
        self.call_unbounded(async |connection| hours(connection).await.map_err(store_error)).await
    }

    async fn verify_summaries(
        &self,
        now: Timestamp,
        repair: bool,
    ) -> Result<SummaryDifferences, StoreError> {
        let compare = async |connection: &mut Object| {
            summary_differences(connection, now).await.map_err(store_error)
        };
        let (found, wrong_states) = self.call_unbounded(compare).await?;
        if repair {
            let make_good = async |connection: &mut Object| {
                repair_summaries(connection, &found, now).await.map_err(store_error)?;
                state_tables::make_good(connection, &wrong_states).await.map_err(store_error)
            };
            self.call_unbounded(make_good).await?;
        }
        Ok(found)
    }

    async fn correct_states(&self) -> Result<StateDifferences, StoreError> {
        self.call_unbounded(async |connection| {
            let snapshot = snapshot(connection).await.map_err(store_error)?;
            let wrong = state_tables::differences(&snapshot).await.map_err(store_error)?;
            drop(snapshot);
            state_tables::make_good(connection, &wrong).await.map_err(store_error)?;
            Ok(wrong.number())
        })
        .await
    }

    async fn repair_hour(&self, seen: &SumDifference) -> Result<bool, StoreError> {
        self.call(async |connection| repair_hour(connection, seen).await).await
    }
}

/// Recounts the page of devices after `after`. No event can be dated after `latest`.
async fn page(
    connection: &mut Object,
    after: Option<&str>,
    latest: Timestamp,
) -> Result<Verified, Error> {
    const DEVICES: &str = "
        select d.device_id,
               (select coalesce(sum(total_syncs), 0)::bigint
                  from device_jobs j where j.device_id = d.device_id)
          from devices d
         where $1::text is null or d.device_id > $1
         order by d.device_id
         limit $2
    ";
    let stored = format!("select {} from device_jobs where {PAGE}", job_columns());
    let snapshot = snapshot(connection).await?;
    let devices = snapshot.query(DEVICES, &[&after, &i64::from(PAGE_DEVICES)]).await?;
    let events: Vec<i64> = devices.iter().map(|row| row.try_get(1)).collect::<Result<_, _>>()?;
    let length = page_length(events.into_iter()).min(devices.len());
    let is_last = length == devices.len() && devices.len() < PAGE_DEVICES as usize;
    let next: Option<String> = match devices.get(length.saturating_sub(1)) {
        Some(row) if !is_last => row.try_get(0)?,
        _ => None,
    };

    let mut being_deleted = HashSet::new();
    let deletions = format!("select device_id from device_deletions where {PAGE}");
    for row in snapshot.query(&deletions, &[&after, &next]).await? {
        being_deleted.insert(row.try_get::<_, String>(0)?);
    }
    let stays = |row: &Row, column| -> Result<bool, Error> {
        let device_id: &str = row.try_get(column)?;
        Ok(!being_deleted.contains(device_id))
    };
    let mut leaving = 0;
    for device in &devices[..length] {
        leaving += u64::from(!stays(device, 0)?);
    }

    let mut figures = Recount::default();
    for row in snapshot.query(&stored, &[&after, &next]).await? {
        if stays(&row, 0)? {
            figures.stored(row.try_get(0)?, row.try_get(1)?, job_figures(&row)?);
        }
    }
    let recounted = recounted(PAGE, "$3");
    for row in snapshot.query(&recounted, &[&after, &next, &latest.to_jiff()]).await? {
        if !stays(&row, 0)? {
            continue;
        }
        figures.recounted(row.try_get(0)?, row.try_get(1)?, job_figures(&row)?);
    }
    let names = Sums::names();
    let stored_days = format!(
        "select {names}, day::timestamp at time zone 'UTC', device_id, {} from device_days where {PAGE}",
        day_details::names()
    );
    let recounted_days = roll_ups::recounted_days(&format!("created_at <= $3 and {PAGE}"));
    let watermark = watermark(&snapshot).await?;
    let mut days = SumRecount::default();
    for row in snapshot.query(&stored_days, &[&after, &next]).await? {
        if stays(&row, Sums::COUNT + 1)? {
            days.stored(row.try_get(Sums::COUNT + 1)?, begins(&row)?, day(&row)?);
        }
    }
    for row in snapshot.query(&recounted_days, &[&after, &next, &watermark]).await? {
        if stays(&row, Sums::COUNT + 1)? {
            days.recounted(row.try_get(Sums::COUNT + 1)?, begins(&row)?, day(&row)?);
        }
    }
    let raw_since = expiry::raw_since(&snapshot).await?;
    let unfilled_days = days.unfilled();
    Ok(Verified {
        devices: length as u64 - leaving,
        being_deleted: leaving,
        events: figures.events(),
        differences: figures.differences(raw_since.is_none()),
        days: days.differences(raw_since.is_none()),
        unfilled_days,
        raw_since,
        // Here events carry the device's name.
        nameless_devices: 0,
        next,
    })
}

/// Fills the details of a device's days that an earlier version aggregated, where all events of the day are kept.
async fn fill_days(connection: &mut Object, device_id: &str) -> Result<(), Error> {
    let set = day_details::COLUMNS.map(|column| format!("{column} = counted.{column}")).join(", ");
    let (names, details) = (Sums::names(), day_details::names());
    let (stored, recounted) = (
        Sums::sql(|column| format!("stored.{column}")),
        Sums::sql(|column| format!("counted.{column}")),
    );
    let fill = format!(
        "update device_days stored set {set}
           from ({}) counted ({names}, begins, device_id, {details})
          where stored.device_id = $1 and stored.duration_count is null
            and stored.day = (counted.begins at time zone 'UTC')::date and ({stored}) = ({recounted})",
        roll_ups::recounted_days("device_id = $1 and created_at <= $2")
    );
    let transaction = connection.transaction().await?;
    transaction.batch_execute(NO_TIME_LIMIT).await?;
    let watermark = aggregated_events::lock_state(&transaction).await?;
    let watermark = watermark.unwrap_or(Timestamp::MIN).to_jiff();
    transaction.execute(&fill, &[&device_id, &watermark]).await?;
    transaction.commit().await
}

/// Replaces a device's figures with the sums of its events. Registers the device if it is missing.
async fn repair_device(
    connection: &mut Object,
    device_id: &str,
    latest: Timestamp,
) -> Result<(), Error> {
    let mut attempt = 0;
    loop {
        match try_repair(connection, device_id, latest).await {
            Err(error)
                if error.code() == Some(&SqlState::T_R_DEADLOCK_DETECTED) && attempt < RETRIES =>
            {
                attempt += 1;
            }
            result => return result,
        }
    }
}

async fn try_repair(
    connection: &mut Object,
    device_id: &str,
    latest: Timestamp,
) -> Result<(), Error> {
    const REGISTER_DEVICE: &str = "
        insert into devices (device_id, created_at, updated_at)
        select $1::text, min(created_at), max(created_at)
          from sync_events
         where device_id = $1 and not exists (select from devices where device_id = $1)
        having count(*) > 0
            on conflict (device_id) do nothing
    ";
    const LOCK_DEVICE: &str = "select from devices where device_id = $1 for key share";
    // Inserts empty figures, so that there is a row to lock. A server that stores the job's first event at the same
    // moment has inserted its row, or waits for ours.
    let add_jobs = format!(
        "insert into device_jobs (
             device_id, job, {}, first_sync, last_sync, consecutive_failures, last_received
         )
         select device_id, coalesce(job, ''), {}, min(timestamp), min(timestamp), 0, min(created_at)
           from sync_events
          where device_id = $1
          group by device_id, coalesce(job, '')
          order by device_id, coalesce(job, '')
             on conflict (device_id, job) do nothing",
        Sums::names(),
        Sums::sql(|_| "0".to_owned())
    );
    const LOCK_JOBS: &str =
        "select job from device_jobs where device_id = $1 order by job for update";
    const REMOVE_JOBS: &str = "
        delete from device_jobs stored
         where device_id = $1
           and job = any($2::text[])
           and not exists (
               select from sync_events event
                where event.device_id = $1 and coalesce(event.job, '') = stored.job
           )
    ";
    let sums = Sums::sql(|column| format!("{column} = recounted.{column}"));
    let write_figures = format!(
        "update device_jobs stored
            set {sums},
                first_sync = recounted.first_sync,
                last_sync = recounted.last_sync,
                last_success = recounted.last_success,
                last_failure = recounted.last_failure,
                consecutive_failures = recounted.consecutive_failures,
                last_received = recounted.last_received
           from ({}) recounted
          where stored.device_id = $1 and stored.job = any($2::text[]) and stored.job = recounted.job",
        recounted("device_id = $1", "$3")
    );

    let transaction = connection.transaction().await?;
    transaction.batch_execute(NO_TIME_LIMIT).await?;
    let watermark = aggregated_events::lock_state(&transaction).await?;
    transaction.execute(REGISTER_DEVICE, &[&device_id]).await?;
    // Locks in the same order as servers: the device, then its jobs.
    if transaction.query_opt(LOCK_DEVICE, &[&device_id]).await?.is_none() {
        // Another session has deleted it meanwhile.
        return Ok(());
    }
    transaction.execute(&add_jobs, &[&device_id]).await?;
    let locked = transaction.query(LOCK_JOBS, &[&device_id]).await?;
    let jobs: Vec<&str> = locked.iter().map(|row| row.try_get(0)).collect::<Result<_, _>>()?;
    // Later statements see what others committed before we got the locks. Later transactions wait. A job that another
    // server has added since must not be changed.
    transaction.execute(REMOVE_JOBS, &[&device_id, &jobs]).await?;
    let latest = latest.to_jiff();
    transaction.execute(&write_figures, &[&device_id, &jobs, &latest]).await?;
    misdated::note_set_aside(&transaction, device_id, latest).await?;
    summaries::note_stale(&transaction, device_id).await?;
    roll_ups::aggregate_days_again(&transaction, device_id, watermark).await?;
    transaction.commit().await
}

/// Recounts the fleet's hours from all aggregated events, as of one moment.
async fn hours(connection: &mut Object) -> Result<Vec<SumDifference>, Error> {
    let snapshot = snapshot(connection).await?;
    let watermark = watermark(&snapshot).await?;
    let mut hours = SumRecount::default();
    let names = Sums::names();
    for row in snapshot.query(&format!("select {names}, hour from fleet_hours"), &[]).await? {
        hours.stored(None, begins(&row)?, Counted::of_hour(sums(&row)?));
    }
    for row in snapshot.query(&roll_ups::recounted_hours("created_at <= $1"), &[&watermark]).await?
    {
        hours.recounted(None, begins(&row)?, Counted::of_hour(sums(&row)?));
    }
    Ok(hours.differences(expiry::raw_since(&snapshot).await?.is_none()))
}

async fn summary_differences(
    connection: &mut Object,
    now: Timestamp,
) -> Result<(SummaryDifferences, WrongStates), Error> {
    let snapshot = snapshot(connection).await?;
    let (summaries, counts) = summaries::differences(&snapshot).await?;
    let totals = roll_ups::totals_are_wrong(&snapshot).await?;
    let digests = digests::differences(&snapshot).await?;
    let (group_days, group_hours, uncounted_group_hours) =
        groups::differences(&snapshot, now).await?;
    let wrong_states = state_tables::differences(&snapshot).await?;
    let found = SummaryDifferences {
        summaries,
        counts,
        totals: totals.into(),
        digests,
        group_days,
        group_hours,
        states: wrong_states.number(),
        uncounted_group_hours,
    };
    Ok((found, wrong_states))
}

/// Makes good what was found.
async fn repair_summaries(
    connection: &mut Object,
    found: &SummaryDifferences,
    now: Timestamp,
) -> Result<(), Error> {
    if found.summaries + found.counts + found.totals > 0 {
        rebuild_summaries(connection).await?;
    }
    if found.group_days + found.group_hours + found.uncounted_group_hours > 0 {
        groups::repair(connection, now).await?;
    }
    if found.digests > 0 {
        digests::note_wrong(connection).await?;
        while digests::make_stale(connection).await? {}
    }
    Ok(())
}

async fn rebuild_summaries(connection: &mut Object) -> Result<(), Error> {
    let transaction = connection.transaction().await?;
    transaction.batch_execute(NO_TIME_LIMIT).await?;
    // In the order of aggregation. With the first lock, no node brings summaries up to date meanwhile.
    transaction.execute("select pg_advisory_xact_lock($1)", &[&ROLL_UP_LOCK]).await?;
    aggregated_events::lock_state(&transaction).await?;
    transaction.batch_execute(&summaries::rebuild_statements()).await?;
    roll_ups::recount_totals(&transaction).await?;
    transaction.commit().await
}

/// Replaces an hour's sums with the sums of its events. False if they have changed since they were `seen`.
async fn repair_hour(connection: &mut Object, seen: &SumDifference) -> Result<bool, Error> {
    let write = repair_hour_statement('$');
    let hour = seen.begins.to_jiff();
    let sums = [seen.recounted.values(), seen.stored.values()].concat();
    let mut parameters: Vec<&(dyn ToSql + Sync)> = vec![&hour];
    parameters.extend(sums.iter().map(|sum| sum as &(dyn ToSql + Sync)));
    let transaction = connection.transaction().await?;
    aggregated_events::lock_state(&transaction).await?;
    let changed = transaction.execute(&write, &parameters).await?;
    roll_ups::recount_totals(&transaction).await?;
    transaction.commit().await?;
    Ok(changed == 1)
}

/// A snapshot without the usual time limit.
async fn snapshot(connection: &mut Object) -> Result<Transaction<'_>, Error> {
    let snapshot = connection
        .build_transaction()
        .isolation_level(IsolationLevel::RepeatableRead)
        .read_only(true)
        .start()
        .await?;
    snapshot.batch_execute(NO_TIME_LIMIT).await?;
    Ok(snapshot)
}

/// The beginning of the day or hour, in the column behind the sums.
fn begins(row: &Row) -> Result<Timestamp, Error> {
    row.try_get(Sums::COUNT).map(Timestamp::truncate)
}

/// The sums and details of a day, between which its beginning and its device stand.
fn day(row: &Row) -> Result<Counted, Error> {
    let details = DayDetails::read(|column| row.try_get(Sums::COUNT + 2 + column))?;
    Ok(Counted { sums: sums(row)?, details })
}

fn job_figures(row: &Row) -> Result<JobFigures, Error> {
    // Behind the device and the job.
    const FIRST: usize = 2;
    figure_columns::read_job(
        |column| row.try_get(FIRST + column),
        |column| time(row, FIRST + column),
        |column| optional_time(row, FIRST + column),
    )
}
