//! Applying the ingest journal: bringing acknowledged events into the tables.

use std::{ops::Range, path::Path, sync::Arc};

use super::{
    connection::{refuses_data, store_error},
    ingest_buffer::{JournaledBatch, unusable},
    journal::{self, Journal, Survey},
    quarantine::quarantine,
    writer::{IngestState, Journaled, WriteConnection, record_applied},
};
use crate::store::{Batch, Observations, StoreError};

/// Brings what a server has left in the journal of the database at `database` into its tables, and removes the
/// journal. The server must not run.
pub(super) fn recover(database: &Path) -> Result<(), StoreError> {
    let mut connection = WriteConnection::open(database)?;
    if !connection.has_current_ingest_state().map_err(store_error)? {
        return Err(StoreError::Failed(format!(
            "the last events that were acknowledged for {} are still in its ingest journal, and its tables are those of an older version; run `pisync migrate up` first",
            database.display()
        )));
    }
    let state = connection.ingest_state().map_err(store_error)?;
    let (_, records) = Journal::open(database, state.journal)?;
    let apply_batch: Vec<_> =
        records.into_iter().map(|record| Arc::new(JournaledBatch::from(record))).collect();
    apply(&mut connection, &apply_batch, |_| ()).map_err(store_error)?;
    connection.set_journal_in_use(false).map_err(store_error)?;
    journal::remove(database).map_err(|error| unusable(database, &error))
}

/// The number of the journal's last record. A server may be writing it.
pub(super) fn last_record(
    connection: &mut WriteConnection,
    database: &Path,
) -> Result<u64, StoreError> {
    let journal = connection.ingest_state().map_err(store_error)?.journal;
    let survey = Survey::read(database, journal).map_err(|error| unusable(database, &error))?;
    Ok(survey.last_number().max(journal.applied))
}

/// Applies a batch in one transaction, and passes on what is learnt. What the tables refuse is looked for among
/// its events and left out: what they could refuse has been refused at the door, so this is for the
/// unforeseen.
pub(super) fn apply(
    connection: &mut WriteConnection,
    apply_batch: &[Arc<JournaledBatch>],
    mut tell: impl FnMut(Observations),
) -> rusqlite::Result<()> {
    // What an attempt before this one has stored, which may have been interrupted anywhere.
    let IngestState { journal, applied_events } = connection.ingest_state()?;
    let done = apply_batch.iter().take_while(|accepted| accepted.number <= journal.applied).count();
    let apply_batch = &apply_batch[done..];
    let mut store = |connection: &mut WriteConnection, apply_batch: &[_], events| {
        let observations = apply_in_one_transaction(connection, apply_batch, events)?;
        if !observations.new_devices.is_empty() || !observations.streaks.is_empty() {
            tell(observations);
        }
        Ok(())
    };
    match store(connection, apply_batch, applied_events..usize::MAX) {
        Err(error) if refuses_data(&error) => {}
        other => return other,
    }
    let mut first = applied_events;
    for accepted in apply_batch {
        let one = std::slice::from_ref(accepted);
        match store(connection, one, first..usize::MAX) {
            Err(error) if refuses_data(&error) => {}
            other => {
                other?;
                first = 0;
                continue;
            }
        }
        for (index, position) in accepted.positions.iter().enumerate().skip(first) {
            match store(connection, one, index..index + 1) {
                Err(error) if refuses_data(&error) => {
                    quarantine(connection.path(), &accepted.batch, *position, &error);
                    record_applied(&connection.connection, accepted.through(index + 1))?;
                }
                other => other?,
            }
        }
        first = 0;
    }
    Ok(())
}

/// Applies a batch in one transaction; of its first record only the events with these indexes.
fn apply_in_one_transaction(
    connection: &mut WriteConnection,
    apply_batch: &[Arc<JournaledBatch>],
    events: Range<usize>,
) -> rusqlite::Result<Observations> {
    let (Some(first), Some(last)) = (apply_batch.first(), apply_batch.last()) else {
        return Ok(Observations::default());
    };
    let count = apply_batch.iter().map(|accepted| accepted.positions.len()).sum();
    let mut batch = Batch::new(last.batch.received, Vec::with_capacity(count));
    let mut ids = Vec::with_capacity(count);
    for accepted in apply_batch {
        let is_first = Arc::ptr_eq(accepted, first);
        for (index, (position, id)) in accepted.positions.iter().zip(accepted.ids()).enumerate() {
            if !is_first || events.contains(&index) {
                batch.events.push(accepted.batch.events[*position].clone());
                batch.receipts.push(accepted.batch.received_at(*position));
                ids.push(id);
            }
        }
    }
    let through =
        if apply_batch.len() == 1 { last.through(events.end) } else { last.through(usize::MAX) };
    let written = connection.store(&batch, Some(&Journaled { ids, through }))?;
    // Its event_id was free when it was acknowledged.
    for duplicate in &written.duplicates {
        let event = &batch.events[duplicate.position];
        if duplicate.first.as_ref().is_some_and(|first| !first.differences(event).is_empty()) {
            const TAKEN: &str =
                "another program has stored another event of this device under the same event_id";
            quarantine(connection.path(), &batch, duplicate.position, &TAKEN);
        }
    }
    Ok(Observations { new_devices: written.new_devices, streaks: written.streaks })
}
