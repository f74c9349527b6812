//! Who belongs to a simulated fleet: devices, their schools and regions, and what each device is like. All of it follows
//! from the seed and the options.

use std::fmt::Write as _;

use super::{
    Clocks, Plan,
    dice::{Dice, Subject},
    event::{HOUR, MINUTE, Milliseconds, SECOND},
    patterns::{Episode, Patterns},
};

const REGIONS: [&str; 8] =
    ["North", "South", "East", "West", "Coast", "Lakes", "Highlands", "Valley"];

const SCHOOLS: [&str; 24] = [
    "Hillside",
    "Riverside",
    "Oakwood",
    "Maple Street",
    "St. Anne",
    "Green Park",
    "Lakeview",
    "Old Town",
    "Bridge Road",
    "Pine Grove",
    "Harbour",
    "Mill Lane",
    "Sunrise",
    "Elm Court",
    "Station Road",
    "Castle",
    "Orchard",
    "Meadow",
    "Northgate",
    "Westfield",
    "Forest",
    "Market Square",
    "Chapel Hill",
    "Spring Valley",
];

const JOBS: [&str; 4] = ["nightly-backup", "photos", "documents", "lessons"];

/// Devices of a school when there are no groups. Power still fails for whole schools.
const UNGROUPED_SCHOOL: u32 = 25;

/// How a device's clock is wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ClockKind {
    Exact,
    /// It is off by this at the start, and gains or loses this many milliseconds a day.
    Drifting {
        offset: Milliseconds,
        per_day: Milliseconds,
    },
    /// On some days it shows a year long past.
    YearsBack,
    /// After a start, and now and then, the device does not trust it.
    Unsynced,
    /// Its script sends a date without a time.
    ByDay,
}

/// What a device is like.
#[derive(Debug, Clone)]
pub(super) struct Device {
    pub(super) clock: ClockKind,
    /// When in each interval it runs its first job.
    pub(super) phase: Milliseconds,
    /// Its usual speed, in hundredths of Mbps.
    pub(super) speed: u32,
    /// How many of a thousand runs fail for no other reason.
    pub(super) unlucky: u64,
    /// Whether it sends its newest report before those that it kept while it was offline.
    pub(super) newest_first: bool,
}

/// A simulated fleet.
#[derive(Debug)]
pub(super) struct Fleet {
    pub(super) plan: Plan,
    /// What the ids of its devices begin with.
    pub(super) prefix: String,
    jobs: Vec<Option<String>>,
    /// The number of the first device of each school, and the number of all devices.
    first_devices: Vec<u32>,
    /// What befalls each school, its region's troubles included.
    school_episodes: Vec<Vec<Episode>>,
}

impl Fleet {
    pub(super) fn new(plan: Plan) -> Self {
        let schools = match plan.groups {
            0 => plan.devices.div_ceil(UNGROUPED_SCHOOL),
            groups => groups,
        };
        let first_devices = first_devices(&plan, schools);
        let patterns = Patterns::new(&plan);
        let regions: Vec<_> =
            (0..REGIONS.len()).map(|region| patterns.of_region(region as u64)).collect();
        let school_episodes = (0..schools)
            .map(|school| {
                let mut episodes = patterns.of_school(school.into());
                episodes.extend_from_slice(&regions[school as usize % REGIONS.len()]);
                episodes
            })
            .collect();
        let jobs = (0..plan.jobs).map(|job| match usize::from(job) {
            0 => None,
            job => {
                Some(JOBS.get(job - 1).map_or_else(|| format!("job-{job}"), ToString::to_string))
            }
        });
        let jobs = jobs.collect();
        let prefix = format!("sim-{}-", plan.seed);
        Self { prefix, jobs, first_devices, school_episodes, plan }
    }

    /// The name of a job; `None` for the job without a name.
    pub(super) fn job(&self, job: u8) -> Option<&str> {
        self.jobs.get(usize::from(job))?.as_deref()
    }

    pub(super) fn write_device_id(&self, device: u32, text: &mut String) {
        // Writing to a string never fails.
        let _ = write!(text, "{}{device:06}", self.prefix);
    }

    pub(super) fn device_id(&self, device: u32) -> String {
        let mut text = String::new();
        self.write_device_id(device, &mut text);
        text
    }

    /// The number of the device with this id, if it is of this fleet.
    pub(super) fn number_of(&self, device_id: &str) -> Option<u32> {
        let digits = device_id.strip_prefix(&self.prefix)?;
        let number = digits.parse().ok().filter(|number| *number < self.plan.devices)?;
        (self.device_id(number) == device_id).then_some(number)
    }

