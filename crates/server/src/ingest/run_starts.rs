//! Started runs that are not stored yet. The API notes them here, and a background task of the server stores them within a
//! second. Unlike an event, a start is acknowledged before it is stored: a crash may lose it, and its device is then judged
//! as if it had said nothing. So starts never take part in a commit that events wait for.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use pisync_core::Timestamp;
use tokio::sync::Notify;

use crate::store::{RunKey, RunStarts, StartedRun, Store, StoreError};

/// The most starts that wait.
const MOST_WAITING: usize = 65_536;

/// The most bytes of names that wait. Starts with names of the usual length reach the other limit first.
const MOST_BYTES_OF_STARTS: usize = 16 << 20;

/// How many starts are stored at a time. SQLite's writer is then busy for some milliseconds, for which ingest waits.
const STEP: usize = 500;

/// How long starts gather before they are stored.
const GATHER: Duration = Duration::from_millis(200);

/// How soon storing is tried again while the database is away.
const RETRY: Duration = Duration::from_secs(1);

/// How soon storing is tried again when something else is wrong.
const RETRY_AFTER_MISTAKE: Duration = Duration::from_secs(60);

/// Too many starts wait.
#[derive(Debug, PartialEq, Eq)]
pub struct Full;

/// The starts that wait to be stored.
#[derive(Debug, Default)]
pub struct RunStartQueue {
    waiting: Mutex<Waiting>,
    /// Wakes the task when there is something to store.
    wake: Notify,
    /// Held while starts are stored, so that they are removed once.
    storing: tokio::sync::Mutex<()>,
}

#[derive(Debug, Default)]
struct Waiting {
    /// In the order of their arrival.
    runs: VecDeque<StartedRun>,
    /// When each was received.
    known: HashMap<RunKey, Timestamp>,
    /// How many bytes their names have.
    bytes: usize,
}

impl RunStartQueue {
    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        // Nothing that holds it can panic halfway through a change.
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes a start, and answers when it was received. Of a start that waits already, that is the first time.
    ///
    /// # Errors
    /// When too many starts wait.
    pub fn note(&self, run: StartedRun) -> Result<Timestamp, Full> {
        let mut waiting = self.waiting();
        if let Some(received_at) = waiting.known.get(&run.key) {
            return Ok(*received_at);
        }
        let bytes = waiting.bytes + run.key.bytes();
        if waiting.runs.len() >= MOST_WAITING || bytes > MOST_BYTES_OF_STARTS {
            return Err(Full);
        }
        let received_at = run.received_at;
        waiting.bytes = bytes;
        waiting.known.insert(run.key.clone(), received_at);
        waiting.runs.push_back(run);
        drop(waiting);
        self.wake.notify_one();
        Ok(received_at)
    }

    /// The first starts that wait. They stay until they are stored.
    fn first(&self) -> Vec<StartedRun> {
        self.waiting().runs.iter().take(STEP).cloned().collect()
    }

    /// Removes the first `count` starts.
    fn remove(&self, count: usize) {
        let mut waiting = self.waiting();
        for _ in 0..count {
            if let Some(run) = waiting.runs.pop_front() {
                waiting.bytes -= run.key.bytes();
                waiting.known.remove(&run.key);
            }
        }
    }

    /// Stores all starts that wait.
    async fn store_all<S: RunStarts + ?Sized>(&self, store: &S) -> Result<(), StoreError> {
        let _turn = self.storing.lock().await;
        loop {
            let runs = self.first();
            if runs.is_empty() {
                return Ok(());
            }
            match store.add_run_starts(&runs).await {
                Ok(_) => self.remove(runs.len()),
                // The culprit is among them. The others must not wait for it for ever.
                Err(StoreError::Rejected(_)) => self.store_one_by_one(&runs, store).await?,
                Err(error) => return Err(error),
            }
        }
    }

    /// Stores `runs`, which are the first ones, and drops those that the database refuses.
    async fn store_one_by_one<S: RunStarts + ?Sized>(
        &self,
        runs: &[StartedRun],
        store: &S,
    ) -> Result<(), StoreError> {
        for run in runs {
            match store.add_run_starts(std::slice::from_ref(run)).await {
                Ok(_) => {}
                Err(StoreError::Rejected(error)) => tracing::warn!(
                    device_id = %run.key.device_id,
                    error,
                    "the start of a run was refused by the database and is dropped"
                ),
                Err(error) => return Err(error),
            }
            self.remove(1);
        }
        Ok(())
    }

