//! A page of devices in the order of a figure. It says what to read next from an index of `device_summaries` or
//! `devices`, and merges it with the devices that have changed since the summaries were brought up to date. Both stores
//! run its requests. Nothing here runs SQL.
//!
//! Largest first, equal figures are still in the order of device ids. No index has both directions. So a scan reads the
//! figures first, in any order of ids, and then the last of them again by id.

use std::{
    cmp::Ordering,
    collections::{HashSet, VecDeque},
};

/// The most entries that are read at a time. A page may have less; those that are skipped are read as well.
const MOST_AT_ONCE: u64 = 5_000;

/// A part of what a list is sorted by.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
#[serde(untagged)]
pub enum KeyPart {
    /// A number, or a time as the store counts it.
    Number(i64),
    /// A name, byte by byte.
    Text(String),
}

/// A device's place in a sorted list. It stays the same while other devices report.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Place {
    /// What the list is sorted by, most significant part first; `None` for a device that has no such value. Those come
    /// last.
    pub key: Option<Vec<KeyPart>>,
    /// Sorts equal keys.
    pub device_id: String,
}

/// The direction of a list. Equal keys are always in the order of device ids, unless there is no key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Direction {
    Ascending,
    Descending,
}

impl Direction {
    /// Compares two places: the lesser comes first.
    pub(super) fn compare(self, left: &Place, right: &Place) -> Ordering {
        let of_keys = match (&left.key, &right.key) {
            (Some(left), Some(right)) => self.turn(left.cmp(right)),
            (left, right) => left.is_none().cmp(&right.is_none()),
        };
        let is_by_id = left.key.as_ref().is_some_and(Vec::is_empty);
        let of_ids = left.device_id.cmp(&right.device_id);
        of_keys.then(if is_by_id { self.turn(of_ids) } else { of_ids })
    }

    fn turn(self, ordering: Ordering) -> Ordering {
        match self {
            Self::Ascending => ordering,
            Self::Descending => ordering.reverse(),
        }
    }
}

/// Which part of a list to answer.
#[derive(Debug, Clone)]
pub(super) struct Part {
    pub(super) direction: Direction,
    /// Only what comes behind this place.
    pub(super) after: Option<Place>,
    /// How many places to skip.
    pub(super) offset: u64,
    /// The maximum number of places; all when `None`.
    pub(super) limit: Option<u32>,
}

/// The places on a page.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Places {
    /// In the order of the list.
    pub(super) places: Vec<Place>,
    /// The last one, when more follow.
    pub(super) next: Option<Place>,
}

/// The page of a list that is in memory.
pub(super) fn page_of(mut all: Vec<Place>, part: &Part) -> Places {
    let Part { direction, after, offset, limit } = part;
    if let Some(after) = after {
        all.retain(|place| direction.compare(place, after).is_gt());
    }
    all.sort_unstable_by(|left, right| direction.compare(left, right));
    let skipped = usize::try_from(*offset).unwrap_or(usize::MAX).min(all.len());
    let mut places = all.split_off(skipped);
    let limit = limit.map_or(usize::MAX, |limit| limit as usize);
    let is_more = places.len() > limit;
    places.truncate(limit);
    let next = is_more.then(|| places.last().cloned()).flatten();
    Places { places, next }
}

/// What a scan needs to go on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Request {
    /// Devices with exactly this key (`None`: without one), by id, behind the device `after`.
    Block { key: Option<Vec<KeyPart>>, after: Option<String>, limit: u64 },
    /// Devices with keys behind this one (`None`: from the first), by key, in any order of ids; none without a key.
    Beyond { key: Option<Vec<KeyPart>>, limit: u64 },
}

#[derive(Debug)]
enum Next {
    Block(Option<Vec<KeyPart>>, Option<String>),
    Beyond(Option<Vec<KeyPart>>),
    End,
}

