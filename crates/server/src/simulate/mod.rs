//! A simulated fleet: devices, their troubles and their clocks, as a client of any PiSync server. `cli/simulate` runs it.
//! It sends a history and then live events, keeps its own record of what was acknowledged, and compares the server's
//! answers with what that record adds up to. Nothing here opens a database or knows how a server counts.
//!
//! An event's way: `fleet` and `patterns` say what a device is like, `runs` makes its reports, `timeline` orders them by
//! delivery, `sender` sends them with `client` and notes the ids in `record`. Then `expected` makes the same reports once
//! more, `model` adds them up, and `compare` asks the server.

mod client;
mod compare;
mod dice;
mod differences;
mod event;
mod expected;
mod fleet;
mod load;
mod model;
mod patterns;
mod phases;
mod reader;
mod record;
mod runs;
mod sender;
mod timeline;

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use pisync_core::Timestamp;
use serde_json::Value;

pub use self::{
    client::{Address, Servers},
    compare::Compared,
    differences::{Difference, Differences},
    load::Load,
};
use self::{
    event::Milliseconds, fleet::Fleet, reader::Reader, record::Record, runs::Runs, sender::Shared,
};
use crate::clock::Clock;

/// How far the server's clock may be from this machine's.
const CLOCKS_APART: Milliseconds = event::MINUTE;

/// What can go wrong in a fleet.
#[derive(Debug, Clone, Copy, Default)]
pub struct PatternSet {
    /// A device's disk fills.
    pub disk: bool,
    /// A device's link slows.
    pub link: bool,
    /// A school loses power.
    pub power: bool,
    /// A region's certificate expires.
    pub certificate: bool,
    /// A device cannot report for hours or days, and delivers later.
    pub offline: bool,
    /// A device sends a report once more.
    pub repeats: bool,
}

/// Which clocks there are, besides exact ones.
#[derive(Debug, Clone, Copy, Default)]
pub struct Clocks {
    /// Off by minutes, and more so every day.
    pub drifting: bool,
    /// Years back on some days.
    pub years_back: bool,
    /// Not trusted by their devices now and then.
    pub unsynced: bool,
    /// Of scripts that send the date alone.
    pub by_day: bool,
}

/// What decides which events a fleet sends. The same plan sends the same events.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Chooses everything that is random.
    pub seed: u64,
    /// How many devices.
    pub devices: u32,
    /// How many groups they are in; none for 0.
    pub groups: u32,
    /// How many jobs each device has.
    pub jobs: u8,
    /// The milliseconds from one run of a job to the next.
    pub every: i64,
    /// The milliseconds of history.
    pub history: i64,
    /// The simulated milliseconds that are sent live.
    pub live: i64,
    /// When the history ends and the live part begins, in milliseconds since 1970.
    pub until: i64,
    /// Whether half of all devices run on the hour; otherwise runs are spread evenly.
    pub has_peaks: bool,
    /// What goes wrong.
    pub patterns: PatternSet,
    /// How clocks are wrong.
    pub clocks: Clocks,
}

impl Plan {
    fn from(&self) -> Milliseconds {
        self.until - self.history
    }

    fn end(&self) -> Milliseconds {
        self.until + self.live
    }

    /// For tests.
    #[cfg(test)]
    fn example() -> Self {
        Self {
            seed: 1,
            devices: 20,
            groups: 4,
            jobs: 1,
            every: event::HOUR,
            history: 3 * event::DAY,
            live: 0,
            until: 1_795_348_800_000,
            has_peaks: true,
            patterns: PatternSet {
                disk: true,
                link: true,
                power: true,
                certificate: true,
                offline: true,
                repeats: true,
            },
            clocks: Clocks { drifting: true, years_back: true, unsynced: true, by_day: true },
        }
    }
}

/// How live events are paced.
#[derive(Debug, Clone, Copy)]
pub enum Pace {
    /// Simulated time passes so many times as fast.
    Speed(f64),
    /// So many events a second, whenever they would have come.
    Rate(f64),
}

