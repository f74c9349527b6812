//! Events to store, short to write down, and the figures that they naively add up to.

use std::{collections::BTreeMap, sync::Arc};

use pisync::store::{Actor, Batch, EventWriter, Figures, Via, Written};
use pisync_core::{DeviceId, GroupName, JobName, Mbps, SyncEvent, Timestamp};

/// The present in all tests: 2026-11-22T12:00:00.000Z.
pub(crate) fn now() -> Timestamp {
    Timestamp::from_millisecond(1_795_348_800_000).unwrap()
}

/// So many seconds after [`now`], or before it.
pub(crate) fn at(second: i64) -> Timestamp {
    now().saturating_add_milliseconds(second * 1000)
}

/// After everything that tests store, whenever they have it received.
pub(crate) fn later() -> Timestamp {
    at(1_000 * 24 * 60 * 60)
}

/// Whoever changes something, where it does not matter who.
pub(crate) fn somebody() -> Actor {
    Actor { via: Via::Local, address: None, at: now() }
}

pub(crate) fn device_id(text: &str) -> DeviceId {
    DeviceId::new(text).unwrap()
}

pub(crate) fn group_name(text: &str) -> GroupName {
    GroupName::new(text).unwrap()
}

pub(crate) fn job_name(text: &str) -> JobName {
    JobName::new(text).unwrap()
}

/// A successful sync of one file, with nothing optional.
pub(crate) fn success(device: &str, timestamp: Timestamp) -> SyncEvent {
    SyncEvent {
        device_id: device_id(device),
        event_id: None,
        timestamp,
        total_files_synced: 1,
        total_errors: 0,
        internet_speed: None,
        job: None,
        duration: None,
        bytes_synced: None,
        metadata: None,
    }
}

/// A sync that met one error.
pub(crate) fn failure(device: &str, timestamp: Timestamp) -> SyncEvent {
    SyncEvent { total_files_synced: 0, total_errors: 1, ..success(device, timestamp) }
}

/// The same sync as one of a job.
pub(crate) fn of_job(job: &str, event: SyncEvent) -> SyncEvent {
    SyncEvent { job: Some(job_name(job)), ..event }
}

/// Events received at `received`.
pub(crate) fn batch_at(received: Timestamp, events: Vec<SyncEvent>) -> Arc<Batch> {
    Arc::new(Batch::new(received, events))
}

/// Stores events that are received now.
pub(crate) async fn write(writer: &mut dyn EventWriter, events: Vec<SyncEvent>) -> Written {
    write_at(writer, now(), events).await
}

/// Stores events that were received at `received`.
pub(crate) async fn write_at(
    writer: &mut dyn EventWriter,
    received: Timestamp,
    events: Vec<SyncEvent>,
) -> Written {
    writer.write(&batch_at(received, events)).await.unwrap()
}

/// Sends batches off, each behind the one before as far as the writer can, and writes what comes to nothing.
pub(crate) async fn send_all(writer: &mut dyn EventWriter, batches: &[Arc<Batch>]) -> Vec<Written> {
    let sent = batches.iter().take_while(|batch| writer.send(batch)).count();
    let mut outcomes = Vec::new();
    for _ in 0..sent {
        outcomes.push(writer.sent().await);
    }
    outcomes.resize_with(batches.len(), || None);
    let mut written = Vec::new();
    for (batch, outcome) in batches.iter().zip(outcomes) {
        written.push(match outcome {
            Some(written) => written,
            None => writer.write(batch).await.unwrap(),
        });
    }
    written
}

/// An event that was sent, the id under which it was stored, and when it was received.
pub(crate) type Sent = (i64, Timestamp, SyncEvent);

/// What was sent of a batch without duplicates, given what became of it.
pub(crate) fn sent(received: Timestamp, events: &[SyncEvent], written: &Written) -> Vec<Sent> {
    let stored = written.ids.iter().zip(events);
    stored.map(|(id, event)| (*id, received, event.clone())).collect()
}

/// What the jobs of each device add up to, counted the plain way from everything that was sent:
/// nothing here is kept up to date, and nothing is shared with the code under test.
pub(crate) fn recount(sent: &[Sent]) -> BTreeMap<DeviceId, BTreeMap<Option<String>, Figures>> {
    let mut by_job: BTreeMap<_, BTreeMap<_, Vec<&Sent>>> = BTreeMap::new();
    for received_event in sent {
        let SyncEvent { device_id, job, .. } = &received_event.2;
        let job = job.as_ref().map(|job| job.as_str().to_owned());
        by_job.entry(device_id.clone()).or_default().entry(job).or_default().push(received_event);
    }
    by_job
        .into_iter()
        .map(|(device_id, jobs)| {
            let jobs = jobs.into_iter().map(|(job, events)| (job, recount_job(&events))).collect();
            (device_id, jobs)
        })
        .collect()
}

fn recount_job(sent: &[&Sent]) -> Figures {
    let events = || sent.iter().map(|(_, _, event)| event);
    // As a history shows them.
    let mut history = sent.to_vec();
    history.sort_by_key(|(id, _, event)| (event.timestamp, *id));
    let count = |events: usize| i64::try_from(events).unwrap();
    let failed = |event: &&SyncEvent| event.total_errors > 0;
    let last_success = events().filter(|event| !failed(event)).map(|event| event.timestamp).max();
    let speeds = || events().filter_map(|event| event.internet_speed);
    Figures {
        total_syncs: count(sent.len()),
        failed_syncs: count(events().filter(failed).count()),
        total_files_synced: events().map(|event| i64::from(event.total_files_synced)).sum(),
        total_errors: events().map(|event| i64::from(event.total_errors)).sum(),
        speed_sum: speeds().map(Mbps::hundredths).sum(),
        speed_count: count(speeds().count()),
        first_sync: events().map(|event| event.timestamp).min(),
        last_sync: events().map(|event| event.timestamp).max(),
        last_success,
        last_failure: events().filter(failed).map(|event| event.timestamp).max(),
        consecutive_failures: count(
            history.iter().rev().take_while(|(_, _, event)| failed(&event)).count(),
        ),
        last_seen: sent.iter().map(|(_, received, _)| *received).max(),
    }
}

/// What a device's figures are, given its jobs': sums, and the worst streak.
pub(crate) fn sum<'a>(jobs: impl Iterator<Item = &'a Figures>) -> Figures {
    let earliest = |left: Option<Timestamp>, right: Option<Timestamp>| match (left, right) {
        (Some(left), Some(right)) => Some(left.min(right)),
        (left, right) => left.or(right),
    };
    jobs.fold(Figures::default(), |sum, job| Figures {
        total_syncs: sum.total_syncs + job.total_syncs,
        failed_syncs: sum.failed_syncs + job.failed_syncs,
        total_files_synced: sum.total_files_synced + job.total_files_synced,
        total_errors: sum.total_errors + job.total_errors,
        speed_sum: sum.speed_sum + job.speed_sum,
        speed_count: sum.speed_count + job.speed_count,
        first_sync: earliest(sum.first_sync, job.first_sync),
        last_sync: sum.last_sync.max(job.last_sync),
        last_success: sum.last_success.max(job.last_success),
        last_failure: sum.last_failure.max(job.last_failure),
        consecutive_failures: sum.consecutive_failures.max(job.consecutive_failures),
        last_seen: sum.last_seen.max(job.last_seen),
    })
}