/// A scan of one part of a list.
#[derive(Debug)]
pub(super) struct Scan {
    direction: Direction,
    to_skip: u64,
    limit: usize,
    /// Devices whose entries in the index are out of date.
    changed: HashSet<String>,
    /// The places of these devices, as they are now.
    fresh: VecDeque<Place>,
    /// What was read and is not on the page yet.
    read: VecDeque<Place>,
    next: Next,
    page: Vec<Place>,
}

impl Scan {
    /// A scan of a list in which the devices with `fresh` places have changed.
    pub(super) fn new(part: Part, fresh: Vec<Place>) -> Self {
        let Part { direction, after, offset, limit } = part;
        let changed = fresh.iter().map(|place| place.device_id.clone()).collect();
        let next = match &after {
            Some(Place { key, device_id }) => Next::Block(key.clone(), Some(device_id.clone())),
            None => Next::Beyond(None),
        };
        let all = Part { direction, after, offset: 0, limit: None };
        Self {
            direction,
            to_skip: offset,
            limit: limit.map_or(usize::MAX, |limit| limit as usize),
            changed,
            fresh: page_of(fresh, &all).places.into(),
            read: VecDeque::new(),
            next,
            page: Vec::new(),
        }
    }

    /// The same over a list that has only some of the devices.
    pub(super) fn new_within(
        part: Part,
        fresh: Vec<Place>,
        takes: impl Fn(&Place) -> bool,
    ) -> Self {
        let mut scan = Self::new(part, fresh);
        scan.fresh.retain(takes);
        scan
    }

    /// The same over a list without keys, which is sorted by device ids alone.
    pub(super) fn by_device_id(part: Part) -> Self {
        let after = part.after.as_ref().map(|place| place.device_id.clone());
        Self { next: Next::Block(Some(Vec::new()), after), ..Self::new(part, Vec::new()) }
    }

    /// What to read next; `None` when the page is complete.
    pub(super) fn request(&self) -> Option<Request> {
        if self.page.len() > self.limit {
            return None;
        }
        let missing = (self.limit - self.page.len()) as u64;
        let limit = self.to_skip.saturating_add(missing).saturating_add(1).min(MOST_AT_ONCE);
        match &self.next {
            Next::Block(key, after) => {
                Some(Request::Block { key: key.clone(), after: after.clone(), limit })
            }
            Next::Beyond(key) => Some(Request::Beyond { key: key.clone(), limit }),
            Next::End => None,
        }
    }

    /// Takes what `request` asked for.
    pub(super) fn take(&mut self, request: Request, mut found: Vec<Place>) {
        match request {
            Request::Block { key, limit, .. } => {
                self.next = match (found.last(), key) {
                    (Some(last), key) if found.len() as u64 >= limit => {
                        Next::Block(key, Some(last.device_id.clone()))
                    }
                    // Nothing comes behind devices without a key, and nothing behind those that need none.
                    (_, None) => Next::End,
                    (_, Some(key)) if key.is_empty() => Next::End,
                    (_, key) => Next::Beyond(key),
                };
            }
            Request::Beyond { limit, .. } => {
                let is_last = (found.len() as u64) < limit;
                match found.last().map(|last| last.key.clone()) {
                    // Of the last key there may be more. They are read again, in the order of their ids.
                    Some(key) if !is_last => {
                        found.retain(|place| place.key != key);
                        self.next = Next::Block(key, None);
                    }
                    _ => self.next = Next::Block(None, None),
                }
                let direction = self.direction;
                found.sort_unstable_by(|left, right| direction.compare(left, right));
            }
        }
        let changed = &self.changed;
        self.read.extend(found.into_iter().filter(|place| !changed.contains(&place.device_id)));
        self.merge();
    }

    /// Moves to the page what is known to come next.
    fn merge(&mut self) {
        let is_end = matches!(self.next, Next::End);
        while self.page.len() <= self.limit {
            let place = match (self.read.front(), self.fresh.front()) {
                (Some(read), Some(fresh)) if self.direction.compare(fresh, read).is_lt() => {
                    self.fresh.pop_front()
                }
                (Some(_), _) => self.read.pop_front(),
                (None, Some(_)) if is_end => self.fresh.pop_front(),
                (None, _) => None,
            };
            let Some(place) = place else { return };
            if self.to_skip > 0 {
                self.to_skip -= 1;
            } else {
                self.page.push(place);
            }
        }
    }

