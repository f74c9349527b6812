//! How ingest makes batches and hands them to a store: here to one that does as it is told, for what a real one
//! does at which moment cannot be arranged.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use pisync::{
    clock::Clock,
    ingest::{Ingest, IngestError, Receipt, Writers},
    metrics::Metrics,
    store::{Batch, EventWriter, StoreError, Written},
};
use tokio::{
    sync::{Semaphore, mpsc::unbounded_channel, oneshot},
    task::JoinHandle,
};

use crate::support::events::{at, now, success};

/// A batch as the numbers of its events.
type Numbers = Vec<u32>;

#[derive(Debug, Default)]
struct Told {
    /// What ingest has done.
    calls: Vec<(&'static str, Numbers)>,
    /// Whether batches may be pipelined.
    takes: bool,
    /// Of those in flight, the ones that come to nothing.
    fails: Vec<Numbers>,
    is_away: bool,
    /// Whether it answers for no event, which no store may do.
    answers_for_none: bool,
    /// Whether it gives up what it is to write, for a passing reason.
    gives_up: bool,
    under_way: VecDeque<Arc<Batch>>,
}

/// A store's writer that does as it is told.
#[derive(Clone)]
struct Obedient {
    told: Arc<Mutex<Told>>,
    /// How many of the batches in flight may end.
    ends: Arc<Semaphore>,
}

fn numbers(batch: &Batch) -> Numbers {
    batch.events.iter().map(|event| event.total_files_synced).collect()
}

fn written(batch: &Batch, told: &Told) -> Written {
    if told.answers_for_none {
        return Written::new(Vec::new());
    }
    let ids = batch.events.iter().map(|event| i64::from(event.total_files_synced));
    Written::new(ids.collect())
}

impl Obedient {
    fn told(&self) -> MutexGuard<'_, Told> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn calls(&self) -> Vec<(&'static str, Numbers)> {
        self.told().calls.clone()
    }
}

#[async_trait]
impl EventWriter for Obedient {
    async fn write(&mut self, batch: &Arc<Batch>) -> Result<Written, StoreError> {
        let mut told = self.told();
        assert!(told.under_way.is_empty(), "{told:?}");
        told.calls.push(("write", numbers(batch)));
        match &*told {
            Told { is_away: true, .. } => Err(StoreError::Unavailable("away".into())),
            Told { gives_up: true, .. } => Err(StoreError::Transient("cancelled".into())),
            told => Ok(written(batch, told)),
        }
    }

    fn send(&mut self, batch: &Arc<Batch>) -> bool {
        let mut told = self.told();
        if told.takes {
            told.calls.push(("send", numbers(batch)));
            told.under_way.push_back(Arc::clone(batch));
            assert!(told.under_way.len() <= 2, "{told:?}");
        }
        told.takes
    }

    async fn sent(&mut self) -> Option<Written> {
        self.ends.acquire().await.unwrap().forget();
        let mut told = self.told();
        let batch = told.under_way.pop_front().unwrap();
        (!told.fails.contains(&numbers(&batch))).then(|| written(&batch, &told))
    }

    async fn probe(&mut self) -> Result<(), StoreError> {
        if self.told().is_away { Err(StoreError::Unavailable("away".into())) } else { Ok(()) }
    }
}

/// Ingest before such a store.
struct Running {
    ingest: Ingest,
    store: Obedient,
    _stop: oneshot::Sender<()>,
}

impl Running {
    fn start() -> Self {
        let told = Arc::new(Mutex::new(Told { takes: true, ..Told::default() }));
        let store = Obedient { told, ends: Arc::new(Semaphore::new(0)) };
        let (_, observations) = unbounded_channel();
        let metrics = Arc::new(Metrics::new().unwrap());
        let writers = Writers { any: Box::new(store.clone()), grouped: Box::new(store.clone()) };
        let (ingest, task) = Ingest::new(writers, observations, &Clock::new(now), &metrics);
        let (stop, stopped) = oneshot::channel();
        tokio::spawn(task.run(async {
            let _ = stopped.await;
        }));
        Self { ingest, store, _stop: stop }
    }

    /// Submits the event with this number and lets ingest see it.
    async fn submit(&self, number: u32) -> JoinHandle<Result<Receipt, IngestError>> {
        let event = success("pi", at(i64::from(number)));
        let event = pisync_core::SyncEvent { total_files_synced: number, ..event };
        let ingest = self.ingest.clone();
        let waiting = tokio::spawn(async move { ingest.submit(event, None).await });
        apply_journal().await;
        waiting
    }

    /// Lets the batch that was sent first come to its end.
    async fn end_one(&self) {
        self.store.ends.add_permits(1);
        apply_journal().await;
    }
}

/// Everybody gets a turn, and again: nobody waits for time.
async fn apply_journal() {
    for _ in 0..50 {
        tokio::task::yield_now().await;
    }
}

async fn stored(waiting: JoinHandle<Result<Receipt, IngestError>>) -> i64 {
    match waiting.await.unwrap().unwrap() {
        Receipt::Created { id, .. } => id,
        duplicate @ Receipt::Duplicate { .. } => panic!("{duplicate:?}"),
    }
}

