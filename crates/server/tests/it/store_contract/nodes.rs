//! Several servers on one PostgreSQL: figures stay exact, and nobody hears of a deadlock.

use std::sync::Arc;

use pisync::store::{self, Freshness, Store};
use pisync_core::{DeviceId, SyncEvent};
use tokio::task::JoinSet;

use super::streaks::figures_of;
use crate::support::{
    events::{
        Sent, at, batch_at, device_id, failure, of_job, recount, sent, somebody, success, sum,
    },
    store::{Fixture, TestDatabase, TestStore, assert_right, differences},
};

/// Months in which batches are received: all nodes find some of their partitions missing.
const MONTHS: i64 = 3;
const MONTH_SECONDS: i64 = 31 * 86_400;

/// Numbers that look random and are the same in each run (Knuth's multiplicative generator).
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, bound: u64) -> i64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        i64::try_from((self.0 >> 33) % bound).unwrap()
    }

    fn event(&mut self) -> SyncEvent {
        let device = format!("pi-{}", self.below(6));
        let timestamp = at(self.below(20));
        // Successes are few, or no streak would live to be counted.
        let event = if self.below(8) == 0 {
            success(&device, timestamp)
        } else {
            failure(&device, timestamp)
        };
        match self.below(3) {
            0 => event,
            job => of_job(&format!("job-{job}"), event),
        }
    }
}

/// Writes many small batches as one node does and returns what it sent.
pub(crate) async fn be_a_node(store: Arc<dyn Store>, seed: u64, batches: u32) -> Vec<Sent> {
    let mut numbers = Numbers(seed);
    let mut writer = store.event_writer();
    let mut all = Vec::new();
    for _ in 0..batches {
        let received = at(numbers.below(MONTHS.cast_unsigned()) * MONTH_SECONDS);
        let events: Vec<_> = (0..=numbers.below(6)).map(|_| numbers.event()).collect();
        let written = writer.write(&batch_at(received, events.clone())).await.unwrap();
        all.extend(sent(received, &events, &written));
        for streak in written.streaks {
            assert!(0 <= streak.before && streak.before < streak.after, "{streak:?}");
        }
    }
    all
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_nodes_add_up_to_the_truth() {
    let fixture = TestStore::prepare(TestDatabase::postgres().await).await;
    let mut nodes = JoinSet::new();
    for seed in [1, 2] {
        let store = store::open(fixture.target()).await.unwrap();
        nodes.spawn(be_a_node(store, seed, 150));
    }
    let sent = nodes.join_all().await.concat();
    for (device_id, jobs) in recount(&sent) {
        let (found_jobs, found) = figures_of(&*fixture.store, &device_id).await;
        assert_eq!(found_jobs, jobs, "{device_id}");
        assert_eq!(found, sum(jobs.values()), "{device_id}");
    }
    let stats = fixture.store.fleet_stats(at(0), 10, Freshness::Everything).await.unwrap();
    assert_eq!(stats.figures.total_syncs.cast_unsigned(), sent.len() as u64);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn devices_are_deleted_while_they_report() {
    let fixture = TestStore::prepare(TestDatabase::postgres().await).await;
    let mut nodes = JoinSet::new();
    for seed in [3, 4] {
        let store = store::open(fixture.target()).await.unwrap();
        nodes.spawn(be_a_node(store, seed, 60));
    }
    let everybody: Vec<DeviceId> =
        (0..6).map(|number| device_id(&format!("pi-{number}"))).collect();
    let mut round = 0;
    while !nodes.is_empty() {
        fixture
            .store
            .delete_device(&everybody[round % everybody.len()], &somebody())
            .await
            .unwrap();
        round += 1;
        while let Some(done) = nodes.try_join_next() {
            done.unwrap();
        }
    }
    // What is left agrees with itself.
    assert_right(&differences(&*fixture.store, false).await);
}
