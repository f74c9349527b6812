//! The only place that reads the wall clock. `app` creates a [`Clock`] and passes it on. Tests pass one that stands
//! still or that they move.
//!
//! A Raspberry Pi has no battery for its clock and may start in 1970. Such a clock must neither date an event nor cause
//! one to be refused. Code that needs the time of an event calls [`Clock::set_time`].

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use pisync_core::Timestamp;

/// How far the clock may be behind the build time of the program, in milliseconds. A day allows for a build machine
/// whose clock was ahead.
const BUILD_MARGIN: i64 = 24 * 60 * 60 * 1000;

/// Tells the time. Cheap to clone.
#[derive(Clone)]
pub struct Clock(Arc<Inner>);

struct Inner {
    now: Box<dyn Fn() -> Timestamp + Send + Sync>,
    /// A correct clock never shows an earlier time.
    earliest: Timestamp,
    /// True if it should agree with the clocks of other machines.
    is_real: bool,
    /// True if the last message in the log says that the clock is not set.
    said_unset: AtomicBool,
}

/// The clock shows a time that is certainly in the past.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "this machine's clock says {now}, and this program was made later than {earliest}; set the clock, or wait until NTP has set it"
)]
pub struct ClockNotSet {
    now: Timestamp,
    earliest: Timestamp,
}

impl Clock {
    /// The machine's clock.
    #[must_use]
    pub fn system() -> Self {
        #[expect(clippy::disallowed_methods, reason = "this is the clock")]
        let now = || Timestamp::truncate(jiff::Timestamp::now());
        Self::new(now).real().not_before(built_at())
    }

    /// A custom clock, which need not agree with any other clock.
    pub fn new(now: impl Fn() -> Timestamp + Send + Sync + 'static) -> Self {
        Self::with(Box::new(now), Timestamp::MIN, false)
    }

    fn with(
        now: Box<dyn Fn() -> Timestamp + Send + Sync>,
        earliest: Timestamp,
        is_real: bool,
    ) -> Self {
        Self(Arc::new(Inner { now, earliest, is_real, said_unset: AtomicBool::new(false) }))
    }

    /// The same clock, marked as one that should agree with databases' clocks.
    #[must_use]
    pub fn real(self) -> Self {
        let earliest = self.0.earliest;
        Self::with(Box::new(move || self.now()), earliest, true)
    }

    /// The same clock. It counts as not set while it shows a time more than a day before `built`.
    #[must_use]
    pub fn not_before(self, built: Timestamp) -> Self {
        let is_real = self.0.is_real;
        let earliest = built.saturating_add_milliseconds(-BUILD_MARGIN);
        Self::with(Box::new(move || self.now()), earliest, is_real)
    }

    /// True if it can be compared with a database's clock.
    #[must_use]
    pub fn is_real(&self) -> bool {
        self.0.is_real
    }

    /// A time that is certainly in the past: shortly before the program was built.
    #[must_use]
    pub fn earliest(&self) -> Timestamp {
        self.0.earliest
    }

    /// The clock's time, in whole milliseconds. It may be wrong.
    #[must_use]
    pub fn now(&self) -> Timestamp {
        (self.0.now)()
    }

    /// The clock's time, if the clock is set.
    ///
    /// # Errors
    /// When the clock is not set.
    pub fn check(&self) -> Result<Timestamp, ClockNotSet> {
        let (now, earliest) = (self.now(), self.0.earliest);
        if now < earliest { Err(ClockNotSet { now, earliest }) } else { Ok(now) }
    }

    /// The clock's time, for a server. It logs once when the clock is not set, and once when it is set again.
    ///
    /// # Errors
    /// When the clock is not set.
    pub fn set_time(&self) -> Result<Timestamp, ClockNotSet> {
        let said_unset = &self.0.said_unset;
        let now = self.check().inspect_err(|error| {
            if !said_unset.swap(true, Ordering::Relaxed) {
                tracing::error!(
                    "{error}; until then events are answered 503 and nothing is deleted"
                );
            }
        })?;
        if said_unset.load(Ordering::Relaxed) && said_unset.swap(false, Ordering::Relaxed) {
            tracing::info!(%now, "the clock is set; events are stored again");
        }
        Ok(now)
    }
}

/// How long the machine has been on, including the time while it was suspended. Nobody can set this clock.
pub(crate) fn uptime() -> Duration {
    #[cfg(target_os = "linux")]
    {
        let time = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
        let seconds = u64::try_from(time.tv_sec).unwrap_or_default();
        Duration::new(seconds, u32::try_from(time.tv_nsec).unwrap_or_default())
    }
    // On other systems this clock may stop while the machine is suspended. That then looks like a jump of the wall
    // clock.
    #[cfg(not(target_os = "linux"))]
    {
        static BEGAN: std::sync::LazyLock<std::time::Instant> =
            std::sync::LazyLock::new(std::time::Instant::now);
        BEGAN.elapsed()
    }
}

/// When the program was built.
fn built_at() -> Timestamp {
    let seconds = env!("PISYNC_BUILD_SECONDS").parse::<i64>().unwrap_or_default();
    Timestamp::from_millisecond(seconds.saturating_mul(1000)).unwrap_or(Timestamp::MIN)
}

impl std::fmt::Debug for Clock {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("Clock")
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicI64;

    use super::*;

    #[test]
    fn a_clock_from_before_the_build_is_not_set() {
        let built = Timestamp::from_millisecond(1_795_348_800_000).unwrap();
        let time = Arc::new(AtomicI64::new(0));
        let read = Arc::clone(&time);
        let clock =
            Clock::new(move || Timestamp::from_millisecond(read.load(Ordering::Relaxed)).unwrap());
        // Without a build time, the clock cannot tell that it is not set.
        assert!(clock.set_time().is_ok());
        let clock = clock.not_before(built);
        assert!(
            clock.set_time().unwrap_err().to_string().contains("says 1970-01-01T00:00:00.000Z")
        );
        for (behind, is_set) in [(BUILD_MARGIN + 1, false), (BUILD_MARGIN, true), (0, true)] {
            time.store(built.as_millisecond() - behind, Ordering::Relaxed);
            assert_eq!(clock.set_time().is_ok(), is_set, "{behind}");
        }
    }

    /// A test cannot suspend the machine. Counting that time is what `CLOCK_BOOTTIME` is for.
    #[cfg(target_os = "linux")]
    #[test]
    fn the_uptime_is_the_machines() {
        let before = uptime();
        let told = std::fs::read_to_string("/proc/uptime").unwrap();
        let told: f64 = told.split(' ').next().unwrap().parse().unwrap();
        assert!((told - before.as_secs_f64()).abs() < 60.0, "{told} {before:?}");
        assert!(uptime() >= before);
    }

    #[test]
    fn the_program_knows_when_it_was_built() {
        let built = built_at();
        assert!(built > Timestamp::parse_iso8601("2025-01-01").unwrap());
        assert!(built <= Clock::system().set_time().unwrap());
    }
}
