//! When troubles of devices are an incident of each, when of their whole group, and when of the fleet.

use super::state::ProblemKind;
use crate::Timestamp;

/// How many devices must be missing for an incident of the fleet, and in how many groups at least.
pub const FLEET_AT_LEAST: u32 = 20;
const FLEET_GROUPS: u32 = 2;

/// For how long a device may have a problem, at least, before it no longer counts for its group, in milliseconds: 6 hours.
pub const LEAST_LONG: i64 = 6 * 60 * 60 * 1000;

/// Within this time the same incident is opened again instead of a new one, in milliseconds: 6 hours.
pub const REOPENED_WITHIN: i64 = 6 * 60 * 60 * 1000;

/// The third reopening within this time is flapping, in milliseconds: 24 hours.
pub const FLAPPING_WITHIN: i64 = 24 * 60 * 60 * 1000;
const FLAPPING_REOPENINGS: usize = 3;

/// For how long few enough must be missing before the incident of a group ends, in milliseconds: 5 minutes.
pub const CALM_FOR: i64 = 5 * 60 * 1000;

/// For how long a flapping device must be well, at least, in milliseconds: an hour.
const LEAST_CALM_OF_FLAPPING: i64 = 60 * 60 * 1000;

/// What an incident is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum IncidentScope {
    /// One device.
    Device,
    /// Most devices of a group.
    Group,
    /// Most devices of the fleet.
    Fleet,
    /// A channel by which people are told.
    Channel,
}

impl IncidentScope {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Device, Self::Group, Self::Fleet, Self::Channel];

    /// The word that stands for it, in answers and in the database.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Device => "device",
            Self::Group => "group",
            Self::Fleet => "fleet",
            Self::Channel => "channel",
        }
    }

    /// The one that a word stands for.
    #[must_use]
    pub fn from_word(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|scope| scope.as_str() == word)
    }
}

/// Why an incident has ended. An incident of many devices ends for the reason of most of those that left it last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resolution {
    /// A report ended it; or the share of devices that have the problem fell.
    Recovered,
    /// A success that came late, dated before the incident was opened.
    LateReport,
    /// Somebody changed what is expected, from how many devices on a group has an incident, or in which groups devices are.
    Policy,
    /// Somebody paused the device, its group, or the fleet.
    Paused,
    /// The device was deleted, or the group: nothing is in it any more.
    Deleted,
    /// The incident of its group, or of the fleet, took it over before anybody was told.
    Merged,
}

impl Resolution {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::Recovered,
        Self::LateReport,
        Self::Policy,
        Self::Paused,
        Self::Deleted,
        Self::Merged,
    ];

    /// The word that stands for it, in answers and in the database.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Recovered => "recovered",
            Self::LateReport => "late_report",
            Self::Policy => "policy",
            Self::Paused => "paused",
            Self::Deleted => "deleted",
            Self::Merged => "merged",
        }
    }
}

/// From how many missing devices on a group, or the fleet, has an incident.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Threshold {
    /// So many.
    pub at_least: u32,
    /// And so many of each hundred that are at risk.
    pub percent: u32,
    /// In so many groups.
    pub groups: u32,
    /// Whether all of two or more are enough.
    pub takes_all: bool,
}

impl Threshold {
    /// That of a group; `is_named` is false for the devices that are in none.
    #[must_use]
    pub fn of_group(at_least: u32, percent: u32, is_named: bool) -> Self {
        Self { at_least, percent, groups: 1, takes_all: is_named }
    }

    /// That of the fleet.
    #[must_use]
    pub fn of_fleet(percent: u32) -> Self {
        Self { at_least: FLEET_AT_LEAST, percent, groups: FLEET_GROUPS, takes_all: false }
    }
}

/// How the devices of a group, or of the fleet, are doing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tally {
    /// How many are not paused and expected to report.
    pub judged: i64,
    /// How many have the problem, but not for long.
    pub in_problem: i64,
    /// How many have had it for so long that they no longer count.
    pub long_in_problem: i64,
    /// Since when the first of those has it that have it not for long.
    pub since: Option<Timestamp>,
    /// How many are only late.
    pub late: i64,
    /// How many, late or silent, became late after anybody was last heard.
    pub late_in_dark: i64,
    /// In how many groups devices are missing.
    pub groups: i64,
}

impl Tally {
    /// How many are at risk.
    #[must_use]
    pub fn at_risk(&self) -> i64 {
        (self.judged - self.long_in_problem).max(0)
    }

    /// How many are missing: silent, or late.
    #[must_use]
    pub fn missing(&self) -> i64 {
        self.in_problem + self.late
    }
}

