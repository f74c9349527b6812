//! Reads a device's history through the index `(device, timestamp)`, whose entries end with the id. `events` calls it.
//! A page far down must cost as much as the first one.

use pisync_core::{JobName, Timestamp};
use rusqlite::{Connection, OptionalExtension, Row, named_params};

use super::{
    expiry::raw_since,
    rows::{device_number, figures_of_device, jobs, time},
};
use crate::store::{
    EventPage, HistoryPosition, HistoryQuery, StoredEvent, SyncHistory, history::stored_metadata,
};

/// The columns that [`stored_event`] reads.
pub(super) const EVENT_COLUMNS: &str = "
    id, timestamp, total_files_synced, total_errors, internet_speed, job, duration, bytes_synced,
    metadata, created_at, event_id
";

/// The event with this id, if it is still kept.
pub(super) fn kept_event(
    connection: &Connection,
    id: i64,
) -> rusqlite::Result<Option<StoredEvent>> {
    let select = format!("select {EVENT_COLUMNS} from sync_events where id = ?1");
    connection.prepare_cached(&select)?.query_row([id], stored_event).optional()
}

pub(super) fn sync_history(
    connection: &Connection,
    query: &HistoryQuery,
) -> rusqlite::Result<Option<SyncHistory>> {
    let snapshot = connection.unchecked_transaction()?;
    let Some(device) = device_number(&snapshot, &query.device_id)? else {
        return Ok(None);
    };
    let EventPage { events, next } = page(&snapshot, device, query)?;
    Ok(Some(SyncHistory {
        figures: figures_of_device(&snapshot, device)?,
        events,
        next,
        raw_since: raw_since(&snapshot)?,
        total_events: count(&snapshot, device, query)?.cast_unsigned(),
    }))
}

pub(super) fn events(
    connection: &Connection,
    query: &HistoryQuery,
) -> rusqlite::Result<Option<EventPage>> {
    let snapshot = connection.unchecked_transaction()?;
    let device = device_number(&snapshot, &query.device_id)?;
    device.map(|device| page(&snapshot, device, query)).transpose()
}

fn page(snapshot: &Connection, device: i64, query: &HistoryQuery) -> rusqlite::Result<EventPage> {
    // The position's time bounds the index scan. A page far down therefore costs as much as the first one.
    let (behind, direction) = query.order();
    let select_events = format!(
        "select {EVENT_COLUMNS}
           from sync_events
          where device = :device
            and timestamp between :from and :until
            and (timestamp {behind} :start or id {behind} :start_id)
            and (:job is null or job = :job)
          order by timestamp {direction}, id {direction}
          limit :limit offset :offset"
    );
    let start = query.start();
    let start_millisecond = start.microsecond.div_euclid(1000);
    let mut from = query.from.unwrap_or(Timestamp::MIN).as_millisecond();
    let mut until = until(query);
    if query.oldest_first {
        from = from.max(start_millisecond);
    } else {
        until = until.min(start_millisecond);
    }
    let mut events = snapshot
        .prepare_cached(&select_events)?
        .query_map(
            named_params! {
                ":device": device,
                ":from": from,
                ":until": until,
                ":start": start_millisecond,
                ":start_id": start.id,
                ":job": query.job.as_ref().map(JobName::as_str),
                // One more event is read, to learn whether there is a next page.
                ":limit": i64::from(query.limit) + 1,
                ":offset": query.offset.cast_signed(),
            },
            stored_event,
        )?
        .collect::<rusqlite::Result<Vec<_>>>()?;
    let has_more = events.len() > query.limit as usize;
    events.truncate(query.limit as usize);
    let next = events.last().filter(|_| has_more).map(|last| HistoryPosition {
        microsecond: last.timestamp.as_millisecond() * 1000,
        id: last.id,
    });
    Ok(EventPage { events, next })
}

/// How many events the query can page to.
fn count(snapshot: &Connection, device: i64, query: &HistoryQuery) -> rusqlite::Result<i64> {
    const COUNT_EVENTS: &str = "
        select count(*)
          from sync_events
         where device = :device
           and timestamp between :from and :until
           and (:job is null or job = :job)
    ";
    let job = query.job.as_ref().map(JobName::as_str);
    let is_complete = raw_since(snapshot)?.is_none();
    if query.from.is_none() && query.until.is_none() && is_complete {
        // This is known without counting rows. A long history therefore costs no more than a short one.
        let jobs = jobs(snapshot, device)?;
        let asked_for = jobs.iter().filter(|(name, _)| job.is_none() || name.as_deref() == job);
        return Ok(asked_for.map(|(_, figures)| figures.total_syncs).sum());
    }
    snapshot.prepare_cached(COUNT_EVENTS)?.query_row(
        named_params! {
            ":device": device,
            ":from": query.from.unwrap_or(Timestamp::MIN).as_millisecond(),
            ":until": until(query),
            ":job": job,
        },
        |row| row.get(0),
    )
}

fn until(query: &HistoryQuery) -> i64 {
    query.until.unwrap_or(Timestamp::MAX).as_millisecond()
}

pub(super) fn stored_event(row: &Row<'_>) -> rusqlite::Result<StoredEvent> {
    let created_at = time(row, 9)?;
    Ok(StoredEvent {
        id: row.get(0)?,
        timestamp: time(row, 1)?,
        total_files_synced: row.get(2)?,
        total_errors: row.get(3)?,
        internet_speed: row.get(4)?,
        job: row.get(5)?,
        duration: row.get(6)?,
        bytes_synced: row.get(7)?,
        metadata: row.get::<_, Option<String>>(8)?.and_then(stored_metadata),
        created_at,
        updated_at: created_at,
        event_id: row.get(10)?,
    })
}
