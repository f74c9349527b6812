//! A batch of events that goes into a store, and the result of storing it. `ingest` and `import` make batches; both
//! stores write them. The rules that both stores must follow stand here once: the order of rows, claims on groups, and
//! deltas of figures.

use std::{
    borrow::Cow,
    collections::{BTreeMap, HashMap},
    ops::Range,
    time::Instant,
};

use pisync_core::{
    DeviceId, EventId, GroupName, JobFigures, JobName, Mbps, Metadata, SyncDuration, SyncEvent,
    Timestamp,
};

use super::{ImportStep, OtherGroup, StoreError, StoredEvent};

/// Events that are stored together, in the order in which they arrived.
#[derive(Debug)]
pub struct Batch {
    /// The time at which the server received the events that have no `received_at` of their own.
    pub received: Timestamp,
    /// The same moment on a clock that nobody sets. It tells how long the batch has waited.
    pub stamped: Instant,
    /// At least one.
    pub events: Vec<SyncEvent>,
    /// When each event was received (its `created_at`); empty when all events arrive now.
    pub received_at: Vec<Timestamp>,
    /// The progress of the import that the events belong to, stored together with them. A step of an import may have no
    /// events.
    pub import: Option<ImportStep>,
    /// The events whose devices must be in a group; most batches have none.
    pub claims: Vec<GroupClaim>,
}

/// Events that were sent with a key of a group. All of them are stored if each of their devices is in the group or new.
/// A new device is put into the group. Otherwise none of the events is stored.
#[derive(Debug, Clone)]
pub struct GroupClaim {
    /// Their positions in the batch.
    pub events: Range<usize>,
    /// The group.
    pub group: GroupName,
}

/// The result of a batch that was committed. It has no default, because one without ids would answer for events that
/// nobody stored.
#[derive(Debug)]
pub struct Written {
    /// The events' ids, in the batch's order. A duplicate has the first event's id.
    pub ids: Vec<i64>,
    /// The events that were not stored because their device had reported them before, by position.
    pub duplicates: Vec<Duplicate>,
    /// Devices that were seen for the first time.
    pub new_devices: Vec<DeviceId>,
    /// Jobs that began or continued to fail with this batch.
    pub streaks: Vec<FailureStreak>,
}

/// What was learnt of devices when their acknowledged events were applied to the tables.
#[derive(Debug, Default)]
pub struct Observations {
    /// As in [`Written`].
    pub new_devices: Vec<DeviceId>,
    /// As in [`Written`].
    pub streaks: Vec<FailureStreak>,
}

impl Written {
    /// All events of a batch were stored, under these ids.
    #[must_use]
    pub fn new(ids: Vec<i64>) -> Self {
        Self { ids, duplicates: Vec::new(), new_devices: Vec::new(), streaks: Vec::new() }
    }

    /// Fails unless it answers for each event of `batch` exactly once.
    ///
    /// # Errors
    /// [`StoreError::Failed`], which says what is wrong.
    pub fn check(self, batch: &Batch) -> Result<Self, StoreError> {
        let (events, ids) = (batch.events.len(), self.ids.len());
        if ids != events {
            return Err(StoreError::Failed(format!(
                "a mistake in PiSync: the store answered for {ids} of {events} events"
            )));
        }
        let positions = || self.duplicates.iter().map(|duplicate| duplicate.position);
        if !positions().is_sorted_by(|left, right| left < right)
            || positions().max() >= Some(events)
        {
            return Err(StoreError::Failed(format!(
                "a mistake in PiSync: of {events} events, the store takes these for duplicates: {:?}",
                positions().collect::<Vec<_>>()
            )));
        }
        Ok(self)
    }

    /// Whether the event at this position of the batch was not stored.
    #[must_use]
    pub fn is_duplicate(&self, position: usize) -> bool {
        self.duplicates.binary_search_by_key(&position, |duplicate| duplicate.position).is_ok()
    }
}

