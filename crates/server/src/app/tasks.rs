//! The background tasks of a server, in one set. None of them may end while the server runs: whichever does,
//! with an error, by a panic or because it thinks it is done, ends the server with a message. Threads are
//! watched by a task of their own ([`crate::threads`]).

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use tokio::task::{AbortHandle, Id, JoinError, JoinSet};

use super::AppError;
use crate::threads::panic_message;

/// How long tasks that are stopped may take to notice. They stop where they wait next.
const STOP_TIMEOUT: Duration = Duration::from_secs(1);

type Outcome = Result<(), String>;

/// See the module. Tasks that are left are stopped when this is dropped.
#[derive(Debug, Default)]
pub(super) struct Tasks {
    running: JoinSet<Outcome>,
    known: HashMap<Id, (&'static str, AbortHandle)>,
}

impl Tasks {
    /// Starts a task that runs for as long as the server does.
    pub(super) fn start(
        &mut self,
        name: &'static str,
        task: impl Future<Output = Outcome> + Send + 'static,
    ) {
        let handle = self.running.spawn(task);
        self.known.insert(handle.id(), (name, handle));
    }

    /// Waits until one of the tasks has ended, which is why the server cannot go on.
    pub(super) async fn first_end(&mut self) -> AppError {
        let Some(ended) = self.running.join_next_with_id().await else {
            return std::future::pending().await;
        };
        let (id, how) = outcome(ended);
        let name = self.known.get(&id).map_or("a task", |(name, _)| name);
        AppError::Died(match how {
            Ok(()) => format!("{name}: ended before its time"),
            Err(error) => format!("{name}: {error}"),
        })
    }

    /// Stops all tasks but the one called `name`, and waits for its end.
    pub(super) async fn finish(
        mut self,
        name: &'static str,
        timeout: Duration,
    ) -> Result<(), AppError> {
        let deadline = Instant::now() + timeout;
        let mut last = None;
        for (id, (other, handle)) in &self.known {
            if *other == name {
                last = Some(*id);
            } else {
                handle.abort();
            }
        }
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let Ok(ended) = tokio::time::timeout(left, self.running.join_next_with_id()).await
            else {
                return Err(AppError::Died(format!("{name}: not done after {timeout:?}")));
            };
            match ended.map(outcome) {
                Some((id, how)) if Some(id) == last => {
                    return how.map_err(|error| AppError::Died(format!("{name}: {error}")));
                }
                Some(_) => {}
                None => return Ok(()),
            }
        }
    }

    /// Stops all tasks and waits until they are gone: from then on they do nothing for anybody.
    pub(super) async fn stop(mut self) {
        // A task that does not notice goes with the process.
        let _ = tokio::time::timeout(STOP_TIMEOUT, self.running.shutdown()).await;
    }
}

fn outcome(ended: Result<(Id, Outcome), JoinError>) -> (Id, Outcome) {
    match ended {
        Ok(ended) => ended,
        Err(error) => {
            let id = error.id();
            let how = match error.try_into_panic() {
                Ok(panic) => format!("panicked: {}", panic_message(&*panic)),
                Err(error) => error.to_string(),
            };
            (id, Err(how))
        }
    }
}
