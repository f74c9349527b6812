//! A batch as parameters of ingest's statements, with one vector per column. It also runs the statements with them.
//! `transactions` calls it, and must do so in the order in which rows are locked.

use std::collections::HashMap;

use pisync_core::{
    DeviceId, EventId, JobFigures, JobName, Mbps, Metadata, SyncDuration, Timestamp,
};
use tokio_postgres::{Client, Error, Row, Statement, types::ToSql};

use super::{
    errors::WriteError,
    history::stored_event,
    roll_ups::BELOW_WATERMARK_PARAMETERS,
    statements::{EVENT_PARAMETERS, JOB_PARAMETERS, Statements},
};
use crate::store::{Batch, StoredEvent, Sums, batch::JobDelta};

/// The device in the first column of a row. It must be one of the batch's devices.
fn device_of(row: &Row) -> Result<DeviceId, WriteError> {
    let device_id: &str = row.try_get(0)?;
    DeviceId::new(device_id).map_err(|_| {
        WriteError::Impossible(format!("PostgreSQL answered with the device {device_id:?}"))
    })
}

/// Devices in byte-wise order, a vector per column.
pub(super) struct DeviceColumns<'a> {
    device_ids: Vec<&'a str>,
    /// When the batch's events of each device were received; empty when they arrive now.
    first_received: Vec<jiff::Timestamp>,
    last_received: Vec<jiff::Timestamp>,
}

impl<'a> DeviceColumns<'a> {
    /// The devices of the events at the positions `upserted`. These are all devices when events have a `received_at` of
    /// their own. `upserted` and the batch's `order` are both sorted by device.
    pub(super) fn of(batch: &'a Batch, order: &[usize], upserted: &[usize]) -> Self {
        let (mut first_received, mut last_received) = (Vec::new(), Vec::new());
        if !batch.received_at.is_empty() {
            for positions in batch.by_device(order) {
                let (first, last) = batch.received_within(positions);
                first_received.push(first.to_jiff());
                last_received.push(last.to_jiff());
            }
        }
        let device_id = |position: &usize| batch.events[*position].device_id.as_str();
        Self { device_ids: upserted.iter().map(device_id).collect(), first_received, last_received }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.device_ids.is_empty()
    }

    /// Registers the devices or advances their `updated_at`. Answers the new ones.
    pub(super) async fn upsert(
        &self,
        client: &Client,
        statements: &Statements,
        received: jiff::Timestamp,
    ) -> Result<Vec<DeviceId>, WriteError> {
        if self.is_empty() {
            return Ok(Vec::new());
        }
        let rows = client.query(&statements.upsert_devices, &self.parameters(&received)).await?;
        rows.iter().map(device_of).collect()
    }

    fn parameters<'b>(&'b self, received: &'b jiff::Timestamp) -> [&'b (dyn ToSql + Sync); 4] {
        [&self.device_ids, received, &self.first_received, &self.last_received]
    }
}

/// The deltas of a batch, a vector per column.
pub(super) struct JobColumns<'a> {
    device_ids: Vec<&'a str>,
    jobs: Vec<&'a str>,
    sums: [Vec<i64>; Sums::COUNT],
    first_sync: Vec<jiff::Timestamp>,
    last_sync: Vec<jiff::Timestamp>,
    last_success: Vec<Option<jiff::Timestamp>>,
    last_failure: Vec<Option<jiff::Timestamp>>,
    consecutive_failures: Vec<i64>,
    last_received: Vec<jiff::Timestamp>,
}

impl<'a> JobColumns<'a> {
    pub(super) fn new(deltas: &'a [JobDelta<'a>]) -> Self {
        let mut sums: [Vec<i64>; Sums::COUNT] =
            std::array::from_fn(|_| Vec::with_capacity(deltas.len()));
        for delta in deltas {
            for (column, sum) in sums.iter_mut().zip(Sums::of(&delta.figures).values()) {
                column.push(sum);
            }
        }
        let times = |of: fn(&JobFigures) -> Timestamp| -> Vec<jiff::Timestamp> {
            deltas.iter().map(|delta| of(&delta.figures).to_jiff()).collect()
        };
        let optional_times = |of: fn(&JobFigures) -> Option<Timestamp>| -> Vec<_> {
            deltas.iter().map(|delta| of(&delta.figures).map(Timestamp::to_jiff)).collect()
        };
        Self {
            device_ids: deltas.iter().map(|delta| delta.device_id.as_str()).collect(),
            jobs: deltas.iter().map(JobDelta::job_key).collect(),
            sums,
            first_sync: times(|figures| figures.first_sync),
            last_sync: times(|figures| figures.last_sync),
            last_success: optional_times(|figures| figures.last_success),
            last_failure: optional_times(|figures| figures.last_failure),
            consecutive_failures: deltas
                .iter()
                .map(|delta| delta.figures.consecutive_failures)
                .collect(),
            last_received: times(|figures| figures.last_received),
        }
    }

    /// Adds the deltas to the stored figures, and answers the jobs that are failing. The events must be inserted
    /// already.
    pub(super) async fn upsert(
        &self,
        client: &Client,
        statements: &Statements,
        streaks_since: jiff::Timestamp,
    ) -> Result<Vec<Row>, Error> {
        if self.device_ids.is_empty() {
            return Ok(Vec::new());
        }
        client.query(&statements.upsert_jobs, &self.parameters(&streaks_since)).await
    }

    fn parameters<'b>(
        &'b self,
        streaks_since: &'b jiff::Timestamp,
    ) -> [&'b (dyn ToSql + Sync); JOB_PARAMETERS] {
        let mut parameters: [&(dyn ToSql + Sync); JOB_PARAMETERS] = [streaks_since; JOB_PARAMETERS];
        let figures = self.sums.iter().map(|sum| sum as &(dyn ToSql + Sync)).chain([
            &self.first_sync as &(dyn ToSql + Sync),
            &self.last_sync,
            &self.last_success,
            &self.last_failure,
            &self.consecutive_failures,
            &self.last_received,
        ]);
        let keys = [&self.device_ids as &(dyn ToSql + Sync), &self.jobs];
        for (parameter, value) in parameters.iter_mut().zip(keys.into_iter().chain(figures)) {
            *parameter = value;
        }
        parameters
    }
}