impl Written {
    /// The duplicates that differ from what is stored: their device has given one id to two events. The second one is
    /// not stored. Costs nothing when there are no duplicates.
    pub fn conflicts<'a>(&'a self, batch: &'a Batch) -> impl Iterator<Item = Conflict<'a>> {
        self.duplicates.iter().filter_map(|duplicate| {
            let (event, first) = (&batch.events[duplicate.position], duplicate.first.as_ref()?);
            let fields = first.differences(event);
            (!fields.is_empty()).then_some(Conflict { event, first, fields })
        })
    }
}

/// An event that came under the id of another event.
#[derive(Debug)]
pub struct Conflict<'a> {
    /// The event that came.
    pub event: &'a SyncEvent,
    /// The event that is stored and stays.
    pub first: &'a StoredEvent,
    /// The fields in which they differ.
    pub fields: Vec<&'static str>,
}

/// An event that its device had reported before, under the same event id.
#[derive(Debug)]
pub struct Duplicate {
    /// Position in the batch.
    pub position: usize,
    /// The event that the device had reported; `None` when it is no longer kept.
    pub first: Option<StoredEvent>,
}

/// A job's failures since its last success, after a batch with failures of that job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FailureStreak {
    /// The device.
    pub device_id: DeviceId,
    /// The job; `None` for events that name no job.
    pub job: Option<JobName>,
    /// The streak before the batch, provided that the batch's events directly followed the stored ones.
    pub before: i64,
    /// The streak now.
    pub after: i64,
}

/// The delta that a batch adds to one device's job.
pub(super) struct JobDelta<'a> {
    /// Position in the batch of one of the job's events.
    pub(super) position: usize,
    pub(super) device_id: &'a DeviceId,
    pub(super) job: Option<&'a JobName>,
    pub(super) figures: JobFigures,
}

impl JobDelta<'_> {
    /// The job's key in both stores: events without a job have the empty name.
    pub(super) fn job_key(&self) -> &str {
        self.job.map_or("", JobName::as_str)
    }

    /// The streak to report, given the streak `after` the batch. `None` when the batch added no failures to a streak,
    /// or when a success that arrived before is dated after them.
    pub(super) fn streak(&self, after: i64) -> Option<FailureStreak> {
        let added = self.figures.consecutive_failures;
        (added > 0 && after > 0).then(|| FailureStreak {
            device_id: self.device_id.clone(),
            job: self.job.cloned(),
            before: (after - added).max(0),
            after,
        })
    }
}

impl Batch {
    /// A batch of events that arrive at `received`.
    #[must_use]
    pub fn new(received: Timestamp, events: Vec<SyncEvent>) -> Self {
        Self {
            received,
            stamped: Instant::now(),
            events,
            received_at: Vec::new(),
            import: None,
            claims: Vec::new(),
        }
    }

    /// The devices that claims are about, in byte-wise order. Each comes with the group that it is put into if it is
    /// new.
    pub(super) fn claimed_devices(&self) -> BTreeMap<&DeviceId, &GroupName> {
        let mut claimed = BTreeMap::new();
        for GroupClaim { events, group } in &self.claims {
            for event in &self.events[events.clone()] {
                claimed.entry(&event.device_id).or_insert(group);
            }
        }
        claimed
    }

    /// Checks the claims in order, given the groups of the devices that exist. Answers which devices to register, and
    /// in which group.
    pub(super) fn check_claims(
        &self,
        groups: &HashMap<String, Option<String>>,
    ) -> Result<BTreeMap<&DeviceId, &GroupName>, OtherGroup> {
        let mut registered: BTreeMap<&DeviceId, &GroupName> = BTreeMap::new();
        let mut refused = Vec::new();
        for GroupClaim { events, group } in &self.claims {
            let devices = || self.events[events.clone()].iter().map(|event| &event.device_id);
            let is_right = |device_id: &DeviceId| match groups.get(device_id.as_str()) {
                Some(found) => found.as_deref() == Some(group.as_str()),
                None => registered.get(device_id).is_none_or(|found| *found == group),
            };
            if devices().all(is_right) {
                let new = devices().filter(|device_id| !groups.contains_key(device_id.as_str()));
                registered.extend(new.map(|device_id| (device_id, group)));
            } else {
                refused.push(events.start);
            }
        }
        if refused.is_empty() { Ok(registered) } else { Err(OtherGroup { refused }) }
    }

