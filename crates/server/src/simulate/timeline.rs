//! The reports of one simulated device in the order in which it delivers them: what waited while it was offline comes
//! late, and some reports come twice. The phases of `mod` send them in this order.

use std::{collections::BTreeMap, sync::Arc};

use super::{
    event::{Event, Milliseconds},
    fleet::Fleet,
    runs::Runs,
};

/// An event on its way.
#[derive(Debug, Clone)]
pub(super) struct Delivery {
    pub(super) device: u32,
    pub(super) event: Event,
    /// It was delivered before, and the device does not know.
    pub(super) is_again: bool,
}

impl Delivery {
    /// The report with which a device makes itself known.
    pub(super) fn first(fleet: &Arc<Fleet>, device: u32) -> Option<Self> {
        let event = Runs::new(fleet, device).next()?;
        Some(Self { device, event, is_again: false })
    }
}

/// What a device still delivers, without its first report.
pub(super) struct Timeline {
    device: u32,
    runs: Runs,
    end: Milliseconds,
    /// Reports of runs that have begun, by the time of delivery.
    waiting: BTreeMap<(Milliseconds, u32, bool), Event>,
}

impl Timeline {
    pub(super) fn new(fleet: &Arc<Fleet>, device: u32) -> Self {
        let mut runs = Runs::new(fleet, device);
        runs.next();
        Self { device, runs, end: fleet.plan.end(), waiting: BTreeMap::new() }
    }

    /// When the next report is delivered.
    pub(super) fn next_due(&mut self) -> Option<Milliseconds> {
        // A run that begins before the next delivery may be delivered before it.
        while let Some(begins) = self.runs.next_time() {
            let due = self.waiting.first_key_value().map(|((due, _, _), _)| *due);
            if due.is_some_and(|due| due <= begins) {
                break;
            }
            let Some(event) = self.runs.next() else { break };
            // At the end, everything is delivered.
            self.waiting.insert((event.due.min(self.end), event.number, false), event);
        }
        self.waiting.first_key_value().map(|((due, _, _), _)| *due)
    }

    /// Whether the next report is one that waited while the device was offline.
    pub(super) fn is_next_late(&self) -> bool {
        self.waiting.first_key_value().is_some_and(|(_, event)| event.is_late)
    }

    /// Skips what is delivered before `time`.
    pub(super) fn skip_to(&mut self, time: Milliseconds) {
        while self.next_due().is_some_and(|due| due < time) {
            self.next();
        }
        self.runs.forget_before(time);
    }
}

impl Iterator for Timeline {
    type Item = Delivery;

    fn next(&mut self) -> Option<Delivery> {
        self.next_due()?;
        let ((due, number, is_again), event) = self.waiting.pop_first()?;
        if let Some(after) = event.again_after.filter(|_| !is_again) {
            self.waiting.insert(((due + after).min(self.end), number, true), event.clone());
        }
        Some(Delivery { device: self.device, event, is_again })
    }
}