/// Stores a batch and commits it. Answers the jobs that are failing and the devices that are new. See
/// [`store_statement`].
pub(super) async fn store(
    client: &Client,
    statements: &Statements,
    (devices, jobs, events): (&DeviceColumns<'_>, &JobColumns<'_>, &EventColumns<'_>),
    (received, streaks_since): (jiff::Timestamp, jiff::Timestamp),
) -> Result<(Vec<Row>, Vec<DeviceId>), WriteError> {
    let (with_devices, with_keys) = (!devices.is_empty(), !events.event_ids.is_empty());
    let mut parameters = jobs.parameters(&streaks_since).to_vec();
    parameters.extend(events.parameters(&received));
    if with_devices {
        parameters.extend(devices.parameters(&received));
    }
    let statement = &statements.store[usize::from(with_devices)][usize::from(with_keys)];
    let mut failing = Vec::new();
    let mut new_devices = Vec::new();
    for row in client.query(statement, &parameters).await? {
        if row.try_get::<_, Option<&str>>(1)?.is_some() {
            failing.push(row);
        } else {
            new_devices.push(device_of(&row)?);
        }
    }
    Ok((failing, new_devices))
}

/// The events of a batch in the order in which rows are locked, a vector per column.
pub(super) struct EventColumns<'a> {
    ids: Vec<i64>,
    device_ids: Vec<&'a str>,
    timestamps: Vec<jiff::Timestamp>,
    total_files_synced: Vec<i32>,
    total_errors: Vec<i32>,
    // Empty where no event has a value.
    internet_speed: Vec<Option<i64>>,
    jobs: Vec<Option<&'a str>>,
    durations: Vec<Option<i64>>,
    bytes_synced: Vec<Option<i64>>,
    metadata: Vec<Option<&'a str>>,
    event_ids: Vec<Option<&'a str>>,
    /// Empty when all events arrive now.
    received_at: Vec<jiff::Timestamp>,
}

impl<'a> EventColumns<'a> {
    pub(super) fn new(batch: &'a Batch, order: &[usize], ids: &[i64]) -> Self {
        let events = || order.iter().map(|position| &batch.events[*position]);
        Self {
            ids: order.iter().map(|position| ids[*position]).collect(),
            device_ids: events().map(|event| event.device_id.as_str()).collect(),
            timestamps: events().map(|event| event.timestamp.to_jiff()).collect(),
            total_files_synced: events()
                .map(|event| event.total_files_synced.cast_signed())
                .collect(),
            total_errors: events().map(|event| event.total_errors.cast_signed()).collect(),
            internet_speed: optional(
                events().map(|event| event.internet_speed.map(Mbps::hundredths)),
            ),
            jobs: optional(events().map(|event| event.job.as_ref().map(JobName::as_str))),
            durations: optional(
                events().map(|event| event.duration.map(SyncDuration::milliseconds)),
            ),
            bytes_synced: optional(events().map(|event| event.bytes_synced.map(u64::cast_signed))),
            metadata: optional(events().map(|event| event.metadata.as_ref().map(Metadata::as_str))),
            event_ids: optional(events().map(|event| event.event_id.as_ref().map(EventId::as_str))),
            received_at: order
                .iter()
                .filter_map(|position| batch.received_at.get(*position))
                .map(|received| received.to_jiff())
                .collect(),
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }

    pub(super) async fn insert(
        &self,
        client: &Client,
        statements: &Statements,
        received: jiff::Timestamp,
    ) -> Result<(), WriteError> {
        if self.is_empty() {
            return Ok(());
        }
        let written =
            client.execute(&statements.insert_events, &self.parameters(&received)).await?;
        check_written("sync_events", written, self.ids.len())
    }

    fn parameters<'b>(
        &'b self,
        received: &'b jiff::Timestamp,
    ) -> [&'b (dyn ToSql + Sync); EVENT_PARAMETERS] {
        [
            &self.ids,
            &self.device_ids,
            &self.timestamps,
            &self.total_files_synced,
            &self.total_errors,
            &self.internet_speed,
            &self.jobs,
            &self.durations,
            &self.bytes_synced,
            &self.metadata,
            &self.event_ids,
            received,
            &self.received_at,
        ]
    }

