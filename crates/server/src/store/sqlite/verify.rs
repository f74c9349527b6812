//! Recounts figures from raw events. A page of devices is counted in one read transaction; a repair is one short write
//! transaction per device. `pisync verify` and `maintenance` call it. A recount must not keep long histories in memory.

use std::collections::{BTreeMap, HashSet};

use async_trait::async_trait;
use pisync_core::{JobFigures, LONGEST_LEAD, Timestamp, later_until};
use rusqlite::{
    Connection, OptionalExtension, Transaction, TransactionBehavior, params, params_from_iter,
};

use super::{
    aggregated_events,
    connection::Cost,
    digests, expiry, groups,
    job_figures::{JOB_COLUMNS, JobStatements, job_figures},
    misdated,
    roll_ups::{self, sums},
    rows::time,
    state_tables::{self, WrongStates},
    store::SqliteStore,
    summaries,
    write_connection::WriteConnection,
};
use crate::store::{
    DayDetails, StateDifferences, StoreError, SumDifference, SummaryDifferences, Sums,
    Verification, Verified, day_details,
    group_runs::HOUR_MILLISECONDS,
    roll_up_sql::DerivedTable,
    verify::{
        Counted, PAGE_DEVICES, Recount, SumRecount, devices_to_fill, devices_to_repair,
        page_length, repair_hour_statement, start_of_day,
    },
};

#[async_trait]
impl Verification for SqliteStore {
    async fn verify(
        &self,
        after: Option<&str>,
        now: Timestamp,
        repair: bool,
    ) -> Result<Verified, StoreError> {
        let after = after.map(str::to_owned);
        let latest = now.saturating_add_milliseconds(LONGEST_LEAD);
        let verified = self
            .read_events(Cost::Unbounded, move |connection| {
                page(connection, after.as_deref(), latest)
            })
            .await?;
        if repair {
            for device_id in devices_to_fill(&verified) {
                self.writer.call(move |writer| fill_days(writer, &device_id, latest)).await?;
            }
        }
        if repair && verified.raw_since.is_none() {
            for device_id in devices_to_repair(&verified) {
                self.writer.call(move |writer| repair_device(writer, &device_id, latest)).await?;
            }
        }
        Ok(verified)
    }

    async fn recount_misdated(&self, now: Timestamp) -> Result<u64, StoreError> {
        let latest = now.saturating_add_milliseconds(LONGEST_LEAD);
        let (mut after, mut recounted) = (None, 0);
        loop {
            let step =
                move |writer: &mut WriteConnection| misdated::recount_some(writer, after, latest);
            let (step, next) = self.writer.call(step).await?;
            recounted += step;
            after = next;
            if after.is_none() {
                return Ok(recounted);
            }
        }
    }

    async fn verify_hours(&self) -> Result<Vec<SumDifference>, StoreError> {
        self.read_events(Cost::Unbounded, hours).await
    }

    async fn verify_summaries(
        &self,
        now: Timestamp,
        repair: bool,
    ) -> Result<SummaryDifferences, StoreError> {
        let compare = move |connection: &Connection| summary_differences(connection, now);
        let (found, wrong_states) = self.read_events(Cost::Unbounded, compare).await?;
        if repair {
            self.repair_summaries(&found, now).await?;
            state_tables::make_good(self, wrong_states).await?;
        }
        Ok(found)
    }

    async fn correct_states(&self) -> Result<StateDifferences, StoreError> {
        let compare = |connection: &Connection| {
            state_tables::differences(&*connection.unchecked_transaction()?)
        };
        let wrong = self.read_events(Cost::Unbounded, compare).await?;
        let number = wrong.number();
        state_tables::make_good(self, wrong).await?;
        Ok(number)
    }

    async fn repair_hour(&self, seen: &SumDifference) -> Result<bool, StoreError> {
        let seen = seen.clone();
        self.writer.call(move |writer| repair_hour(writer, &seen)).await
    }
}