    /// The school of a device.
    fn school(&self, device: u32) -> usize {
        self.first_devices.partition_point(|first| *first <= device).saturating_sub(1)
    }

    /// The group of a device; `None` when the fleet has none.
    pub(super) fn group(&self, device: u32) -> Option<String> {
        (self.plan.groups > 0).then(|| group_name(self.school(device)))
    }

    pub(super) fn device(&self, device: u32) -> Device {
        let mut dice = Dice::new(self.plan.seed, Subject::Device, device.into());
        let every = self.plan.every;
        // Half of all scripts are started by cron on the hour. A load test has no such peaks.
        let on_the_hour = dice.chance(500) && self.plan.has_peaks;
        let phase =
            dice.between(0, if on_the_hour { (20 * SECOND).min(every - 1) } else { every - 1 });
        let clock = clock(&mut dice, self.plan.clocks);
        let speed = dice.log_normal(3_000.0, 1.2).clamp(100.0, 100_000.0);
        let unlucky = if dice.chance(30) { 200 } else { 8 };
        Device { clock, phase, speed: whole(speed), unlucky, newest_first: dice.chance(500) }
    }

    /// What befalls a device, in no order.
    pub(super) fn episodes(&self, device: u32) -> Vec<Episode> {
        let mut episodes = Patterns::new(&self.plan).of_device(device.into());
        episodes.extend_from_slice(&self.school_episodes[self.school(device)]);
        episodes
    }
}

/// A number without its fraction.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "clamped before; `as` saturates"
)]
pub(super) fn whole(number: f64) -> u32 {
    number as u32
}

fn clock(dice: &mut Dice, clocks: Clocks) -> ClockKind {
    let drawn = dice.below(1_000);
    let offset = dice.between(-10 * MINUTE, MINUTE);
    let per_day = dice.between(-20 * SECOND, 2 * SECOND);
    match drawn {
        0..150 if clocks.drifting => ClockKind::Drifting { offset, per_day },
        150..190 if clocks.years_back => ClockKind::YearsBack,
        190..240 if clocks.unsynced => ClockKind::Unsynced,
        240..260 if clocks.by_day => ClockKind::ByDay,
        _ => ClockKind::Exact,
    }
}

/// `Region / School`.
fn group_name(school: usize) -> String {
    let (region, of_region) = (REGIONS[school % REGIONS.len()], school / REGIONS.len());
    let name = SCHOOLS[of_region % SCHOOLS.len()];
    match of_region / SCHOOLS.len() {
        0 => format!("{region} / {name}"),
        again => format!("{region} / {name} {}", again + 1),
    }
}

/// Distributes the devices over schools of log-normal sizes, each of which gets at least one.
fn first_devices(plan: &Plan, schools: u32) -> Vec<u32> {
    let mut dice = Dice::new(plan.seed, Subject::GroupSizes, 0);
    let weights: Vec<f64> = (0..schools).map(|_| dice.log_normal(1.0, 1.2)).collect();
    let all: f64 = weights.iter().sum();
    let spare = f64::from(plan.devices - schools);
    let (mut firsts, mut before) = (Vec::with_capacity(weights.len() + 1), 0.0);
    for (weight, school) in weights.iter().zip(0..) {
        firsts.push(school + whole(spare * (before / all)));
        before += weight;
    }
    firsts
}

/// The longest time that a simulated run takes.
pub(super) const LONGEST_RUN: Milliseconds = HOUR / 3;

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn schools_differ_in_size_and_none_is_empty() {
        let fleet = Fleet::new(Plan { devices: 5_000, groups: 200, ..Plan::example() });
        let mut sizes: BTreeMap<String, u32> = BTreeMap::new();
        for device in 0..5_000 {
            *sizes.entry(fleet.group(device).unwrap()).or_default() += 1;
        }
        assert_eq!(sizes.len(), 200);
        let (least, most) = (sizes.values().min().unwrap(), sizes.values().max().unwrap());
        assert!(*least < 10 && *most > 80, "{least} {most}");
        assert!(sizes.contains_key("North / Hillside") && sizes.contains_key("North / Hillside 2"));
    }

    #[test]
    fn ids_are_found_again() {
        let fleet = Fleet::new(Plan { seed: 7, ..Plan::example() });
        assert_eq!(fleet.device_id(3), "sim-7-000003");
        assert_eq!(fleet.number_of("sim-7-000003"), Some(3));
        for other in ["sim-7-3", "sim-77-000003", "pi", "sim-7-+00003", "sim-7-999999"] {
            assert_eq!(fleet.number_of(other), None, "{other}");
        }
    }
}
