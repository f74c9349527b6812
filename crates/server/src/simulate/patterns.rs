//! What goes wrong in a simulated fleet, and when: a disk fills, a link slows, a school loses power, a certificate expires,
//! a device cannot report for days. `fleet` asks for the episodes of regions, schools and devices; `runs` obeys them.

use super::{
    PatternSet, Plan,
    dice::{Dice, Subject},
    event::{DAY, HOUR, Milliseconds},
};

/// What happens in an episode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Trouble {
    /// Every run fails until somebody makes space.
    DiskFull,
    /// Runs are slow, and some time out.
    SlowLink,
    /// Nothing runs. A device that comes back does not know the time yet.
    NoPower,
    /// Every run of a region fails until the certificate is renewed.
    CertificateExpired,
    /// Runs succeed, but their reports wait on the device.
    Offline,
}

/// Something that lasts from a time until another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Episode {
    pub(super) trouble: Trouble,
    pub(super) from: Milliseconds,
    pub(super) until: Milliseconds,
}

impl Episode {
    pub(super) fn holds_at(&self, time: Milliseconds) -> bool {
        (self.from..self.until).contains(&time)
    }
}

/// How often a trouble comes and how long it lasts, in hours.
struct Habit {
    trouble: Trouble,
    mean_gap: Milliseconds,
    lasts: (i64, i64),
}

/// Draws episodes for the simulated span.
pub(super) struct Patterns {
    seed: u64,
    from: Milliseconds,
    until: Milliseconds,
    set: PatternSet,
}

impl Patterns {
    pub(super) fn new(plan: &Plan) -> Self {
        Self { seed: plan.seed, from: plan.from(), until: plan.end(), set: plan.patterns }
    }

    pub(super) fn of_region(&self, region: u64) -> Vec<Episode> {
        self.draw(
            Dice::new(self.seed, Subject::Region, region),
            &[(
                self.set.certificate,
                Habit { trouble: Trouble::CertificateExpired, mean_gap: 60 * DAY, lasts: (1, 5) },
            )],
        )
    }

    pub(super) fn of_school(&self, school: u64) -> Vec<Episode> {
        self.draw(
            Dice::new(self.seed, Subject::School, school),
            &[(
                self.set.power,
                Habit { trouble: Trouble::NoPower, mean_gap: 25 * DAY, lasts: (1, 12) },
            )],
        )
    }

    pub(super) fn of_device(&self, device: u64) -> Vec<Episode> {
        // A stream beside the one that says what the device is like.
        let dice = Dice::new(self.seed, Subject::Device, device | 1 << 32);
        self.draw(
            dice,
            &[
                (
                    self.set.disk,
                    Habit { trouble: Trouble::DiskFull, mean_gap: 120 * DAY, lasts: (6, 72) },
                ),
                (
                    self.set.link,
                    Habit { trouble: Trouble::SlowLink, mean_gap: 90 * DAY, lasts: (4, 48) },
                ),
                (
                    self.set.offline,
                    Habit { trouble: Trouble::Offline, mean_gap: 60 * DAY, lasts: (3, 72) },
                ),
            ],
        )
    }

    /// Short simulations see everything, too: there, troubles come more often and last less long.
    fn draw(&self, mut dice: Dice, habits: &[(bool, Habit)]) -> Vec<Episode> {
        let span = self.until - self.from;
        let mut episodes = Vec::new();
        for (_, Habit { trouble, mean_gap, lasts }) in habits.iter().filter(|(is_on, _)| *is_on) {
            let mean_gap = (*mean_gap).min(span);
            let mut from = self.from;
            loop {
                from += dice.between(0, 2 * mean_gap);
                let lasting = dice.between(lasts.0 * HOUR, lasts.1 * HOUR).min(span / 3);
                if from >= self.until {
                    break;
                }
                let until = from + lasting.max(1);
                episodes.push(Episode { trouble: *trouble, from, until });
                from = until;
            }
        }
        episodes
    }
}