async fn unavailable(waiting: JoinHandle<Result<Receipt, IngestError>>) {
    assert_eq!(waiting.await.unwrap().unwrap_err(), IngestError::Unavailable);
}

#[tokio::test]
async fn a_second_batch_goes_off_behind_the_first_once_it_is_large_enough() {
    let running = Running::start();
    let mut waiting = Vec::new();
    for number in 1..=4 {
        waiting.push(running.submit(number).await);
    }
    // Who is first waits for nothing; nor does the next, as long as nobody knows how many there are.
    assert_eq!(running.store.calls(), [("send", vec![1]), ("send", vec![2])]);
    running.end_one().await;
    assert_eq!(running.store.calls()[2..], [("send", vec![3, 4])]);
    running.end_one().await;
    // There were four at a time: one is not enough behind another batch, two are.
    waiting.push(running.submit(5).await);
    assert_eq!(running.store.calls().len(), 3);
    waiting.push(running.submit(6).await);
    assert_eq!(running.store.calls()[3..], [("send", vec![5, 6])]);
    // When nothing is in flight, whatever waits is enough.
    waiting.push(running.submit(7).await);
    running.end_one().await;
    assert_eq!(running.store.calls().len(), 4);
    running.end_one().await;
    assert_eq!(running.store.calls()[4..], [("send", vec![7])]);
    running.end_one().await;
    for (number, waiting) in (1..).zip(waiting) {
        assert_eq!(stored(waiting).await, number);
    }
}

#[tokio::test]
async fn what_comes_to_nothing_is_written_once_nothing_is_under_way() {
    let running = Running::start();
    running.store.told().fails.push(vec![1]);
    let (first, second) = (running.submit(1).await, running.submit(2).await);
    running.end_one().await;
    assert!(!first.is_finished());
    running.end_one().await;
    assert_eq!((stored(first).await, stored(second).await), (1, 2));
    let calls = [("send", vec![1]), ("send", vec![2]), ("write", vec![1])];
    assert_eq!(running.store.calls(), calls);
}

#[tokio::test]
async fn where_nothing_can_be_pipelined_it_is_written_behind_what_is_in_flight() {
    let running = Running::start();
    let first = running.submit(1).await;
    running.store.told().takes = false;
    let second = running.submit(2).await;
    let third = running.submit(3).await;
    assert_eq!(running.store.calls(), [("send", vec![1])]);
    running.end_one().await;
    for (waiting, number) in [(first, 1), (second, 2), (third, 3)] {
        assert_eq!(stored(waiting).await, number);
    }
    let calls = [("send", vec![1]), ("write", vec![2]), ("write", vec![3])];
    assert_eq!(running.store.calls(), calls);
}

#[tokio::test]
async fn when_the_store_goes_away_nobody_waits_for_the_second_batch() {
    let running = Running::start();
    running.store.told().fails.extend([vec![1], vec![2]]);
    running.store.told().is_away = true;
    let waiting = [running.submit(1).await, running.submit(2).await, running.submit(3).await];
    running.end_one().await;
    running.end_one().await;
    for waiting in waiting {
        unavailable(waiting).await;
    }
    // Whether the second one is stored is not asked: that would take long, with a store that does not answer.
    let calls = [("send", vec![1]), ("send", vec![2]), ("write", vec![1])];
    assert_eq!(running.store.calls(), calls);
    unavailable(running.submit(4).await).await;

    running.store.told().is_away = false;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let back = running.submit(5).await;
    running.end_one().await;
    assert_eq!(stored(back).await, 5);
}

/// A store's mistake must not become a 200 without results, or an answer that never comes.
#[tokio::test]
async fn a_store_that_does_not_answer_for_each_event_has_stored_none() {
    let running = Running::start();
    running.store.told().answers_for_none = true;
    let failed = async |waiting: JoinHandle<Result<Receipt, IngestError>>| {
        let error = waiting.await.unwrap().unwrap_err();
        assert!(matches!(error, IngestError::Failed(_)), "{error:?}");
    };
    let pipelined = running.submit(1).await;
    running.end_one().await;
    failed(pipelined).await;
    running.store.told().takes = false;
    failed(running.submit(2).await).await;
    let mut permit = running.ingest.permit();
    let events: Vec<_> = (3..6).map(|second| success("pi", at(second))).collect();
    events.iter().for_each(|event| permit.reserve(event).unwrap());
    let many = running.ingest.submit_many(events, None, permit).await;
    assert!(matches!(many, Err(IngestError::Failed(_))), "{many:?}");

    running.store.told().answers_for_none = false;
    assert_eq!(stored(running.submit(6).await).await, 6);
}

/// A deadlock, or a statement that somebody cancelled: the database is there, and the next batch is stored.
#[tokio::test]
async fn a_batch_that_the_database_gave_up_is_refused_alone() {
    let running = Running::start();
    running.store.told().takes = false;
    running.store.told().gives_up = true;
    unavailable(running.submit(1).await).await;
    assert!(running.ingest.is_available());
    running.store.told().gives_up = false;
    assert_eq!(stored(running.submit(2).await).await, 2);
}
