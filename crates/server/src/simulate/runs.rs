//! The runs of one simulated device, in the order in which they happen. `timeline` puts their reports in the order of
//! delivery; `expected` makes the same runs once more to know what was sent.

use std::sync::Arc;

use super::{
    dice::{Dice, Subject},
    event::{DAY, Dated, Event, MINUTE, Milliseconds, Note, SECOND},
    fleet::{ClockKind, Device, Fleet, LONGEST_RUN, whole},
    patterns::{Episode, Trouble},
};

/// How many of a thousand reports are sent once more, as if the answer were lost.
const SENT_AGAIN: u64 = 15;

/// Makes a device's reports, one run after the other.
pub(super) struct Runs {
    fleet: Arc<Fleet>,
    number: u32,
    device: Device,
    episodes: Vec<Episode>,
    dice: Dice,
    /// When each job runs next.
    next: Vec<Milliseconds>,
    made: u32,
    /// The device has lost power since its last run.
    was_off: bool,
}

impl Runs {
    pub(super) fn new(fleet: &Arc<Fleet>, number: u32) -> Self {
        let (plan, device) = (&fleet.plan, fleet.device(number));
        let jobs = i64::from(plan.jobs);
        let from = plan.from();
        let phases = (0..jobs).map(|job| (device.phase + plan.every / jobs * job) % plan.every);
        // Cron starts jobs by the clock, wherever the simulation begins.
        let next = phases.map(|phase| from + (phase - from).rem_euclid(plan.every)).collect();
        Self {
            episodes: fleet.episodes(number),
            dice: Dice::new(plan.seed, Subject::Runs, number.into()),
            fleet: Arc::clone(fleet),
            number,
            device,
            next,
            made: 0,
            was_off: false,
        }
    }

    /// When the next run begins, or might begin if there is power.
    pub(super) fn next_time(&self) -> Option<Milliseconds> {
        if self.made == 0 {
            return Some(self.fleet.plan.from());
        }
        self.next.iter().min().copied().filter(|time| *time < self.fleet.plan.end())
    }

    /// Forgets what was over before `time`.
    pub(super) fn forget_before(&mut self, time: Milliseconds) {
        self.episodes.retain(|episode| episode.until > time);
        self.episodes.shrink_to_fit();
    }

    fn is_in(&self, trouble: Trouble, time: Milliseconds) -> bool {
        self.episodes.iter().any(|episode| episode.trouble == trouble && episode.holds_at(time))
    }

    /// The report with which a device makes itself known at the beginning.
    fn first(&mut self) -> Event {
        self.made = 1;
        let from = self.fleet.plan.from();
        Event {
            number: 0,
            job: 0,
            timestamp: from,
            dated: Dated::Exactly,
            files: 0,
            errors: 0,
            speed: None,
            duration: SECOND,
            bytes: 0,
            note: None,
            due: from,
            is_late: false,
            again_after: None,
        }
    }

    fn run(&mut self, job: u8, scheduled: Milliseconds) -> Event {
        let last = self.fleet.plan.end() - 1;
        let time = (scheduled + self.dice.between(0, 20 * SECOND)).min(last);
        let mut event = self.outcome(job, time);
        (event.timestamp, event.dated) = self.dated(time);
        self.was_off = false;
        (event.due, event.is_late) = self.delivery(time + event.duration);
        if self.fleet.plan.patterns.repeats && self.dice.chance(SENT_AGAIN) {
            event.again_after = Some(self.dice.between(MINUTE, 360 * MINUTE));
        }
        event.number = self.made;
        self.made += 1;
        event
    }

