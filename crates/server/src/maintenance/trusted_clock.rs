//! Decides whether the machine's clock can be trusted. It compares the clock with the time that the database has
//! believed (`store::TrustedTime`), with PostgreSQL's clock, and with the time that has passed. Maintenance deletes by
//! [`BelievedTime`], `clock_watch` watches for jumps, and commands ask [`doubt`]. Nothing here dates events.

use std::{sync::Arc, time::Duration};

use pisync_core::Timestamp;
use tokio::sync::Mutex;

use super::{course::Course, database_time};
use crate::{
    clock::{Clock, uptime},
    store::{NOTABLE_DIFFERENCE, Standing, StoreError, TrustedTimeStore},
};

/// How long to wait before a doubted clock is judged again. Devices may have confirmed it by then.
const DOUBT_INTERVAL: Duration = Duration::from_secs(10 * 60);

/// The times that maintenance works by.
#[derive(Debug, Clone, Copy)]
pub(super) struct BelievedTime {
    /// The time by which to delete.
    pub(super) now: Timestamp,
    /// The time by which to count streaks; a recount can correct them later, so it follows the clock. `None` while the
    /// clock is behind the believed time: then it will probably be set ahead soon.
    pub(super) counting: Option<Timestamp>,
}

/// Judges the clock of one server; there is one for each server.
pub(super) struct TrustedClock {
    clock: Clock,
    store: Arc<dyn TrustedTimeStore>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// When the clock was judged last.
    judged: Option<Duration>,
    /// Whether the clock passed every check then, including the comparison with PostgreSQL's clock.
    is_undisputed: bool,
    course: Course,
    differs: Said,
    doubted: Said,
    behind: Said,
}

/// Whether the last log line said that something is wrong.
#[derive(Default)]
struct Said(bool);

impl Said {
    /// Logs when something becomes wrong, and when it is right again. It logs nothing if `is_told`: another line
    /// reports it.
    fn say(&mut self, is_wrong: bool, is_told: bool, wrong: impl FnOnce(), right: impl FnOnce()) {
        if std::mem::replace(&mut self.0, is_wrong) != is_wrong && !is_told {
            if is_wrong { wrong() } else { right() }
        }
    }
}

impl TrustedClock {
    pub(super) fn new(store: Arc<dyn TrustedTimeStore>, clock: Clock) -> Self {
        Self { clock, store, state: Mutex::default() }
    }

    /// What the machine's clock shows.
    pub(super) fn shown(&self) -> Timestamp {
        self.clock.now()
    }

    /// Whether to judge the clock now: it has jumped, or was doubted a while ago. Reads two clocks and no database.
    pub(super) async fn is_due(&self) -> bool {
        let mut state = self.state.lock().await;
        // A clock that is not set is logged at once.
        let Ok(own) = self.clock.set_time() else { return false };
        let at = uptime();
        if state.course.jump(own, at).is_some() {
            return true;
        }
        state.course.go_on(own, at, false);
        let doubted_since = state.judged.filter(|_| !state.is_undisputed);
        doubted_since.is_some_and(|judged| at.saturating_sub(judged) >= DOUBT_INTERVAL)
    }