    /// The complete page.
    pub(super) fn finish(mut self) -> Places {
        let is_more = self.page.len() > self.limit;
        self.page.truncate(self.limit);
        let next = is_more.then(|| self.page.last().cloned()).flatten();
        Places { places: self.page, next }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn place(key: Option<i64>, device: u8) -> Place {
        let device_id = format!("pi-{device:03}");
        Place { key: key.map(|key| vec![KeyPart::Number(key)]), device_id }
    }

    /// Answers a request as an index would.
    fn answer(index: &[Place], direction: Direction, request: &Request) -> Vec<Place> {
        match request {
            Request::Block { key, after, limit } => {
                let mut found: Vec<_> = index
                    .iter()
                    .filter(|place| place.key == *key)
                    .filter(|place| after.as_ref().is_none_or(|after| place.device_id > *after))
                    .cloned()
                    .collect();
                found.sort_by(|left, right| left.device_id.cmp(&right.device_id));
                found.truncate(usize::try_from(*limit).unwrap());
                found
            }
            Request::Beyond { key, limit } => {
                let is_beyond =
                    |place: &Place| key.is_none() || direction.turn(place.key.cmp(key)).is_gt();
                let mut found: Vec<_> = index
                    .iter()
                    .filter(|place| place.key.is_some() && is_beyond(place))
                    .cloned()
                    .collect();
                // An index has ids in the direction of its keys.
                found.sort_by(|left, right| {
                    let left = (&left.key, &left.device_id);
                    direction.turn(left.cmp(&(&right.key, &right.device_id)))
                });
                found.truncate(usize::try_from(*limit).unwrap());
                found
            }
        }
    }

    proptest! {
        #[test]
        fn a_scan_answers_what_sorting_everything_answers(
            stored in prop::collection::btree_map(0_u8..60, prop::option::of(0_i64..5), 0..60),
            fresh in prop::collection::btree_map(0_u8..70, prop::option::of(0_i64..5), 0..20),
            after in prop::option::of((prop::option::of(0_i64..5), 0_u8..70)),
            descending: bool,
            offset in 0_u64..30,
            limit in prop::option::of(1_u32..12),
        ) {
            let direction =
                if descending { Direction::Descending } else { Direction::Ascending };
            let after = after.map(|(key, device)| place(key, device));
            let part = Part { direction, after, offset, limit };
            let index: Vec<_> =
                stored.iter().map(|(device, key)| place(*key, *device)).collect();
            let changed: Vec<_> = fresh.iter().map(|(device, key)| place(*key, *device)).collect();
            let mut all: Vec<_> = index
                .iter()
                .filter(|place| !changed.iter().any(|other| other.device_id == place.device_id))
                .cloned()
                .collect();
            all.extend(changed.clone());

            let mut scan = Scan::new(part.clone(), changed);
            let mut requests = 0;
            while let Some(request) = scan.request() {
                let found = answer(&index, direction, &request);
                scan.take(request, found);
                requests += 1;
                prop_assert!(requests < 100, "it does not end: {scan:?}");
            }
            prop_assert_eq!(scan.finish(), page_of(all, &part));
        }
    }

    #[test]
    fn a_page_of_the_most_takes_few_requests() {
        let index: Vec<_> = (0..200).map(|device| place(Some(0), device)).collect();
        let direction = Direction::Descending;
        let part = Part { direction, after: None, offset: 0, limit: Some(50) };
        let mut scan = Scan::new(part, Vec::new());
        let mut requests = 0;
        while let Some(request) = scan.request() {
            let found = answer(&index, direction, &request);
            scan.take(request, found);
            requests += 1;
        }
        assert_eq!((requests, scan.finish().places.len()), (2, 50));
    }
}