    /// Stores starts as long as the server runs.
    pub(crate) async fn follow(self: Arc<Self>, store: Arc<dyn Store>) {
        loop {
            self.wake.notified().await;
            tokio::time::sleep(GATHER).await;
            while let Err(error) = self.store_all(&*store).await {
                let pause = match error {
                    // Ingest logs that already.
                    StoreError::Unavailable(_) | StoreError::Transient(_) | StoreError::Busy(_) => {
                        tracing::debug!(%error, "starts of runs wait for the database");
                        RETRY
                    }
                    error => {
                        tracing::warn!(%error, "starts of runs cannot be stored; it will be tried again");
                        RETRY_AFTER_MISTAKE
                    }
                };
                tokio::time::sleep(pause).await;
            }
        }
    }

    /// Stores what waits when the server stops, for at most `longest`.
    pub(crate) async fn flush(&self, store: &dyn Store, longest: Duration) {
        let stored = tokio::time::timeout(longest, self.store_all(store)).await;
        if !matches!(stored, Ok(Ok(()))) {
            let runs = self.waiting().runs.len();
            tracing::warn!(runs, "starts of runs were not stored before the server stopped");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use async_trait::async_trait;
    use pisync_core::{DeviceId, EventId, GroupName};

    use super::*;

    fn run(device: &str, run_id: &str) -> StartedRun {
        let key = RunKey {
            device_id: DeviceId::new(device).unwrap(),
            job: None,
            run_id: Some(EventId::new(run_id).unwrap()),
        };
        let received_at = Timestamp::from_millisecond(1_000).unwrap();
        StartedRun { key, received_at, timestamp: None, group: None }
    }

    /// A store that answers as it was told, and keeps the run ids that it has.
    #[derive(Default)]
    struct Told {
        failures: Mutex<VecDeque<StoreError>>,
        /// The run id that is refused.
        refused: Option<&'static str>,
        kept: Mutex<Vec<String>>,
    }

    #[async_trait]
    impl RunStarts for Told {
        async fn add_run_starts(&self, runs: &[StartedRun]) -> Result<u64, StoreError> {
            if let Some(failure) = self.failures.lock().unwrap().pop_front() {
                return Err(failure);
            }
            let ids: Vec<_> =
                runs.iter().map(|run| run.key.run_id.as_ref().unwrap().to_string()).collect();
            if ids.iter().any(|id| Some(id.as_str()) == self.refused) {
                return Err(StoreError::Rejected("by a trigger".to_owned()));
            }
            self.kept.lock().unwrap().extend(ids);
            Ok(runs.len() as u64)
        }

        async fn may_report_in(&self, _: &DeviceId, _: &GroupName) -> Result<bool, StoreError> {
            Ok(true)
        }
    }

    #[test]
    fn what_waits_is_bounded_and_waits_once() {
        let queue = RunStartQueue::default();
        let first = queue.note(run("pi", "0")).unwrap();
        let later = Timestamp::from_millisecond(9_000).unwrap();
        let again = StartedRun { received_at: later, ..run("pi", "0") };
        assert_eq!(queue.note(again), Ok(first));
        for number in 1..MOST_WAITING {
            queue.note(run("pi", &number.to_string())).unwrap();
        }
        assert_eq!(queue.note(run("pi", "one more")), Err(Full));
        // It does not need to wait again.
        assert_eq!(queue.note(run("pi", "7")), Ok(first));
        queue.remove(STEP);
        assert!(queue.note(run("pi", "one more")).is_ok());

        let queue = RunStartQueue::default();
        let long = "ü".repeat(255);
        let noted =
            (0..MOST_WAITING).find(|number| queue.note(run(&long, &number.to_string())).is_err());
        assert!((30_000..34_000).contains(&noted.unwrap()), "{noted:?}");
        queue.remove(MOST_WAITING);
        assert_eq!(queue.waiting().bytes, 0);
        assert!(queue.waiting().known.is_empty());
    }

    #[tokio::test]
    async fn what_cannot_be_stored_waits_and_what_is_refused_goes() {
        let queue = RunStartQueue::default();
        for number in 0..=STEP {
            queue.note(run("pi", &number.to_string())).unwrap();
        }
        let away = || StoreError::Unavailable("away".to_owned());
        let store = Told {
            failures: Mutex::new(VecDeque::from([away()])),
            refused: Some("3"),
            ..Told::default()
        };
        assert!(matches!(queue.store_all(&store).await, Err(StoreError::Unavailable(_))));
        assert_eq!(queue.waiting().runs.len(), STEP + 1);
        queue.store_all(&store).await.unwrap();
        assert!(queue.waiting().runs.is_empty());
        let expected: Vec<_> =
            (0..=STEP).filter(|number| *number != 3).map(|number| number.to_string()).collect();
        assert_eq!(*store.kept.lock().unwrap(), expected);
    }
}