    /// Judges the clock and answers the times to work by; `None` while the clock is not set.
    pub(super) async fn judge(&self) -> Result<Option<BelievedTime>, StoreError> {
        let mut state = self.state.lock().await;
        let Ok(own) = self.clock.set_time() else { return Ok(None) };
        let at = uptime();
        let database = database_time(&*self.store, &self.clock).await?;
        let now = database.map_or(own, |database| own.min(database));
        let ran = state.judged.map_or(Duration::ZERO, |before| at.saturating_sub(before));
        let trusted = self.store.trust_time(now, ran).await?;
        let State { judged, is_undisputed, course, differs, doubted, behind } = &mut *state;
        *judged = Some(at);
        let jump = course.go_on(own, at, *is_undisputed);

        let ahead = now.as_millisecond() - trusted.until.as_millisecond();
        let is_doubted = ahead > 0;
        let is_behind = ahead < -NOTABLE_DIFFERENCE && !course.is_back();
        let difference =
            database.map_or(0, |database| own.as_millisecond() - database.as_millisecond());
        let is_different = difference.abs() > NOTABLE_DIFFERENCE;
        *is_undisputed = !is_doubted && !is_behind && !is_different;
        if let Some(by) = jump {
            let from = own.saturating_add_milliseconds(-by);
            tell_jump(from, own, database, is_doubted, course.is_back());
        }
        // Another line reports a jump.
        let is_told = jump.is_some();
        if let Some(database) = database {
            differs.say(
                is_different,
                is_told,
                || tracing::warn!(server = %own, database = %database, "the clocks of this machine and of PostgreSQL differ; set the one that is wrong: events are dated by this machine's"),
                || tracing::info!("the clocks of this machine and of PostgreSQL agree again"),
            );
        }
        doubted.say(
            is_doubted,
            is_told,
            || tracing::error!(
                clock = %now,
                believed = %trusted.until,
                "the clock has jumped ahead; what is old is deleted by the believed time, until the reports of devices bear the clock out or the server has run for two weeks; if the clock is wrong, set it, or events will be dated wrong"
            ),
            || tracing::info!(clock = %now, "the clock is believed; what is old by it is deleted again"),
        );
        behind.say(
            is_behind,
            is_told,
            || tracing::warn!(
                clock = %now,
                before = %trusted.until,
                "the clock is behind the time that it has shown before: either it was ahead then, or it is behind now; if it is behind, set it, or reports will be refused as from the future"
            ),
            || tracing::info!(clock = %now, "the clock is no longer behind the time that is believed"),
        );
        // The same as `present`, by which figures are verified.
        let shown = database.unwrap_or(own);
        let earliest = trusted.until.saturating_add_milliseconds(-NOTABLE_DIFFERENCE);
        let counting = (shown >= earliest || course.is_back()).then_some(shown);
        Ok(Some(BelievedTime { now: now.min(trusted.until), counting }))
    }
}

/// Logs that the clock has jumped while the server ran. `from` is what it would show without the jump.
fn tell_jump(
    from: Timestamp,
    to: Timestamp,
    database: Option<Timestamp>,
    is_doubted: bool,
    is_back: bool,
) {
    let database = database.map(tracing::field::display);
    if is_back {
        tracing::info!(%from, %to, database, "the clock is back where it was before it jumped");
    } else if is_doubted {
        tracing::warn!(%from, %to, database, "the clock jumped ahead while the server ran; nothing is deleted by it until the reports of devices bear it out or two weeks have passed; if it is wrong, set it: until then events are dated by it");
    } else if from < to {
        tracing::warn!(%from, %to, database, "the clock jumped ahead while the server ran; if it is wrong, set it: until then events are dated by it");
    } else {
        tracing::warn!(%from, %to, database, "the clock jumped back while the server ran: either it was ahead before, or it is behind now; if it is behind, set it, or reports will be refused as from the future");
    }
}

/// The present for comparisons with dates: PostgreSQL's clock if there is one. It is never a time that has certainly
/// passed, however far the machine's clock is behind.
pub(crate) async fn present(
    store: &dyn TrustedTimeStore,
    clock: &Clock,
) -> Result<Timestamp, StoreError> {
    let own = clock.now();
    let shown = database_time(store, clock).await?.unwrap_or(own);
    let believed = store.trusted_time().await?.map_or(Timestamp::MIN, |trusted| trusted.until);
    Ok(shown.max(believed).max(clock.earliest()))
}

/// Why the clock of a command that uses `store` is doubtful, in words for the user; `None` when nothing is wrong.
pub(crate) async fn doubt(
    store: &dyn TrustedTimeStore,
    clock: &Clock,
) -> Result<Option<String>, StoreError> {
    let own = match clock.check() {
        Ok(own) => own,
        Err(error) => return Ok(Some(error.to_string())),
    };
    if let Some(database) = database_time(store, clock).await?
        && (own.as_millisecond() - database.as_millisecond()).abs() > NOTABLE_DIFFERENCE
    {
        return Ok(Some(format!(
            "this machine's clock says {own}, and PostgreSQL's {database}; set the one that is wrong"
        )));
    }
    let Some(trusted) = store.trusted_time().await? else { return Ok(None) };
    let until = trusted.until;
    Ok(match trusted.standing(own) {
        Standing::Plausible => None,
        Standing::Ahead => Some(format!(
            "this machine's clock says {own}, and a server last used the database at {until}; if the clock is ahead, set it: what is dated by it is dated wrong"
        )),
        Standing::Behind => Some(format!(
            "this machine's clock says {own}, but a server used the database at {until} already: either a clock was ahead then, or this one is behind; if it is behind, set it"
        )),
    })
}