    /// Aggregates the events that are below the watermark.
    pub(super) async fn aggregate_below_watermark(
        &self,
        client: &Client,
        statements: &Statements,
        received: jiff::Timestamp,
    ) -> Result<(), Error> {
        let parameters: [&(dyn ToSql + Sync); BELOW_WATERMARK_PARAMETERS] = [
            &self.device_ids,
            &self.timestamps,
            &self.total_files_synced,
            &self.total_errors,
            &self.internet_speed,
            &self.received_at,
            &received,
            &self.durations,
            &self.bytes_synced,
        ];
        statements.below_watermark.aggregate(client, &parameters).await
    }

    /// Inserts the keys of the events that have one. Fails when a key exists already.
    pub(super) async fn insert_keys(
        &self,
        client: &Client,
        statements: &Statements,
        received: jiff::Timestamp,
    ) -> Result<(), WriteError> {
        let written = self.write_keys(client, &statements.insert_keys, received).await?;
        check_written("event_keys", written, self.event_ids.iter().flatten().count())
    }

    /// Inserts the keys that do not exist yet.
    pub(super) async fn insert_new_keys(
        &self,
        client: &Client,
        statements: &Statements,
        received: jiff::Timestamp,
    ) -> Result<u64, Error> {
        self.write_keys(client, &statements.insert_new_keys, received).await
    }

    async fn write_keys(
        &self,
        client: &Client,
        statement: &Statement,
        received: jiff::Timestamp,
    ) -> Result<u64, Error> {
        if self.event_ids.is_empty() {
            return Ok(0);
        }
        let parameters: [&(dyn ToSql + Sync); 5] =
            [&self.device_ids, &self.event_ids, &self.ids, &self.timestamps, &received];
        client.execute(statement, &parameters).await
    }

    /// Finds what is kept under their keys.
    pub(super) async fn find_keys(
        &self,
        client: &Client,
        statements: &Statements,
    ) -> Result<KeptEvents, Error> {
        let mut kept = HashMap::new();
        if self.event_ids.is_empty() {
            return Ok(kept);
        }
        for row in client.query(&statements.find_keys, &[&self.device_ids, &self.event_ids]).await?
        {
            let is_there = row.try_get::<_, Option<i64>>(3)?.is_some();
            let event = if is_there { Some(stored_event(&row, 3)?) } else { None };
            kept.insert((row.try_get(0)?, row.try_get(1)?), (row.try_get(2)?, event));
        }
        Ok(kept)
    }

    /// Fails unless every key was found. Each was inserted now or existed before. An existing one may have been
    /// forgotten meanwhile; it is then inserted at the next attempt. If that does not help, a trigger drops it.
    pub(super) fn check_found(&self, kept: &KeptEvents) -> Result<(), WriteError> {
        for (device_id, event_id) in self.device_ids.iter().zip(&self.event_ids) {
            let Some(event_id) = event_id else { continue };
            let key = ((*device_id).to_owned(), (*event_id).to_owned());
            if !kept.contains_key(&key) {
                return Err(WriteError::Conflict(
                    "an event id is not in event_keys after it was inserted; a trigger may drop it",
                ));
            }
        }
        Ok(())
    }

    /// Whether the events were stored by an earlier attempt.
    pub(super) async fn are_stored(
        &self,
        client: &Client,
        statements: &Statements,
    ) -> Result<bool, Error> {
        client
            .query_one(&statements.are_stored, &[&self.device_ids, &self.timestamps, &self.ids])
            .await?
            .try_get(0)
    }
}

/// Fails when a statement has written fewer rows than were sent, because a trigger has dropped some.
pub(super) fn check_written(
    table: &'static str,
    written: u64,
    sent: usize,
) -> Result<(), WriteError> {
    if written == sent as u64 { Ok(()) } else { Err(WriteError::Dropped { table, written, sent }) }
}

/// A column without any value is passed as an empty vector.
fn optional<T>(values: impl Iterator<Item = Option<T>>) -> Vec<Option<T>> {
    let column: Vec<Option<T>> = values.collect();
    if column.iter().any(Option::is_some) { column } else { Vec::new() }
}

/// By device and event id: the first event's id, and the event if it is still kept.
pub(super) type KeptEvents = HashMap<(String, String), (i64, Option<StoredEvent>)>;
