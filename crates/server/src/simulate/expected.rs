//! What a server must answer, from the record of what it acknowledged. `compare` asks for it. Each device's runs are made
//! once more, and `model` adds up those that were acknowledged.

use std::sync::Arc;

use super::{
    event::{DAY, Event, HOUR, Milliseconds},
    fleet::Fleet,
    model::{Figures, Stored, Sums},
    record::Record,
    runs::Runs,
};

/// The windows of the API, with the length of each and the unit at whose end it ends.
pub(super) const WINDOWS: [(&str, i64, Milliseconds); 3] =
    [("24h", 24, HOUR), ("7d", 7, DAY), ("30d", 30, DAY)];

/// From when until when a window reaches: the unit of `now` is its last.
pub(super) fn window(number: usize, now: Milliseconds) -> (Milliseconds, Milliseconds) {
    let (_, units, unit) = WINDOWS[number];
    let until = now - now.rem_euclid(unit) + unit;
    (until - units * unit, until)
}

/// What is expected of a device that was heard of.
#[derive(Debug, Clone, Copy)]
pub(super) struct DeviceExpected {
    pub(super) figures: Figures,
    /// Failures within each of [`WINDOWS`].
    pub(super) failures: [u64; 3],
}

/// What is expected of a fleet.
pub(super) struct Expected {
    /// `None` for a device of which nothing was acknowledged.
    pub(super) devices: Vec<Option<DeviceExpected>>,
    pub(super) all: Sums,
    pub(super) windows: [Sums; 3],
}

impl Expected {
    /// At the server's time `now`.
    pub(super) fn new(fleet: &Arc<Fleet>, record: &Record, now: Milliseconds) -> Self {
        let mut expected =
            Self { devices: Vec::new(), all: Sums::default(), windows: [Sums::default(); 3] };
        for device in 0..fleet.plan.devices {
            let events: Vec<_> =
                acknowledged(fleet, record, device).map(|(_, stored)| stored).collect();
            if events.is_empty() {
                expected.devices.push(None);
                continue;
            }
            let figures = Figures::of(&events);
            expected.all.add(&figures.sums);
            let failures = [0, 1, 2].map(|number| {
                let (from, until) = window(number, now);
                let within = events.iter().filter(|event| (from..until).contains(&event.date));
                let sums = Sums::of(within);
                expected.windows[number].add(&sums);
                sums.failed
            });
            expected.devices.push(Some(DeviceExpected { figures, failures }));
        }
        expected
    }

    /// The devices that were heard of, by their numbers.
    pub(super) fn known(&self) -> impl Iterator<Item = (u32, &DeviceExpected)> {
        (0..).zip(&self.devices).filter_map(|(device, expected)| Some((device, expected.as_ref()?)))
    }
}

/// The events of a device that the server has acknowledged.
pub(super) fn acknowledged<'a>(
    fleet: &'a Arc<Fleet>,
    record: &'a Record,
    device: u32,
) -> impl Iterator<Item = (Event, Stored)> + 'a {
    Runs::new(fleet, device).filter_map(move |event| {
        let id = record.id(device, event.number)?;
        let date = event.date().or_else(|| record.arrival(device, event.number))?;
        let Event { job, files, errors, speed, .. } = event;
        Some((event, Stored { date, id, job, files, errors, speed }))
    })
}