/// Recounts the page of devices after `after`. No event can be dated after `latest`.
fn page(
    connection: &Connection,
    after: Option<&str>,
    latest: Timestamp,
) -> rusqlite::Result<Verified> {
    const DEVICES: &str = "
        select d.id, d.device_id,
               (select ifnull(sum(total_syncs), 0) from device_jobs where device = d.id)
          from devices d
         where ?1 is null or d.device_id > ?1
         order by d.device_id
         limit ?2
    ";
    let snapshot = connection.unchecked_transaction()?;
    let devices: Vec<(i64, String, i64)> = snapshot
        .prepare_cached(DEVICES)?
        .query_map(params![after, PAGE_DEVICES], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))?
        .collect::<rusqlite::Result<_>>()?;
    let length = page_length(devices.iter().map(|(_, _, events)| *events)).min(devices.len());
    let is_last = length == devices.len() && devices.len() < PAGE_DEVICES as usize;
    let devices = &devices[..length];

    let watermark = aggregated_events::watermark(&snapshot)?;
    let names = Sums::names();
    let stored = format!("select {}, job from device_jobs where device = ?1", *JOB_COLUMNS);
    let stored_days =
        format!("select {names}, day, {} from device_days where device = ?1", day_details::names());
    let (mut figures, mut days) = (Recount::default(), SumRecount::default());
    let being_deleted: HashSet<String> = snapshot
        .prepare_cached("select device_id from device_deletions")?
        .query_map([], |row| row.get(0))?
        .collect::<rusqlite::Result<_>>()?;
    let (leaving, staying): (Vec<_>, Vec<_>) =
        devices.iter().partition(|(_, device_id, _)| being_deleted.contains(device_id));
    for (number, device_id, _) in &staying {
        let mut stored = snapshot.prepare_cached(&stored)?;
        let mut rows = stored.query([number])?;
        while let Some(row) = rows.next()? {
            figures.stored(device_id.clone(), row.get("job")?, job_figures(row)?);
        }
        let mut stored = snapshot.prepare_cached(&stored_days)?;
        let mut rows = stored.query([number])?;
        while let Some(row) = rows.next()? {
            let details = DayDetails::read(|column| row.get(Sums::COUNT + 1 + column))?;
            let counted = Counted { sums: sums(row)?, details };
            days.stored(Some(device_id.clone()), time(row, Sums::COUNT)?, counted);
        }
        let recounted = recount(&snapshot, *number, watermark, latest)?;
        for (job, recounted) in recounted.jobs {
            figures.recounted(device_id.clone(), job, recounted);
        }
        for (day, recounted) in recounted.days {
            days.recounted(Some(device_id.clone()), day, recounted);
        }
    }
    let raw_since = expiry::raw_since(&snapshot)?;
    let unfilled_days = days.unfilled();
    Ok(Verified {
        devices: staying.len() as u64,
        being_deleted: leaving.len() as u64,
        events: figures.events(),
        differences: figures.differences(raw_since.is_none()),
        days: days.differences(raw_since.is_none()),
        unfilled_days,
        raw_since,
        nameless_devices: if is_last { nameless_devices(&snapshot)? } else { 0 },
        next: devices.last().filter(|_| !is_last).map(|(_, device_id, _)| device_id.clone()),
    })
}

/// Fills the details of a device's days that an earlier version aggregated, where all events of the day are kept.
fn fill_days(
    writer: &mut WriteConnection,
    device_id: &str,
    latest: Timestamp,
) -> rusqlite::Result<()> {
    let details: Vec<_> = day_details::COLUMNS.iter().zip(3..).map(assignment).collect();
    let sums: Vec<_> = (9..9 + Sums::COUNT).map(|number| format!("?{number}")).collect();
    let fill = format!(
        "update device_days set {} where device = ?1 and day = ?2 and duration_count is null and ({}) = ({})",
        details.join(", "),
        Sums::names(),
        sums.join(", ")
    );
    let transaction =
        writer.connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let number = transaction
        .query_row("select id from devices where device_id = ?1", [device_id], |row| row.get(0))
        .optional()?;
    let Some(number) = number else { return Ok(()) };
    let recounted =
        recount(&transaction, number, aggregated_events::watermark(&transaction)?, latest)?;
    let mut fill = transaction.prepare(&fill)?;
    for (day, counted) in &recounted.days {
        let key = [number, day.as_millisecond()].map(Some).into_iter();
        let values = key.chain(counted.details.unwrap_or_default().values());
        fill.execute(params_from_iter(values.chain(counted.sums.values().map(Some))))?;
    }
    drop(fill);
    transaction.commit()
}

/// Sets a column to the parameter with this number.
fn assignment((column, number): (&&str, i32)) -> String {
    format!("{column} = ?{number}")
}

/// Replaces a device's figures with the sums of its events.
fn repair_device(
    writer: &mut WriteConnection,
    device_id: &str,
    latest: Timestamp,
) -> rusqlite::Result<()> {
    // This transaction excludes writes between counting and writing.
    let transaction =
        writer.connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let number: Option<i64> = transaction
        .query_row("select id from devices where device_id = ?1", [device_id], |row| row.get(0))
        .optional()?;
    // Another caller may have deleted it meanwhile.
    let Some(number) = number else { return Ok(()) };
    write_recounted(&transaction, number, latest)?;
    transaction.commit()
}

