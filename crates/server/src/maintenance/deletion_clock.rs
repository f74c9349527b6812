//! The time by which maintenance deletes what is old, so that no wrong clock deletes what is not: the machine's clock,
//! PostgreSQL's if that is behind it, and never further than the database has believed (see
//! `store::TrustedTime`). Nothing here dates events.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use pisync_core::Timestamp;

use super::database_time;
use crate::{
    clock::Clock,
    store::{Store, StoreError},
};

/// By how much two clocks may differ before the log hears of it, in milliseconds. Servers on one PostgreSQL rely
/// on their clocks to a minute, when they aggregate events.
const NOTABLE_DIFFERENCE: i64 = 60_000;

/// What there is to go by.
#[derive(Debug, Clone, Copy)]
pub(super) struct BelievedTime {
    /// The time by which to delete.
    pub(super) now: Timestamp,
    /// Whether nothing speaks against the clock: it has neither jumped ahead nor shown a later time before.
    pub(super) is_certain: bool,
}

/// See the module.
pub(super) struct DeletionClock {
    clock: Clock,
    store: Arc<dyn Store>,
    /// When it was last asked.
    asked: Option<Instant>,
    differs: Said,
    doubted: Said,
    behind: Said,
}

/// Whether the log has it last that something is wrong.
#[derive(Default)]
struct Said(bool);

impl Said {
    /// Says what is wrong when it begins, and what is right again when it ends.
    fn say(&mut self, is_wrong: bool, wrong: impl FnOnce(), right: impl FnOnce()) {
        if std::mem::replace(&mut self.0, is_wrong) != is_wrong {
            if is_wrong { wrong() } else { right() }
        }
    }
}

impl DeletionClock {
    pub(super) fn new(store: Arc<dyn Store>, clock: Clock) -> Self {
        let (differs, doubted, behind) = Default::default();
        Self { clock, store, asked: None, differs, doubted, behind }
    }

    /// The time by which to delete; `None` while the clock is not set.
    pub(super) async fn now(&mut self) -> Result<Option<BelievedTime>, StoreError> {
        let Ok(own) = self.clock.set_time() else { return Ok(None) };
        let database = database_time(&*self.store, &self.clock).await?;
        let now = database.map_or(own, |database| own.min(database));
        if let Some(database) = database {
            let difference = own.as_millisecond() - database.as_millisecond();
            self.differs.say(
                difference.abs() > NOTABLE_DIFFERENCE,
                || tracing::warn!(server = %own, database = %database, "the clocks of this machine and of PostgreSQL differ; set the one that is wrong: events are dated by this machine's"),
                || tracing::info!("the clocks of this machine and of PostgreSQL agree again"),
            );
        }
        let asked = Instant::now();
        let ran = self.asked.map_or(Duration::ZERO, |before| asked - before);
        let trusted = self.store.trust_time(now, ran).await?;
        self.asked = Some(asked);

        let ahead = now.as_millisecond() - trusted.until.as_millisecond();
        self.doubted.say(
            ahead > 0,
            || tracing::error!(
                clock = %now,
                believed = %trusted.until,
                "the clock has jumped ahead; what is old is deleted by the believed time, until the reports of devices bear the clock out or the server has run for two weeks; if the clock is wrong, set it, or events will be dated wrong"
            ),
            || tracing::info!(clock = %now, "the clock is believed; what is old by it is deleted again"),
        );
        self.behind.say(
            ahead < -NOTABLE_DIFFERENCE,
            || tracing::warn!(
                clock = %now,
                before = %trusted.until,
                "the clock is behind the time that it has shown before: either it was ahead then, or it is behind now; if it is behind, set it, or reports will be refused as from the future"
            ),
            || tracing::info!(clock = %now, "the clock has come to the time that it has shown before"),
        );
        let is_certain = (-NOTABLE_DIFFERENCE..=0).contains(&ahead);
        Ok(Some(BelievedTime { now: now.min(trusted.until), is_certain }))
    }
}
