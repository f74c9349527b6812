//! Reads a device's history through the index `(device_id, timestamp, id, created_at)` of each month. `events` calls
//! it. A page far down must cost as much as the first one.

use deadpool_postgres::GenericClient;
use pisync_core::{JobName, Timestamp};
use tokio_postgres::{Error, Row};

use super::{
    connect::Object,
    expiry,
    rows::{figures, job_sums, jobs, snapshot, time},
};
use crate::store::{
    EventPage, HistoryPosition, HistoryQuery, StoredEvent, SyncHistory, history::stored_metadata,
};

/// The columns that [`stored_event`] reads from `sync_events event`.
pub(super) const EVENT_COLUMNS: &str = "
    event.id, event.timestamp, event.total_files_synced, event.total_errors,
    (event.internet_speed * 100)::bigint, event.job, (event.duration_seconds * 1000)::bigint,
    event.bytes_synced, event.metadata, event.created_at, event.updated_at, event.event_id
";

pub(super) async fn sync_history(
    connection: &mut Object,
    query: &HistoryQuery,
) -> Result<Option<SyncHistory>, Error> {
    let sums = format!("select {} from device_jobs j where j.device_id = $1", job_sums());
    let snapshot = snapshot(connection).await?;
    if !exists(&snapshot, query).await? {
        return Ok(None);
    }
    let sums = snapshot.prepare_cached(&sums).await?;
    let EventPage { events, next } = page(&snapshot, query).await?;
    let raw_since = expiry::raw_since(&snapshot).await?;
    Ok(Some(SyncHistory {
        figures: figures(&snapshot.query_one(&sums, &[&query.device_id.as_str()]).await?, 0)?,
        events,
        next,
        total_events: count(&snapshot, query, raw_since.is_none()).await?.cast_unsigned(),
        raw_since,
    }))
}

pub(super) async fn events(
    connection: &mut Object,
    query: &HistoryQuery,
) -> Result<Option<EventPage>, Error> {
    let snapshot = snapshot(connection).await?;
    if exists(&snapshot, query).await? { page(&snapshot, query).await.map(Some) } else { Ok(None) }
}

async fn exists(snapshot: &impl GenericClient, query: &HistoryQuery) -> Result<bool, Error> {
    const DEVICE_EXISTS: &str = "select exists (select from devices where device_id = $1)";
    let exists = snapshot.prepare_cached(DEVICE_EXISTS).await?;
    snapshot.query_one(&exists, &[&query.device_id.as_str()]).await?.try_get(0)
}

async fn page(snapshot: &impl GenericClient, query: &HistoryQuery) -> Result<EventPage, Error> {
    // The position's time bounds the index scan. A page far down therefore costs as much as the first one.
    let (behind, direction) = query.order();
    let select_events = format!(
        "select {EVENT_COLUMNS}
           from sync_events event
          where device_id = $1
            and timestamp between $2 and $3
            and (timestamp {behind} $4 or id {behind} $5)
            and ($6::text is null or job = $6)
          order by timestamp {direction}, id {direction}
          limit $7 offset $8"
    );
    let (device_id, job) = (query.device_id.as_str(), query.job.as_ref().map(JobName::as_str));
    let HistoryPosition { microsecond, id } = query.start();
    // PostgreSQL's times end earlier than those of the time library.
    let bounds = Timestamp::MIN.to_jiff()..=jiff::Timestamp::MAX;
    let bound = if microsecond < 0 { *bounds.start() } else { *bounds.end() };
    let start =
        jiff::Timestamp::from_microsecond(microsecond).unwrap_or(bound).max(*bounds.start());
    let (mut from, mut until) = range(query);
    if query.oldest_first {
        from = from.max(start);
    } else {
        until = until.min(start);
    }
    // One more event is read, to learn whether there is a next page.
    let (limit, offset) = (i64::from(query.limit) + 1, query.offset.cast_signed());

    let select = snapshot.prepare_cached(&select_events).await?;
    let mut rows = snapshot
        .query(&select, &[&device_id, &from, &until, &start, &id, &job, &limit, &offset])
        .await?;
    let has_more = rows.len() > query.limit as usize;
    rows.truncate(query.limit as usize);
    let next = rows.last().filter(|_| has_more).map(position).transpose()?;
    Ok(EventPage {
        events: rows.iter().map(|row| stored_event(row, 0)).collect::<Result<_, _>>()?,
        next,
    })
}

/// How many events the query can page to.
async fn count(
    snapshot: &impl GenericClient,
    query: &HistoryQuery,
    is_complete: bool,
) -> Result<i64, Error> {
    const COUNT_EVENTS: &str = "
        select count(*)
          from sync_events
         where device_id = $1
           and timestamp between $2 and $3
           and ($4::text is null or job = $4)
    ";
    let (device_id, job) = (query.device_id.as_str(), query.job.as_ref().map(JobName::as_str));
    if query.from.is_none() && query.until.is_none() && is_complete {
        // This is known without counting rows. A long history therefore costs no more than a short one.
        let jobs = jobs(snapshot, device_id).await?;
        let asked_for = jobs.iter().filter(|(name, _)| job.is_none() || name.as_deref() == job);
        return Ok(asked_for.map(|(_, figures)| figures.total_syncs).sum());
    }
    let (from, until) = range(query);
    let count = snapshot.prepare_cached(COUNT_EVENTS).await?;
    snapshot.query_one(&count, &[&device_id, &from, &until, &job]).await?.try_get(0)
}

/// The bounds of the query's dates.
fn range(query: &HistoryQuery) -> (jiff::Timestamp, jiff::Timestamp) {
    let from = query.from.unwrap_or(Timestamp::MIN).to_jiff();
    (from, query.until.unwrap_or(Timestamp::MAX).to_jiff())
}

fn position(row: &Row) -> Result<HistoryPosition, Error> {
    let timestamp: jiff::Timestamp = row.try_get(1)?;
    Ok(HistoryPosition { microsecond: timestamp.as_microsecond(), id: row.try_get(0)? })
}

/// Reads [`EVENT_COLUMNS`] from column `first` on.
pub(super) fn stored_event(row: &Row, first: usize) -> Result<StoredEvent, Error> {
    Ok(StoredEvent {
        id: row.try_get(first)?,
        timestamp: time(row, first + 1)?,
        total_files_synced: row.try_get::<_, i32>(first + 2)?.into(),
        total_errors: row.try_get::<_, i32>(first + 3)?.into(),
        internet_speed: row.try_get(first + 4)?,
        job: row.try_get(first + 5)?,
        duration: row.try_get(first + 6)?,
        bytes_synced: row.try_get(first + 7)?,
        metadata: row.try_get::<_, Option<String>>(first + 8)?.and_then(stored_metadata),
        created_at: time(row, first + 9)?,
        updated_at: time(row, first + 10)?,
        event_id: row.try_get(first + 11)?,
    })
}
