//! The heartbeat: a post each minute to whoever watches this server from outside, as long as the fleet is looked after. When it
//! stops coming, somebody else must tell people, because nobody here can. `app` runs [`beat`] as a background task.

use std::{sync::Arc, time::Duration};

use axum::http::HeaderMap;
use pisync_core::Timestamp;
use reqwest::Url;

use super::{Hidden, sender::Sender};
use crate::{clock::Clock, fleet::LONGEST_SINCE_SWEEP, ingest::Ingest, store::Store};

/// How often it is posted, in milliseconds.
const HEARTBEAT_INTERVAL: i64 = 60 * 1000;

/// How often it is looked whether one is due.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// Posts the heartbeat for as long as the server runs.
pub(crate) async fn beat(
    url: Hidden<Url>,
    sender: Sender,
    store: Arc<dyn Store>,
    ingest: Ingest,
    clock: Clock,
) {
    let mut schedule = Schedule::default();
    loop {
        match clock.check() {
            Ok(now) if schedule.is_due(now) => {
                let swept_at = store.health_counts().await.ok().and_then(|counts| counts.swept_at);
                let is_swept = swept_at.is_some_and(|at| since(at, now) <= LONGEST_SINCE_SWEEP);
                let can_store = ingest.is_available();
                match schedule.decide(now, is_swept && can_store) {
                    Step::Post => post(&url, &sender).await,
                    Step::Warn => tracing::warn!(
                        swept_at = swept_at.map(|at| at.to_string()),
                        can_store,
                        "no heartbeat: the fleet is not looked after, or nothing can be stored"
                    ),
                    Step::Wait => {}
                }
            }
            Ok(_) => {}
            // The log says so already. What is counted from such a time counts for nothing.
            Err(_) => schedule = Schedule::default(),
        }
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
}

async fn post(url: &Hidden<Url>, sender: &Sender) {
    match sender.post(url.reveal(), "text/plain", HeaderMap::new(), Vec::new()).await {
        Ok(answer) if answer.status.is_success() => tracing::debug!("heartbeat sent"),
        Ok(answer) => {
            let status = answer.status.as_u16();
            tracing::warn!(status, "the heartbeat was refused");
        }
        Err(error) => tracing::warn!(error, "the heartbeat could not be sent"),
    }
}

/// The milliseconds from `earlier` to `now`.
fn since(earlier: Timestamp, now: Timestamp) -> i64 {
    now.as_millisecond() - earlier.as_millisecond()
}

/// What is done about a heartbeat.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Post,
    Warn,
    Wait,
}

/// When heartbeats are due.
#[derive(Debug, Default)]
struct Schedule {
    /// When the server began to look, until it has found for the first time that all is well, or has waited too long for it.
    begun: Option<Timestamp>,
    /// When the last one was posted, or was not because something is wrong.
    last: Option<Timestamp>,
}

impl Schedule {
    /// Also when the clock was set back.
    fn is_due(&self, now: Timestamp) -> bool {
        self.last.is_none_or(|last| !(0..HEARTBEAT_INTERVAL).contains(&since(last, now)))
    }

    /// What is done about the one that is due.
    fn decide(&mut self, now: Timestamp, is_well: bool) -> Step {
        if is_well {
            self.last = Some(now);
            return Step::Post;
        }
        let begun = *self.begun.get_or_insert(now);
        // The first sweep has not ended yet.
        if self.last.is_none() && (0..LONGEST_SINCE_SWEEP).contains(&since(begun, now)) {
            return Step::Wait;
        }
        self.last = Some(now);
        Step::Warn
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_millisecond(1_772_442_000_000 + second * 1000).unwrap()
    }

    /// What is done at each second at which a heartbeat is due.
    fn steps(
        seconds: impl IntoIterator<Item = i64>,
        is_well: impl Fn(i64) -> bool,
    ) -> Vec<(i64, Step)> {
        let mut schedule = Schedule::default();
        let due = seconds.into_iter().filter_map(|second| {
            let step = schedule
                .is_due(at(second))
                .then(|| schedule.decide(at(second), is_well(second)))?;
            (step != Step::Wait).then_some((second, step))
        });
        due.collect()
    }

    #[test]
    fn the_first_sweep_is_waited_for() {
        let well_after = |begin: i64| move |second: i64| second >= begin;
        assert_eq!(
            steps(0..130, well_after(0)),
            [(0, Step::Post), (60, Step::Post), (120, Step::Post)]
        );
        assert_eq!(steps(0..130, well_after(17)), [(17, Step::Post), (77, Step::Post)]);
        assert_eq!(steps(0..130, well_after(119)), [(119, Step::Post)]);
        // From then on nobody looks after the fleet.
        assert_eq!(
            steps(0..250, well_after(200)),
            [(120, Step::Warn), (180, Step::Warn), (240, Step::Post)]
        );
    }

    #[test]
    fn each_minute_without_one_is_told() {
        let ill = |second: i64| !(30..200).contains(&second);
        assert_eq!(
            steps(0..250, ill),
            [
                (0, Step::Post),
                (60, Step::Warn),
                (120, Step::Warn),
                (180, Step::Warn),
                (240, Step::Post)
            ]
        );
    }

    #[test]
    fn a_clock_that_was_set_back_stops_nothing() {
        assert_eq!(
            steps([0, -9_999, -9_998, -9_939], |_| true),
            [(0, Step::Post), (-9_999, Step::Post), (-9_939, Step::Post)]
        );
        assert_eq!(steps([0, -9_999], |_| false), [(-9_999, Step::Warn)]);
    }
}
