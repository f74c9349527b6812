//! What was acknowledged: the id that the server gave each event, in 8 bytes an event. The events themselves are made again
//! from the seed. `sender` writes the record; `expected` reads it.

use std::{
    collections::HashMap,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicI64, Ordering},
    },
};

use super::event::Milliseconds;

/// No server gives an event this id.
const UNACKNOWLEDGED: i64 = i64::MIN;

/// The acknowledged events of a fleet.
#[derive(Debug)]
pub(super) struct Record {
    /// Where each device's ids begin, and the number of all.
    begins: Vec<usize>,
    ids: Vec<AtomicI64>,
    /// The dates that the server gave to events of devices that do not trust their clocks.
    arrivals: Mutex<HashMap<(u32, u32), Milliseconds>>,
}

impl Record {
    /// Of devices that have so many events each.
    pub(super) fn new(counts: impl Iterator<Item = usize>) -> Self {
        let mut begins = vec![0];
        let mut all = 0;
        for count in counts {
            all += count;
            begins.push(all);
        }
        let ids = (0..all).map(|_| AtomicI64::new(UNACKNOWLEDGED)).collect();
        Self { begins, ids, arrivals: Mutex::default() }
    }

    /// The number of events, acknowledged or not.
    pub(super) fn events(&self) -> usize {
        self.ids.len()
    }

    fn of(&self, device: u32, number: u32) -> Option<&AtomicI64> {
        self.ids.get(self.begins.get(device as usize)? + number as usize)
    }

    /// Notes that the server keeps an event under `id`, and the date that it gave to the event, if it did.
    ///
    /// # Errors
    /// The other id or date that the server has told before.
    pub(super) fn acknowledge(
        &self,
        device: u32,
        number: u32,
        id: i64,
        arrival: Option<Milliseconds>,
    ) -> Result<(), i64> {
        if let Some(place) = self.of(device, number) {
            let before = place.swap(id, Ordering::Relaxed);
            if before != UNACKNOWLEDGED && before != id {
                return Err(before);
            }
        }
        if let Some(arrival) = arrival {
            let mut arrivals = self.arrivals.lock().unwrap_or_else(PoisonError::into_inner);
            let told = arrivals.insert((device, number), arrival);
            if let Some(before) = told.filter(|before| *before != arrival) {
                return Err(before);
            }
        }
        Ok(())
    }

    /// The id of an event, if it was acknowledged.
    pub(super) fn id(&self, device: u32, number: u32) -> Option<i64> {
        let id = self.of(device, number)?.load(Ordering::Relaxed);
        (id != UNACKNOWLEDGED).then_some(id)
    }

    /// The date that the server gave to an event.
    pub(super) fn arrival(&self, device: u32, number: u32) -> Option<Milliseconds> {
        let arrivals = self.arrivals.lock().unwrap_or_else(PoisonError::into_inner);
        arrivals.get(&(device, number)).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_has_one_id_and_one_date() {
        let record = Record::new([2, 3].into_iter());
        assert_eq!((record.events(), record.id(1, 0)), (5, None));
        assert_eq!(record.acknowledge(1, 0, 7, None), Ok(()));
        assert_eq!(record.acknowledge(0, 1, 8, Some(100)), Ok(()));
        // A duplicate is answered with the first event's id and date.
        assert_eq!(record.acknowledge(1, 0, 7, None), Ok(()));
        assert_eq!(record.acknowledge(0, 1, 8, Some(100)), Ok(()));
        assert_eq!((record.id(1, 0), record.id(0, 1), record.id(0, 0)), (Some(7), Some(8), None));
        assert_eq!((record.arrival(0, 1), record.arrival(1, 0)), (Some(100), None));
        assert_eq!(record.acknowledge(1, 0, 9, None), Err(7));
        assert_eq!(record.acknowledge(0, 1, 8, Some(101)), Err(100));
    }
}