/// Counts a device's events, and replaces its figures and days with the result.
pub(super) fn write_recounted(
    transaction: &Transaction<'_>,
    number: i64,
    latest: Timestamp,
) -> rusqlite::Result<()> {
    let watermark = aggregated_events::watermark(transaction)?;
    let recounted = recount(transaction, number, watermark, latest)?;
    transaction.execute("delete from device_jobs where device = ?1", [number])?;
    let mut jobs = JobStatements::prepare(transaction)?;
    for (job, figures) in &recounted.jobs {
        jobs.add(number, job, figures, Timestamp::MIN)?;
    }
    drop(jobs);
    misdated::note_set_aside(transaction, number, latest)?;
    summaries::note_stale(transaction, number)?;
    transaction.execute("delete from device_days where device = ?1", [number])?;
    let numbers: Vec<_> = (3..3 + Sums::COUNT + day_details::COLUMNS.len())
        .map(|number| format!("?{number}"))
        .collect();
    let mut insert = transaction.prepare(&format!(
        "insert into device_days (device, day, {}, {}) values (?1, ?2, {})",
        Sums::names(),
        day_details::names(),
        numbers.join(", ")
    ))?;
    for (day, counted) in &recounted.days {
        let sums = [number, day.as_millisecond()].into_iter().chain(counted.sums.values());
        let details = counted.details.unwrap_or_default().values();
        insert.execute(params_from_iter(sums.map(Some).chain(details)))?;
    }
    groups::count_device_again(transaction, number, watermark)?;
    digests::note_stale(transaction, number)
}

/// Recounts the fleet's hours from all aggregated events, as of one moment.
fn hours(connection: &Connection) -> rusqlite::Result<Vec<SumDifference>> {
    const EVENTS: &str = "
        select total_files_synced, total_errors, internet_speed, timestamp
          from sync_events
         where id <= ?1
    ";
    let snapshot = connection.unchecked_transaction()?;
    let mut hours = SumRecount::default();
    let mut stored =
        snapshot.prepare(&format!("select {}, hour from fleet_hours", Sums::names()))?;
    let mut rows = stored.query([])?;
    while let Some(row) = rows.next()? {
        hours.stored(None, time(row, Sums::COUNT)?, Counted::of_hour(sums(row)?));
    }
    let mut recounted = BTreeMap::<Timestamp, Sums>::new();
    let mut events = snapshot.prepare(EVENTS)?;
    let mut rows = events.query([aggregated_events::watermark(&snapshot)?])?;
    while let Some(row) = rows.next()? {
        let hour = start_of_hour(time(row, 3)?);
        let event = sums_of(row.get(0)?, row.get(1)?, row.get(2)?);
        recounted.entry(hour).or_default().add(&event);
    }
    for (hour, sums) in recounted {
        hours.recounted(None, hour, Counted::of_hour(sums));
    }
    Ok(hours.differences(expiry::raw_since(&snapshot)?.is_none()))
}