/// How a fleet is sent.
#[derive(Debug)]
pub struct Sending {
    /// Where to.
    pub servers: Arc<Servers>,
    /// Connections that send at the same time.
    pub connections: usize,
    /// Events in a request of the history.
    pub batch: usize,
    /// The pace of live events.
    pub pace: Pace,
    /// How long a request is sent again and again.
    pub patience: Duration,
    /// Devices whose entire histories are compared; `None` to compare nothing.
    pub sample: Option<u32>,
}

/// Why a simulation did not come to its end.
#[derive(Debug, thiserror::Error)]
pub enum SimulateError {
    /// It cannot work in this way.
    #[error("{0}")]
    Failed(String),
    /// The server could not be asked.
    #[error("{0}")]
    Unanswered(String),
}

/// What is going on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// The first report of each device.
    Devices,
    /// Each device is put into its group.
    Groups,
    /// The history.
    History,
    /// Live events.
    Live,
    /// The server's answers are compared.
    Compare,
}

impl Stage {
    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Devices => "devices",
            Self::Groups => "groups",
            Self::History => "history",
            Self::Live => "live",
            Self::Compare => "compare",
        }
    }
}

/// How far a simulation is: the stage, how much there is to do in it, and how much is done. Zero means unknown.
pub type Report<'a> = &'a mut (dyn FnMut(Stage, u64, u64) + Send);

/// What a simulation found.
#[derive(Debug)]
pub struct Outcome {
    /// Events of the fleet, each counted once.
    pub events: u64,
    /// The cost of each phase that sent something.
    pub phases: Vec<(Stage, Load)>,
    /// What was compared; `None` when nothing was.
    pub compared: Option<Compared>,
}

/// A simulated fleet that is ready to be sent.
#[derive(Debug)]
pub struct Simulation {
    fleet: Arc<Fleet>,
}

impl Simulation {
    /// The fleet of this plan.
    #[must_use]
    pub fn new(plan: Plan) -> Self {
        Self { fleet: Arc::new(Fleet::new(plan)) }
    }

    /// Gives each event of the fleet as the line that is sent for it, device by device.
    pub fn print(&self, mut each: impl FnMut(&str)) {
        let mut line = String::new();
        for device in 0..self.fleet.plan.devices {
            for event in Runs::new(&self.fleet, device) {
                line.clear();
                event.write(&self.fleet, device, &mut line);
                line.push('\n');
                each(&line);
            }
        }
    }

    /// Sends everything and compares the server's answers.
    ///
    /// # Errors
    /// When it cannot be sent or compared. Differences are no error.
    pub async fn run(
        &self,
        sending: &Sending,
        clock: &Clock,
        report: Report<'_>,
    ) -> Result<Outcome, SimulateError> {
        let mut reader = Reader::new(&sending.servers, sending.patience);
        check_clock(&mut reader, clock).await?;
        let before = match sending.sample {
            Some(_) => self.before(&mut reader).await?,
            None => Value::Null,
        };
        let fleet = &self.fleet;
        let record =
            Record::new((0..fleet.plan.devices).map(|device| Runs::new(fleet, device).count()));
        let shared = Arc::new(Shared {
            fleet: Arc::clone(fleet),
            servers: Arc::clone(&sending.servers),
            record,
            patience: sending.patience,
            done: AtomicU64::new(0),
            differences: Mutex::default(),
        });
        let events = shared.record.events() as u64;
        let phases = phases::send(&shared, sending, report).await?;
        let compared = match sending.sample {
            None => None,
            Some(sample) => {
                let devices = fleet.plan.devices;
                let total = u64::from(devices) + u64::from(sample.min(devices));
                let comparing = compare::compare(&shared, &mut reader, &before, sample);
                let counting =
                    || report(Stage::Compare, shared.done.load(Ordering::Relaxed), total);
                let mut compared = phases::reporting(comparing, counting).await?;
                let mut answers =
                    shared.differences.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                let mut differences = std::mem::take(&mut *answers);
                differences.append(std::mem::take(&mut compared.differences));
                Some(Compared { differences, ..compared })
            }
        };
        Ok(Outcome { events, phases, compared })
    }