/// Whether devices that have just got a problem make it one of all.
#[must_use]
pub fn opens(kind: ProblemKind, threshold: &Threshold, tally: &Tally) -> bool {
    let (missing, at_risk) = (tally.missing(), tally.at_risk());
    if tally.in_problem == 0 || tally.groups < i64::from(threshold.groups) {
        return false;
    }
    let is_most = missing >= i64::from(threshold.at_least)
        && missing * 100 >= i64::from(threshold.percent) * at_risk;
    let is_silence = kind == ProblemKind::Silent;
    let is_all = is_silence && threshold.takes_all && at_risk >= 2 && missing >= at_risk;
    let is_dark = is_silence && tally.late_in_dark >= i64::from(threshold.at_least);
    is_most || is_all || is_dark
}

/// Whether few enough are missing for the incident of a group to end soon. `missing` are those that are missing since it
/// began.
#[must_use]
pub fn is_calm(threshold: &Threshold, missing: i64, at_risk: i64) -> bool {
    // Fewer than half of the share that opens it, rounded up.
    let enough = (i64::from(threshold.percent) * at_risk + 199) / 200;
    missing < enough.max(1)
}

/// Whether an incident that is opened again is flapping. `reopenings` are when this happened before.
#[must_use]
pub fn is_flapping(reopenings: &[Timestamp], now: Timestamp) -> bool {
    recent(reopenings, now).count() + 1 >= FLAPPING_REOPENINGS
}

/// The reopenings that count for flapping.
pub fn recent(reopenings: &[Timestamp], now: Timestamp) -> impl Iterator<Item = Timestamp> {
    let first = now.saturating_add_milliseconds(-FLAPPING_WITHIN);
    reopenings.iter().copied().filter(move |at| *at >= first)
}

/// For how long a flapping device must be well; `patience` is how long two of its reports may be apart. In milliseconds.
#[must_use]
pub fn calm_of_flapping(patience: Option<i64>) -> i64 {
    patience.unwrap_or(0).saturating_mul(2).max(LEAST_CALM_OF_FLAPPING)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tally(judged: i64, in_problem: i64, long: i64, late: i64, dark: i64) -> Tally {
        Tally {
            judged,
            in_problem,
            long_in_problem: long,
            since: None,
            late,
            late_in_dark: dark,
            groups: 1,
        }
    }

    #[test]
    fn a_group_has_an_incident_when_most_all_or_ever_more_are_missing() {
        let school = Threshold::of_group(5, 50, true);
        let ungrouped = Threshold::of_group(5, 50, false);
        let cases = [
            // Six of ten; four of ten; six of thirteen.
            (school, tally(10, 6, 0, 0, 0), true),
            (school, tally(8, 4, 0, 0, 0), false),
            (school, tally(13, 6, 0, 0, 0), false),
            // Those that have long been down do not count.
            (school, tally(12, 6, 6, 0, 0), true),
            (school, tally(12, 5, 2, 0, 0), true),
            // Late ones count, once one is silent.
            (school, tally(200, 1, 0, 99, 0), true),
            (school, tally(200, 0, 0, 200, 200), false),
            // All of three, of one, and of three that are in no group.
            (school, tally(3, 3, 0, 0, 0), true),
            (school, tally(1, 1, 0, 0, 0), false),
            (ungrouped, tally(3, 3, 0, 0, 0), false),
            // Ever more become late, and nobody is heard.
            (school, tally(200, 1, 0, 4, 5), true),
            (school, tally(200, 1, 0, 4, 4), false),
        ];
        for (threshold, tally, expected) in cases {
            assert_eq!(opens(ProblemKind::Silent, &threshold, &tally), expected, "{tally:?}");
        }
        // Failures are counted, and nothing else.
        assert!(opens(ProblemKind::Failing, &school, &tally(10, 5, 0, 0, 0)));
        assert!(!opens(ProblemKind::Failing, &school, &tally(3, 3, 0, 0, 9)));
    }

    #[test]
    fn the_fleet_has_one_in_two_groups_at_least() {
        let fleet = Threshold::of_fleet(50);
        let in_groups = |groups| Tally { groups, ..tally(30, 20, 0, 0, 0) };
        assert!(opens(ProblemKind::Silent, &fleet, &in_groups(2)));
        assert!(!opens(ProblemKind::Silent, &fleet, &in_groups(1)));
    }

    #[test]
    fn it_ends_when_fewer_than_half_of_the_share_are_missing() {
        let school = Threshold::of_group(5, 50, true);
        assert!(is_calm(&school, 2, 10));
        assert!(!is_calm(&school, 3, 10));
        assert!(is_calm(&school, 0, 0));
        assert!(!is_calm(&school, 1, 2));
    }

    #[test]
    fn the_third_reopening_of_a_day_is_flapping() {
        let at = |hour: i64| Timestamp::from_millisecond(hour * 3_600_000).unwrap();
        assert!(!is_flapping(&[at(1)], at(3)));
        assert!(is_flapping(&[at(1), at(2)], at(3)));
        assert!(!is_flapping(&[at(1), at(2)], at(26)));
        assert_eq!(calm_of_flapping(Some(5_400_000)), 10_800_000);
        assert_eq!(calm_of_flapping(None), 3_600_000);
    }
}