fn summary_differences(
    connection: &Connection,
    now: Timestamp,
) -> rusqlite::Result<(SummaryDifferences, WrongStates)> {
    let snapshot = connection.unchecked_transaction()?;
    let (summaries, counts) = summaries::differences(&snapshot)?;
    let totals = roll_ups::totals_are_wrong(&snapshot)?;
    let digests = digests::differences(&snapshot)?;
    let (group_days, group_hours, uncounted_group_hours) = groups::differences(&snapshot, now)?;
    let wrong_states = state_tables::differences(&snapshot)?;
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

impl SqliteStore {
    /// Makes good what was found.
    async fn repair_summaries(
        &self,
        found: &SummaryDifferences,
        now: Timestamp,
    ) -> Result<(), StoreError> {
        if found.summaries + found.counts + found.totals > 0 {
            self.writer.call(rebuild_summaries).await?;
        }
        if found.uncounted_group_hours > 0 {
            self.writer.call(move |writer| groups::count_all_hours(writer, now)).await?;
        }
        if found.group_days + found.group_hours + found.uncounted_group_hours > 0 {
            for table in DerivedTable::ALL {
                let find =
                    move |connection: &Connection| groups::correction(connection, table, now);
                let correction = self.read_events(Cost::Unbounded, find).await?;
                self.writer.call(move |writer| groups::correct(writer, &correction)).await?;
            }
        }
        if found.digests > 0 {
            self.writer.call(digests::note_wrong).await?;
            while self.writer.call(digests::make_stale).await? {}
        }
        Ok(())
    }
}

fn rebuild_summaries(writer: &mut WriteConnection) -> rusqlite::Result<()> {
    let transaction =
        writer.connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    summaries::rebuild(&transaction)?;
    roll_ups::recount_totals(&transaction)?;
    transaction.commit()
}

/// Replaces an hour's sums with the sums of its events. False if they have changed since they were `seen`.
fn repair_hour(writer: &mut WriteConnection, seen: &SumDifference) -> rusqlite::Result<bool> {
    let write = repair_hour_statement('?');
    let sums = [seen.recounted.values(), seen.stored.values()].concat();
    let numbers = [seen.begins.as_millisecond()].into_iter().chain(sums);
    let transaction =
        writer.connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let changed = transaction.prepare_cached(&write)?.execute(params_from_iter(numbers))?;
    roll_ups::recount_totals(&transaction)?;
    transaction.commit()?;
    Ok(changed == 1)
}

/// When the hour of an event began.
fn start_of_hour(timestamp: Timestamp) -> Timestamp {
    timestamp.saturating_add_milliseconds(-timestamp.as_millisecond().rem_euclid(HOUR_MILLISECONDS))
}

/// The sums of a single event.
fn sums_of(files: i64, errors: i64, speed: Option<i64>) -> Sums {
    Sums {
        total_syncs: 1,
        failed_syncs: i64::from(errors > 0),
        total_files_synced: files,
        total_errors: errors,
        speed_sum: speed.unwrap_or_default(),
        speed_count: i64::from(speed.is_some()),
    }
}

/// The recounted figures of a device.
#[derive(Default)]
struct Recounted {
    jobs: BTreeMap<String, JobFigures>,
    /// The sums of aggregated events, by the beginning of their day.
    days: BTreeMap<Timestamp, Counted>,
}

/// Counts a device's events. Those up to the id `watermark` are aggregated. Events are read one by one, in the order of
/// their dates and ids. Neither a long history nor a streak therefore takes memory.
fn recount(
    transaction: &Transaction<'_>,
    device: i64,
    watermark: i64,
    latest: Timestamp,
) -> rusqlite::Result<Recounted> {
    const EVENTS: &str = "
        select ifnull(job, ''), total_files_synced, total_errors, internet_speed, timestamp, created_at, id,
               duration, bytes_synced
          from sync_events
         where device = ?1
         order by timestamp, id
    ";
    let mut recounted = Recounted::default();
    let mut events = transaction.prepare_cached(EVENTS)?;
    let mut rows = events.query([device])?;
    while let Some(row) = rows.next()? {
        let event = Event {
            total_files_synced: row.get(1)?,
            total_errors: row.get(2)?,
            speed: row.get(3)?,
            timestamp: time(row, 4)?,
            received: time(row, 5)?,
        };
        if row.get::<_, i64>(6)? <= watermark {
            let one = sums_of(event.total_files_synced, event.total_errors, event.speed);
            let details = DayDetails::of_event(event.speed, row.get(7)?, row.get(8)?);
            recounted.days.entry(start_of_day(event.timestamp)).or_default().add(&one, &details);
        }
        let job: String = row.get(0)?;
        let figures = recounted.jobs.entry(job).or_insert_with(|| event.nothing_yet());
        event.count_into(figures, latest);
    }
    for figures in recounted.jobs.values_mut() {
        // The date of the last event replaces an impossible `received_at`.
        if figures.last_received > latest && figures.last_sync <= latest {
            figures.last_received = figures.last_sync;
        }
    }
    Ok(recounted)
}

/// The fields of an event that count. Foreign SQL may have written it, so ranges are not taken for granted.
struct Event {
    total_files_synced: i64,
    total_errors: i64,
    speed: Option<i64>,
    timestamp: Timestamp,
    received: Timestamp,
}

impl Event {
    fn nothing_yet(&self) -> JobFigures {
        JobFigures::none(self.timestamp, self.received)
    }

    /// Adds an event that follows all added ones, by its date and then by its id. An event dated after `latest` changes
    /// no streak.
    fn count_into(&self, figures: &mut JobFigures, latest: Timestamp) {
        let mut sums = Sums::of(figures);
        sums.add(&sums_of(self.total_files_synced, self.total_errors, self.speed));
        sums.put_into(figures);
        figures.last_sync = later_until(latest, figures.last_sync, self.timestamp);
        figures.last_received = later_until(latest, figures.last_received, self.received);
        if self.timestamp > latest {
            return;
        }
        if self.total_errors > 0 {
            figures.last_failure = Some(self.timestamp);
            figures.consecutive_failures += 1;
        } else {
            figures.last_success = Some(self.timestamp);
            figures.consecutive_failures = 0;
        }
    }
}

/// How many devices consist of a number alone: their row was deleted, or never existed.
fn nameless_devices(transaction: &Transaction<'_>) -> rusqlite::Result<u64> {
    // Goes from device to device through the index, instead of reading all events.
    const COUNT: &str = "
        with recursive reporting (device) as (
            select min(device) from sync_events
            union all
            select (select min(device) from sync_events where device > reporting.device)
              from reporting
             where reporting.device is not null
        )
        select count(*)
          from (
              select device from reporting where device is not null
              union
              select device from device_jobs
              except
              select id from devices
          )
    ";
    let count: i64 = transaction.query_row(COUNT, [], |row| row.get(0))?;
    Ok(count.cast_unsigned())
}
