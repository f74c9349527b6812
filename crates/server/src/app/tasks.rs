//! The set of a server's background tasks. `app` starts them here. None may end while the server runs: an error, a
//! panic or an early end stops the server with a message. A task of its own watches the threads ([`crate::threads`]).

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

#[cfg(test)]
use tokio::sync::mpsc;
use tokio::task::{AbortHandle, Id, JoinError, JoinSet};

use super::AppError;
use crate::threads::panic_message;

/// How long stopped tasks may take to end. An aborted task ends at its next await point.
const STOP_TIMEOUT: Duration = Duration::from_secs(1);

type Outcome = Result<(), String>;

/// A set of named tasks. The remaining ones are aborted when it is dropped.
#[derive(Debug, Default)]
pub(super) struct Tasks {
    running: JoinSet<Outcome>,
    known: HashMap<Id, (&'static str, AbortHandle)>,
    /// Gives a test the handles of the tasks, to end them.
    #[cfg(test)]
    observer: Option<mpsc::UnboundedSender<(&'static str, AbortHandle)>>,
}

impl Tasks {
    /// Starts a task that runs as long as the server does.
    pub(super) fn start(
        &mut self,
        name: &'static str,
        task: impl Future<Output = Outcome> + Send + 'static,
    ) {
        let handle = self.running.spawn(task);
        #[cfg(test)]
        if let Some(observer) = &self.observer {
            let _ = observer.send((name, handle.clone()));
        }
        self.known.insert(handle.id(), (name, handle));
    }

    /// Creates a set whose tasks a test can end one by one.
    #[cfg(test)]
    pub(super) fn observed() -> (Self, mpsc::UnboundedReceiver<(&'static str, AbortHandle)>) {
        let (observer, started) = mpsc::unbounded_channel();
        (Self { observer: Some(observer), ..Self::default() }, started)
    }

    /// Waits until the first task has ended. The server must then stop for that reason.
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

    /// Aborts all tasks except `name`, and waits until `name` ends.
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

    /// Aborts all tasks and waits until they have ended, so that they do nothing afterwards.
    pub(super) async fn stop(mut self) {
        // A task that does not end in time ends with the process.
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

#[cfg(test)]
mod tests {
    use std::future::pending;

    use futures_util::future::BoxFuture;

    use super::*;

    #[tokio::test]
    async fn the_first_end_is_told_with_its_task_and_its_reason() {
        let outcomes: [(BoxFuture<'static, Outcome>, &str); 3] = [
            (Box::pin(async { Ok(()) }), "watch: ended before its time"),
            (Box::pin(async { Err("no disk".to_owned()) }), "watch: no disk"),
            (Box::pin(async { panic!("no {}", "luck") }), "watch: panicked: no luck"),
        ];
        for (task, expected) in outcomes {
            let mut tasks = Tasks::default();
            tasks.start("patient", pending());
            tasks.start("watch", task);
            let message = tasks.first_end().await.to_string();
            assert_eq!(message, format!("{expected}; the server stops, start it again"));
        }
        let no_tasks = tokio::time::timeout(Duration::from_millis(10), async {
            Tasks::default().first_end().await
        });
        assert!(no_tasks.await.is_err());
    }

    #[tokio::test]
    async fn the_last_task_is_waited_for_and_the_others_are_stopped() {
        let finish = async |task: BoxFuture<'static, Outcome>| {
            let mut tasks = Tasks::default();
            tasks.start("patient", pending());
            tasks.start("last", task);
            let finished = tasks.finish("last", Duration::from_millis(100)).await;
            finished.map_err(|error| error.to_string())
        };
        assert_eq!(finish(Box::pin(async { Ok(()) })).await, Ok(()));
        for (task, expected) in [
            (Box::pin(async { Err("no disk".to_owned()) }) as BoxFuture<_>, "last: no disk"),
            (Box::pin(pending()), "last: not done after 100ms"),
        ] {
            let message = finish(task).await.unwrap_err();
            assert_eq!(message, format!("{expected}; the server stops, start it again"));
        }
    }
}
