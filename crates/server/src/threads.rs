//! Supervises threads that the program needs. The store and the logs start them through [`Threads`]; a task in
//! `app::tasks` waits for their end. When one ends early or panics, the process must not continue as if nothing had
//! happened.

use std::{
    any::Any,
    io,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::Arc,
    thread,
    time::Duration,
};

use tokio::sync::watch;

/// How long a thread that has ended waits for the panic of another one, which may be the cause. A panicking thread
/// closes its channels before it can report the panic. Other threads then end because their channels are closed.
const CAUSE_TIMEOUT: Duration = Duration::from_millis(200);

/// Starts threads, and reports the first end of one. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Threads {
    /// How the first thread ended. A panic replaces an end without one.
    ended: Arc<watch::Sender<Option<End>>>,
}

#[derive(Debug, Clone)]
struct End {
    panicked: bool,
    message: String,
}

impl Threads {
    pub(crate) fn new() -> Self {
        Self { ended: Arc::new(watch::Sender::new(None)) }
    }

    /// Starts a thread. It may end only when its owner no longer needs it.
    #[expect(clippy::disallowed_methods, reason = "whoever starts a thread comes here")]
    pub(crate) fn start(
        &self,
        name: &'static str,
        work: impl FnOnce() + Send + 'static,
    ) -> io::Result<()> {
        let threads = self.clone();
        let supervised = move || match catch_unwind(AssertUnwindSafe(work)) {
            Ok(()) => threads.report(false, format!("the thread {name} has ended")),
            Err(panic) => {
                let why = panic_message(&*panic);
                threads.report(true, format!("the thread {name} panicked: {why}"));
                resume_unwind(panic);
            }
        };
        thread::Builder::new().name(name.into()).spawn(supervised).map(drop)
    }

    /// A mark for a thread that a library starts. The thread's end drops the mark, which reports it.
    pub(crate) fn mark(&self, name: &'static str) -> ThreadMark {
        ThreadMark { name, threads: self.clone() }
    }

    /// Waits until one of the threads has ended, and returns which one and how.
    pub(crate) async fn first_end(&self) -> String {
        let mut ended = self.ended.subscribe();
        // The sender lives as long as `self`, so neither wait can fail.
        let _ = ended.wait_for(Option::is_some).await;
        let panicked = |end: &Option<End>| end.as_ref().is_some_and(|end| end.panicked);
        let _ = tokio::time::timeout(CAUSE_TIMEOUT, ended.wait_for(panicked)).await;
        let end = ended.borrow().clone();
        end.map(|end| end.message).unwrap_or_default()
    }

    fn report(&self, panicked: bool, message: String) {
        self.ended.send_if_modified(|ended| {
            let is_news = ended.as_ref().is_none_or(|end| panicked && !end.panicked);
            if is_news {
                *ended = Some(End { panicked, message });
            }
            is_news
        });
    }
}

/// Reports the end of its thread; see [`Threads::mark`].
#[derive(Debug)]
pub(crate) struct ThreadMark {
    name: &'static str,
    threads: Threads,
}

impl Drop for ThreadMark {
    fn drop(&mut self) {
        let panicked = thread::panicking();
        let how = if panicked { "panicked" } else { "has ended" };
        self.threads.report(panicked, format!("the thread {} {how}", self.name));
    }
}

/// The message of a panic.
pub(crate) fn panic_message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("it does not say why")
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    #[tokio::test]
    async fn the_first_end_is_told_with_its_reason() {
        let threads = Threads::new();
        let (end, told) = channel::<()>();
        let wait = move || {
            let _ = told.recv();
        };
        threads.start("patient", wait).unwrap();
        threads.start("hasty", || panic!("no {}", "more")).unwrap();
        assert_eq!(threads.first_end().await, "the thread hasty panicked: no more");
        drop(end);
        // A later caller gets the same message.
        assert_eq!(threads.clone().first_end().await, "the thread hasty panicked: no more");
    }

    /// The panicking thread is the cause, though the thread that waits for it may be reported first.
    #[tokio::test]
    async fn a_panic_is_told_before_what_it_ends() {
        for _ in 0..200 {
            let threads = Threads::new();
            let (channel_end, waiting) = channel::<()>();
            let wait = move || {
                let _ = waiting.recv();
            };
            threads.start("waiting", wait).unwrap();
            let panic_holding_it = move || {
                let _held = channel_end;
                panic!("broken");
            };
            threads.start("broken", panic_holding_it).unwrap();
            assert_eq!(threads.first_end().await, "the thread broken panicked: broken");
        }
    }

    #[tokio::test]
    #[expect(clippy::disallowed_methods, reason = "stands for a library")]
    async fn a_librarys_thread_tells_too() {
        for (how, panics) in [("has ended", false), ("panicked", true)] {
            let threads = Threads::new();
            let mark = threads.mark("log");
            let ended = thread::spawn(move || {
                let _mark = mark;
                assert!(!panics);
            });
            assert_eq!(ended.join().is_err(), panics);
            assert_eq!(threads.first_end().await, format!("the thread log {how}"));
        }
    }
}