    /// When the event at `position` was received.
    pub(super) fn received_at(&self, position: usize) -> Timestamp {
        self.received_at.get(position).copied().unwrap_or(self.received)
    }

    /// When the first and the last of the events at `positions` were received.
    pub(super) fn received_within(&self, positions: &[usize]) -> (Timestamp, Timestamp) {
        if self.received_at.is_empty() {
            return (self.received, self.received);
        }
        let times = || positions.iter().map(|position| self.received_at(*position));
        (times().min().unwrap_or(self.received), times().max().unwrap_or(self.received))
    }

    /// The positions in `order`, grouped by device.
    pub(super) fn by_device<'a>(&self, order: &'a [usize]) -> impl Iterator<Item = &'a [usize]> {
        order.chunk_by(|left, right| self.events[*left].device_id == self.events[*right].device_id)
    }

    /// The positions of the events in byte-wise order of device, job and event id, then of arrival. All nodes lock rows
    /// in this order, so that they never deadlock.
    pub(super) fn order(&self) -> Vec<usize> {
        let key = |position: usize| {
            let event = &self.events[position];
            (&event.device_id, &event.job, &event.event_id, position)
        };
        let mut order: Vec<usize> = (0..self.events.len()).collect();
        order.sort_unstable_by(|left, right| key(*left).cmp(&key(*right)));
        order
    }

    /// The positions of events that repeat an earlier event of the batch, each with the position of that one.
    pub(super) fn repeats(&self) -> HashMap<usize, usize> {
        let mut first: HashMap<(&DeviceId, &EventId), usize> = HashMap::new();
        let mut repeats = HashMap::new();
        for (position, event) in self.events.iter().enumerate() {
            if let Some(event_id) = &event.event_id {
                let earlier = *first.entry((&event.device_id, event_id)).or_insert(position);
                if earlier != position {
                    repeats.insert(position, earlier);
                }
            }
        }
        repeats
    }

    /// The event at `position` as it is kept under `id`.
    pub(super) fn stored_event(&self, position: usize, id: i64) -> StoredEvent {
        let event = &self.events[position];
        StoredEvent {
            id,
            event_id: event.event_id.as_ref().map(ToString::to_string),
            timestamp: event.timestamp,
            total_files_synced: event.total_files_synced.into(),
            total_errors: event.total_errors.into(),
            internet_speed: event.internet_speed.map(Mbps::hundredths),
            job: event.job.as_ref().map(ToString::to_string),
            duration: event.duration.map(SyncDuration::milliseconds),
            bytes_synced: event.bytes_synced.map(u64::cast_signed),
            metadata: event.metadata.as_ref().map(Metadata::to_raw_value),
            created_at: self.received_at(position),
            updated_at: self.received_at(position),
        }
    }

    /// The deltas of the batch, one for each device's job. `order` is the [`Self::order`] of the events that count;
    /// their ids rise in the batch's order. Events dated before `streaks_since` change no streak.
    pub(super) fn job_deltas(
        &self,
        order: &[usize],
        streaks_since: Timestamp,
    ) -> Vec<JobDelta<'_>> {
        let event = |position: &usize| &self.events[*position];
        order
            .chunk_by(|left, right| {
                let (left, right) = (event(left), event(right));
                left.device_id == right.device_id && left.job == right.job
            })
            .filter_map(|positions| {
                let (_, received) = self.received_within(positions);
                // In `order`, events that have an event id are sorted by it instead of by arrival.
                let in_arrival_order = if positions.is_sorted() {
                    Cow::Borrowed(positions)
                } else {
                    let mut positions = positions.to_vec();
                    positions.sort_unstable();
                    Cow::Owned(positions)
                };
                let events = in_arrival_order.iter().map(event);
                let figures = JobFigures::aggregate(events, received, streaks_since)?;
                let position = *positions.first()?;
                let SyncEvent { device_id, job, .. } = &self.events[position];
                Some(JobDelta { position, device_id, job: job.as_ref(), figures })
            })
            .collect()
    }
}
