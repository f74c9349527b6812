//! Writes a batch: as a single statement, which commits by itself, or as one transaction of several statements. The
//! writer decides which, and what to do when one fails.
//!
//! Rows must be locked in the same order everywhere: devices, event ids, events, figures. Servers therefore never
//! deadlock.
//!
//! Figures alone do not always give a streak. The upsert of figures then calls the function `pisync_streak`, once it
//! has locked the job's row. The function sees what other servers have committed meanwhile, and this batch's events.
//!
//! A batch with an event that was reported before fails as a single statement. It then takes the deduplicating path:
//! first the event ids are inserted, then the new events.

use std::{collections::HashMap, sync::Arc};

use futures_util::future;
use pisync_core::{DeviceId, Timestamp};
use tokio_postgres::Row;

use super::{
    batch_columns::{DeviceColumns, EventColumns, JobColumns, KeptEvents, store},
    connection::{Backend, Connection},
    durability,
    errors::WriteError,
    imports, roll_ups,
    statements::Statements,
};
use crate::store::{Batch, Duplicate, FailureStreak, Written, batch::JobDelta};

/// Ids taken from the sequence at a time. Other servers take theirs from the same sequence, so ids only roughly follow
/// time.
pub(super) const ID_BLOCK: i64 = 4_096;

/// A connection with its prepared statements.
pub(super) struct Session {
    pub(super) connection: Connection,
    pub(super) statements: Statements,
    pub(super) backend: Backend,
}

/// How far a transaction has come when something fails.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Transaction {
    /// Whether it was begun by a separate statement. An error then leaves it open.
    pub(super) open: bool,
    /// Whether the commit was sent.
    pub(super) committing: bool,
}

/// The result of a batch that is a single statement.
pub(super) struct Stored {
    pub(super) new_devices: Vec<DeviceId>,
    pub(super) streaks: Vec<FailureStreak>,
    pub(super) taken_ids: Vec<i64>,
}

/// Stores a batch in a single statement. It is given the order of its events, their ids, and the positions of events
/// whose devices are upserted.
pub(super) async fn write_single(
    session: Arc<Session>,
    batch: Arc<Batch>,
    (order, ids, upserted): (Vec<usize>, Vec<i64>, Vec<usize>),
    streaks_since: Timestamp,
    take_ids: bool,
) -> Result<Stored, WriteError> {
    let Session { connection, statements, .. } = &*session;
    let client = &connection.client;
    let deltas = batch.job_deltas(&order, streaks_since);
    let devices = DeviceColumns::of(&batch, &order, &upserted);
    let jobs = JobColumns::new(&deltas);
    let events = EventColumns::new(&batch, &order, &ids);
    let take_ids = async {
        if take_ids { statements.take_ids(client, ID_BLOCK).await } else { Ok(Vec::new()) }
    };
    let columns = (&devices, &jobs, &events);
    let times = (batch.received.to_jiff(), streaks_since.to_jiff());
    let (stored, taken) = future::join(store(client, statements, columns, times), take_ids).await;
    let (failing, new_devices) = stored?;
    connection.check_replicated()?;
    let streaks = streaks(&deltas, &failing)?;
    // If taking ids failed, they can be taken later.
    Ok(Stored { new_devices, streaks, taken_ids: taken.unwrap_or_default() })
}

/// A batch that is written in several statements.
pub(super) struct Work<'a> {
    pub(super) session: &'a Session,
    pub(super) batch: &'a Batch,
    /// The events' ids, in the batch's order.
    pub(super) ids: &'a [i64],
    /// See [`Batch::order`].
    pub(super) order: Vec<usize>,
    /// The events whose devices are upserted.
    pub(super) upserted: &'a [usize],
    /// Events dated before this no longer change streaks.
    pub(super) streaks_since: Timestamp,
    /// Whether events of the batch may be below the watermark.
    pub(super) may_be_below_watermark: bool,
}