    /// What a run at `time` comes to.
    fn outcome(&mut self, job: u8, time: Milliseconds) -> Event {
        let is_slow = self.is_in(Trouble::SlowLink, time);
        let percent = if is_slow { self.dice.between(2, 10) } else { self.dice.between(70, 130) };
        let speed = i64::from(self.device.speed) * percent / 100;
        let speed = u32::try_from(speed).unwrap_or_default().max(1);
        let is_unlucky = self.dice.chance(self.device.unlucky);
        let note = if self.is_in(Trouble::CertificateExpired, time) {
            Some(Note::Certificate)
        } else if self.is_in(Trouble::DiskFull, time) {
            Some(Note::DiskFull)
        } else if is_slow && self.dice.chance(250) {
            Some(Note::SlowLink)
        } else {
            is_unlucky.then_some(Note::Unlucky)
        };
        let files = whole(self.dice.log_normal(24.0, 1.5).min(1e6));
        let size = whole(self.dice.log_normal(300_000.0, 1.5).min(1e8));
        let errors = whole(self.dice.log_normal(2.0, 1.0)).max(1);
        let (files, errors) = match note {
            None => (files, 0),
            Some(Note::Certificate) => (0, 1),
            Some(Note::DiskFull) => (0, errors),
            Some(Note::SlowLink | Note::Unlucky) => (files / 2, errors),
        };
        let bytes = u64::from(files) * u64::from(size);
        // Hundredths of Mbps times 10 are bits a millisecond.
        let duration = bytes.saturating_mul(8) / (u64::from(speed) * 10);
        let duration = i64::try_from(duration).unwrap_or(LONGEST_RUN);
        // Some runs transfer too little to measure a speed.
        let is_measured = note != Some(Note::Certificate) && files > 2;
        Event {
            number: 0,
            job,
            timestamp: time,
            dated: Dated::Exactly,
            files,
            errors,
            speed: is_measured.then_some(speed),
            duration: (duration + self.dice.between(800, 4_000)).min(LONGEST_RUN),
            bytes,
            note,
            due: time,
            is_late: false,
            again_after: None,
        }
    }

    /// The date of a run at `time`, by the device's clock.
    fn dated(&mut self, time: Milliseconds) -> (Milliseconds, Dated) {
        match self.device.clock {
            ClockKind::Exact => (time, Dated::Exactly),
            ClockKind::ByDay => (time, Dated::ByDay),
            ClockKind::Drifting { offset, per_day } => {
                let days = (time - self.fleet.plan.from()) / DAY;
                // A server refuses what is dated more than five minutes ahead.
                (time + (offset + per_day * days).min(2 * MINUTE), Dated::Exactly)
            }
            ClockKind::YearsBack => {
                let day = time.div_euclid(DAY).unsigned_abs();
                let of_day = u64::from(self.number) | day << 32;
                let mut dice = Dice::new(self.fleet.plan.seed, Subject::Runs, of_day);
                let years = if dice.chance(300) { dice.between(3, 20) } else { 0 };
                (time - years * 365 * DAY, Dated::Exactly)
            }
            ClockKind::Unsynced => {
                let is_unsynced = self.dice.chance(60) || self.was_off;
                (time, if is_unsynced { Dated::ByArrival } else { Dated::Exactly })
            }
        }
    }

    /// When a report that is ready at `ready` can be delivered, and whether it had to wait.
    fn delivery(&mut self, ready: Milliseconds) -> (Milliseconds, bool) {
        let mut due = ready;
        let mut is_late = false;
        let keeps = |trouble| matches!(trouble, Trouble::Offline | Trouble::NoPower);
        while let Some(end) = self
            .episodes
            .iter()
            .filter(|episode| keeps(episode.trouble) && episode.holds_at(due))
            .map(|episode| episode.until)
            .max()
        {
            due = end + SECOND;
            is_late = true;
        }
        if is_late && self.device.newest_first {
            due += self.fleet.plan.every + LONGEST_RUN;
        }
        (due, is_late)
    }
}

impl Iterator for Runs {
    type Item = Event;

    fn next(&mut self) -> Option<Event> {
        if self.made == 0 {
            return Some(self.first());
        }
        loop {
            let (job, time) =
                self.next.iter().copied().enumerate().min_by_key(|(_, time)| *time)?;
            if time >= self.fleet.plan.end() {
                return None;
            }
            self.next[job] += self.fleet.plan.every;
            if self.is_in(Trouble::NoPower, time) {
                self.was_off = true;
                continue;
            }
            return Some(self.run(u8::try_from(job).unwrap_or_default(), time));
        }
    }
}
