//! Applies the ingest journal: acknowledged events are stored in the tables. The writer thread calls it when somebody has
//! asked for it, and before every call that needs events in the tables. A command that finds a journal without a server
//! calls it, too. It must never lose an acknowledged event: one that the tables refuse is quarantined.

use std::{ops::Range, sync::Arc};

use super::{
    connection::refuses_data,
    ids,
    ingest_buffer::{IngestBuffer, JournaledBatch},
    ingest_state::{self, IngestState, record_applied},
    quarantine::quarantine,
    write_connection::{Journaled, WriteConnection},
};
use crate::store::{Batch, Observations};

/// Ids that are reserved at a time, before they are assigned. They are twice as many as a full ingest buffer and the
/// largest batch after it need. A crash loses those that are left.
pub(super) const RESERVED_IDS: i64 = 262_144;

/// When fewer are left, more are reserved.
const FEWEST_RESERVED_IDS: i64 = RESERVED_IDS / 2;

/// Applies the journal if somebody has asked for it since the last time. The waiters learn the result from the buffer.
pub(super) fn apply_if_wanted(writer: &mut WriteConnection) {
    let is_wanted = writer.buffer().is_some_and(|buffer| {
        let mut state = buffer.state();
        std::mem::take(&mut state.is_wanted)
    });
    if is_wanted {
        let _ = apply_journal(writer);
    }
}

/// Applies everything that is in the journal by now. Does nothing when the connection does not belong to a server.
pub(super) fn apply_journal(writer: &mut WriteConnection) -> rusqlite::Result<()> {
    let Some(buffer) = writer.buffer() else { return Ok(()) };
    let wanted = buffer.state().last;
    while let Some(batches) = buffer.next_apply_batch(wanted) {
        let result = apply_batch(writer, &batches, |observations| buffer.tell(observations));
        let result = result.map_err(|error| ids::explain(&writer.connection, error));
        buffer.apply_ended(batches, result.as_ref().err());
        result?;
    }
    let left = {
        let state = buffer.state();
        state.last_reserved_id - state.next_id + 1
    };
    if left < FEWEST_RESERVED_IDS { reserve_ids(&buffer, writer) } else { Ok(()) }
}

/// The last id up to which events may be aggregated. All events that are stored later have a higher id.
pub(super) fn last_aggregatable_id(writer: &mut WriteConnection) -> rusqlite::Result<i64> {
    let Some(buffer) = writer.buffer() else { return Ok(i64::MAX) };
    pass_other_writers(&buffer, writer)?;
    Ok(buffer.lowest_open_id() - 1)
}

/// Reserves more ids. They directly follow those that are left, unless another program has taken ids meanwhile.
fn reserve_ids(buffer: &IngestBuffer, writer: &mut WriteConnection) -> rusqlite::Result<()> {
    let Some((first, last)) = more_ids(buffer, writer)? else { return Ok(()) };
    let mut state = buffer.state();
    if first != state.last_reserved_id + 1 {
        state.next_id = first;
    }
    state.last_reserved_id = last;
    Ok(())
}

/// Gives the next event an id above all ids in the tables, so that everything in them can be aggregated.
fn pass_other_writers(buffer: &IngestBuffer, writer: &mut WriteConnection) -> rusqlite::Result<()> {
    let highest = writer.highest_id()?;
    if highest < buffer.state().next_id {
        return Ok(());
    }
    // Another program has taken ids above ours, or has used some of ours without reserving them.
    if let Some((first, last)) = more_ids(buffer, writer)? {
        let mut state = buffer.state();
        (state.next_id, state.last_reserved_id) = (first, last);
    }
    Ok(())
}

/// Reserves more ids; `None` when there are no more. The ids that are left are still assigned. After them no event is
/// acknowledged.
fn more_ids(
    buffer: &IngestBuffer,
    writer: &mut WriteConnection,
) -> rusqlite::Result<Option<(i64, i64)>> {
    let reserved = writer.reserve_ids(RESERVED_IDS, 0);
    let why = reserved.as_ref().err().filter(|error| ids::are_used_up(error));
    let why = why.map(ToString::to_string);
    let mut state = buffer.state();
    if let Some(error) = &why
        && state.unreserved.is_none()
    {
        let left = state.last_reserved_id - state.next_id + 1;
        tracing::error!(error, left, "events will be answered 503 once no ids are left");
    }
    state.unreserved = why;
    if state.unreserved.is_some() {
        return Ok(None);
    }
    drop(state);
    reserved.map(|ids| Some(ids.into_inner()))
}

/// Applies a batch in one transaction, and passes on what is learnt. If the tables refuse it, the refused events are
/// searched for and quarantined. Events are checked before they are acknowledged, so this happens only in unforeseen
/// cases.
pub(super) fn apply_batch(
    connection: &mut WriteConnection,
    batches: &[Arc<JournaledBatch>],
    mut tell: impl FnMut(Observations),
) -> rusqlite::Result<()> {
    // What an earlier attempt has stored. It may have been interrupted anywhere.
    let IngestState { journal, applied_events } = ingest_state::read(&connection.connection)?;
    let done = batches.iter().take_while(|accepted| accepted.number <= journal.applied).count();
    let batches = &batches[done..];
    let mut store = |connection: &mut WriteConnection, batches: &[_], events| {
        let observations = apply_in_one_transaction(connection, batches, events)?;
        if !observations.new_devices.is_empty() || !observations.streaks.is_empty() {
            tell(observations);
        }
        Ok(())
    };
    match store(connection, batches, applied_events..usize::MAX) {
        Err(error) if refuses_data(&error) => {}
        other => return other,
    }
    let mut first = applied_events;
    for accepted in batches {
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

/// Applies a batch in one transaction. Of its first record, it applies only the events with the indexes in `events`.
fn apply_in_one_transaction(
    connection: &mut WriteConnection,
    batches: &[Arc<JournaledBatch>],
    events: Range<usize>,
) -> rusqlite::Result<Observations> {
    let (Some(first), Some(last)) = (batches.first(), batches.last()) else {
        return Ok(Observations::default());
    };
    let count = batches.iter().map(|accepted| accepted.positions.len()).sum();
    let mut batch = Batch::new(last.batch.received, Vec::with_capacity(count));
    let mut ids = Vec::with_capacity(count);
    for accepted in batches {
        let is_first = Arc::ptr_eq(accepted, first);
        for (index, (position, id)) in accepted.positions.iter().zip(accepted.ids()).enumerate() {
            if !is_first || events.contains(&index) {
                batch.events.push(accepted.batch.events[*position].clone());
                batch.received_at.push(accepted.batch.received_at(*position));
                ids.push(id);
            }
        }
    }
    let through =
        if batches.len() == 1 { last.through(events.end) } else { last.through(usize::MAX) };
    let written = connection.store(&batch, Some(&Journaled { ids, through }))?;
    // The event id was unused when the event was acknowledged.
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