    /// The statistics before the first event; null on a server without devices.
    async fn before(&self, reader: &mut Reader) -> Result<Value, SimulateError> {
        let stats = reader.data("/api/stats").await?;
        if stats["total_devices"] == 0 {
            return Ok(Value::Null);
        }
        let prefix = &self.fleet.prefix;
        let mine = reader.data(&format!("/api/devices?limit=1000&q={prefix}")).await?;
        let mine = mine["devices"].as_array().into_iter().flatten();
        if mine.filter_map(|device| device["device_id"].as_str()).any(|id| id.starts_with(prefix)) {
            return Err(SimulateError::Failed(format!(
                "the server has devices {prefix}… already, from a simulation with this seed: take another --seed, or a server with an empty database"
            )));
        }
        Ok(stats)
    }
}

/// A fleet dates its events by this machine's clock, and the server judges them by its own.
async fn check_clock(reader: &mut Reader, clock: &Clock) -> Result<(), SimulateError> {
    let told = reader.now().await?;
    let here = clock.now().as_millisecond();
    if (told - here).abs() > CLOCKS_APART {
        let time = |time| {
            Timestamp::from_millisecond(time).map(|time| time.to_string()).unwrap_or_default()
        };
        let (told, here) = (time(told), time(here));
        return Err(SimulateError::Failed(format!(
            "the server's clock says {told} and this machine's {here}: set the one that is wrong"
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn printed(plan: Plan) -> Vec<String> {
        let mut lines = Vec::new();
        Simulation::new(plan).print(|line| lines.push(line.to_owned()));
        lines
    }

    /// What is printed is what is sent: both are `Event::write`.
    #[test]
    fn the_same_plan_sends_the_same_bytes() {
        let lines = printed(Plan::example());
        assert_eq!(lines, printed(Plan::example()));
        assert_ne!(lines, printed(Plan { seed: 2, ..Plan::example() }));
        // Whoever wrote a seed down must get the same fleet from a later version.
        let all = lines.concat();
        assert_eq!((lines.len(), crc32fast::hash(all.as_bytes())), (1_454, 782_734_873));
    }

    #[test]
    fn every_pattern_and_every_clock_comes_up() {
        let plan = Plan { devices: 300, groups: 40, history: 2 * event::DAY, ..Plan::example() };
        let lines = printed(plan.clone());
        let count = |text: &str| lines.iter().filter(|line| line.contains(text)).count();
        for text in [
            "no space left",
            "timed out",
            "has expired",
            "connection reset",
            "unsynced",
            "\"timestamp\":\"2026-11-22\"",
        ] {
            assert!(count(text) > 3, "{text}: {}", count(text));
        }
        assert!(lines.iter().any(|line| !line.contains("\"timestamp\":\"2026-11-2")), "years back");
        // Outages leave gaps, and late reports come after newer ones, some of them twice.
        assert!(lines.len() < 300 * 49);
        let fleet = Arc::new(Fleet::new(plan));
        let (mut late, mut again, mut newer_before) = (0, 0, 0);
        for device in 0..300 {
            let (mut sent, mut latest) = (0, 0);
            for delivery in timeline::Timeline::new(&fleet, device) {
                late += u32::from(delivery.event.is_late);
                again += u32::from(delivery.is_again);
                sent += usize::from(!delivery.is_again);
                newer_before += u32::from(!delivery.is_again && delivery.event.number < latest);
                latest = latest.max(delivery.event.number);
            }
            assert_eq!(sent + 1, Runs::new(&fleet, device).count());
        }
        assert!(late > 50 && again > 50 && newer_before > 10, "{late} {again} {newer_before}");
    }
}