impl Work<'_> {
    /// Sends everything but the commit without waiting for answers. Also answers ids for later batches, if `take_ids`.
    pub(super) async fn write_multi(
        self,
        take_ids: bool,
        transaction: &mut Transaction,
    ) -> Result<(Written, Vec<i64>), WriteError> {
        let Self { batch, ids, order, streaks_since, .. } = &self;
        let Session { connection, statements, .. } = self.session;
        let client = &connection.client;
        let received = batch.received.to_jiff();
        let deltas = batch.job_deltas(order, *streaks_since);
        let devices = DeviceColumns::of(batch, order, self.upserted);
        let jobs = JobColumns::new(&deltas);
        let events = EventColumns::new(batch, order, ids);
        let take_ids = async {
            if take_ids { statements.take_ids(client, ID_BLOCK).await } else { Ok(Vec::new()) }
        };

        transaction.open = true;
        // Polled in this order, and therefore sent in this order. Nothing waits for the answer of another.
        let ((begun, new_devices, keyed, inserted, failing), taken) = future::join(
            future::join5(
                client.batch_execute(self.begin()),
                devices.upsert(client, statements, received),
                events.insert_keys(client, statements, received),
                events.insert(client, statements, received),
                jobs.upsert(client, statements, streaks_since.to_jiff()),
            ),
            take_ids,
        )
        .await;
        begun?;
        let new_devices = new_devices?;
        keyed?;
        inserted?;
        let failing = failing?;
        let taken = taken?;
        self.finish(&events, transaction).await?;
        let streaks = streaks(&deltas, &failing)?;
        Ok((Written { new_devices, streaks, ..Written::new(ids.to_vec()) }, taken))
    }

    /// Finds out which events were reported before, and stores the others. `repeats` are events that repeat an earlier
    /// one of the same batch.
    pub(super) async fn write_deduplicating(
        mut self,
        repeats: &HashMap<usize, usize>,
        transaction: &mut Transaction,
    ) -> Result<Written, WriteError> {
        let (batch, ids) = (self.batch, self.ids);
        let Session { connection, statements, .. } = self.session;
        let client = &connection.client;
        let received = batch.received.to_jiff();
        let devices = DeviceColumns::of(batch, &self.order, self.upserted);
        let mut first_of_each = self.order.clone();
        first_of_each.retain(|position| !repeats.contains_key(position));
        let keys = EventColumns::new(batch, &first_of_each, ids);

        transaction.open = true;
        client.batch_execute(self.begin()).await?;
        let mut new_devices = Vec::new();
        if !batch.claims.is_empty() {
            new_devices = statements.claims.check(client, batch).await?;
        }
        new_devices.extend(devices.upsert(client, statements, received).await?);
        keys.insert_new_keys(client, statements, received).await?;
        let kept = keys.find_keys(client, statements).await?;
        keys.check_found(&kept)?;
        let mut written = resolve(batch, ids, repeats, &kept);

        self.order.retain(|position| !written.is_duplicate(*position));
        let events = EventColumns::new(batch, &self.order, ids);
        events.insert(client, statements, received).await?;
        let deltas = batch.job_deltas(&self.order, self.streaks_since);
        let jobs = JobColumns::new(&deltas);
        let failing = jobs.upsert(client, statements, self.streaks_since.to_jiff()).await?;
        self.finish(&events, transaction).await?;
        written.new_devices = new_devices;
        written.streaks = streaks(&deltas, &failing)?;
        Ok(written)
    }

    fn begin(&self) -> &'static str {
        if self.may_be_below_watermark { roll_ups::BEGIN_WITHOUT_AGGREGATION } else { "begin" }
    }

    /// Does what follows the figures, and commits.
    async fn finish(
        &self,
        events: &EventColumns<'_>,
        transaction: &mut Transaction,
    ) -> Result<(), WriteError> {
        let Session { connection, statements, .. } = self.session;
        let client = &connection.client;
        if self.may_be_below_watermark {
            events
                .aggregate_below_watermark(client, statements, self.batch.received.to_jiff())
                .await?;
        }
        if let Some(step) = &self.batch.import {
            imports::advance(client, step, !events.is_empty()).await?;
        }
        if events.is_empty() {
            // The transaction may have changed nothing. Its commit would then not wait until the rows that it has found
            // are durable.
            client.batch_execute(durability::CONFIRM).await?;
        }
        transaction.committing = true;
        client.batch_execute("commit").await?;
        connection.check_replicated()?;
        *transaction = Transaction::default();
        Ok(())
    }
}

/// Decides which events of a batch count: those that are kept under their own id. `kept` holds what is kept under their
/// event ids.
pub(super) fn resolve(
    batch: &Batch,
    ids: &[i64],
    repeats: &HashMap<usize, usize>,
    kept: &KeptEvents,
) -> Written {
    let mut written = Written::new(ids.to_vec());
    for (position, event) in batch.events.iter().enumerate() {
        let Some(event_id) = &event.event_id else { continue };
        let key = (event.device_id.to_string(), event_id.to_string());
        let Some((id, stored)) = kept.get(&key) else { continue };
        if *id == ids[position] {
            continue;
        }
        // The first event may be in this batch. It is then not always read back, because it may not be inserted yet.
        let own = repeats.get(&position).filter(|first| ids[**first] == *id);
        let first = own.map(|first| batch.stored_event(*first, *id)).or_else(|| stored.clone());
        written.ids[position] = *id;
        written.duplicates.push(Duplicate { position, first });
    }
    written
}

/// The streaks that a batch began or continued. `failing` is what the upsert answered about failing jobs.
fn streaks(deltas: &[JobDelta<'_>], failing: &[Row]) -> Result<Vec<FailureStreak>, WriteError> {
    let mut streaks = Vec::new();
    for row in failing {
        let key: (&str, &str) = (row.try_get(0)?, row.try_get(1)?);
        let found =
            deltas.binary_search_by(|delta| (delta.device_id.as_str(), delta.job_key()).cmp(&key));
        let Ok(position) = found else {
            let (device_id, job) = key;
            return Err(WriteError::Impossible(format!(
                "PostgreSQL answered with the job {job:?} of {device_id}, which the batch does not have"
            )));
        };
        streaks.extend(deltas[position].streak(row.try_get(2)?));
    }
    Ok(streaks)
}
