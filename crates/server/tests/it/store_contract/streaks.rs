//! Figures and streaks are the same in whatever order and whatever batches events arrive.

use std::{
    collections::BTreeMap,
    sync::atomic::{AtomicU32, Ordering},
};

use pisync::store::{Figures, Store};
use pisync_core::{DeviceId, EventId, Mbps, SyncEvent};
use proptest::{
    prelude::*,
    test_runner::{Config, TestRunner},
};
use tokio::{runtime::Handle, sync::Mutex, task::block_in_place};

use crate::support::{
    events::{
        Sent, at, batch_at, device_id, failure, job_name, now, recount, sent, success, sum, write,
    },
    store::{TestStore, assert_right, differences},
};

every_writer!(
    any_order_and_any_batches_add_up_the_same,
    events_of_one_instant_follow_each_other_as_they_came,
);

/// An event to be, of the device with this number. The ranges are small, so that events of one job
/// share an instant, and come late, all the time.
#[derive(Debug, Clone)]
struct Report {
    device: u8,
    job: Option<u8>,
    millisecond: i64,
    total_errors: u32,
    speed: Option<i64>,
}

impl Report {
    /// The event, of a device that is named after `prefix`.
    fn event(&self, prefix: &str) -> SyncEvent {
        SyncEvent {
            device_id: device_id(&format!("{prefix}-{}", self.device)),
            event_id: None,
            timestamp: now().saturating_add_milliseconds(self.millisecond),
            total_files_synced: 3,
            total_errors: self.total_errors,
            internet_speed: self.speed.and_then(Mbps::from_hundredths),
            job: self.job.map(|job| job_name(&format!("job-{job}"))),
            duration: None,
            bytes_synced: None,
            metadata: None,
        }
    }
}

fn report() -> impl Strategy<Value = Report> {
    // Two of three fail, or there would be no streaks to speak of.
    let total_errors = 0..3_u32;
    let (job, speed) = (prop::option::of(0..2_u8), prop::option::of(0..500_i64));
    (0..3_u8, job, 0..8_i64, total_errors, speed).prop_map(
        |(device, job, second, total_errors, speed)| Report {
            device,
            job,
            millisecond: second * 1000,
            total_errors,
            speed,
        },
    )
}

/// Batches in their order of arrival, each with the second in which it is received.
fn batches() -> impl Strategy<Value = Vec<(i64, Vec<Report>)>> {
    prop::collection::vec((0..5_i64, prop::collection::vec(report(), 1..8)), 1..12)
}

/// The seconds in their order, the milliseconds of each in any: reports of a device that are sent at the same time.
fn scrambled_batches() -> impl Strategy<Value = Vec<(i64, Vec<Report>)>> {
    let reports = prop::collection::vec((report(), 0..9_i64), 1..5);
    prop::collection::vec(reports, 1..16).prop_map(|batches| {
        let dated = |second: i64, (report, part): (Report, i64)| Report {
            millisecond: second * 1000 + part * 111,
            ..report
        };
        let seconds = (0..).map(|number| number / 4);
        let batch = |(second, reports): (i64, Vec<_>)| {
            (second, reports.into_iter().map(|report| dated(second, report)).collect())
        };
        seconds.zip(batches).map(batch).collect()
    })
}

/// What the store says of a device's jobs, and of the device.
pub(crate) async fn figures_of(
    store: &dyn Store,
    device: &DeviceId,
) -> (BTreeMap<Option<String>, Figures>, Figures) {
    let found = store.device(device).await.unwrap().unwrap();
    (found.jobs.into_iter().collect(), found.device.figures)
}

async fn any_order_and_any_batches_add_up_the_same(fixture: &TestStore) {
    // A case takes some ten commits, which cost more on PostgreSQL.
    let cases = if fixture.is_postgres() { 40 } else { 80 };
    let config = Config { cases, failure_persistence: None, ..Config::default() };
    // All cases share a database and a writer with its memory: devices are new in each.
    let case_number = AtomicU32::new(0);
    let writer = Mutex::new(fixture.writer());
    let check = |batches: Vec<(i64, Vec<Report>)>| {
        let case_number = case_number.fetch_add(1, Ordering::Relaxed);
        let prefix = format!("case-{case_number}");
        let work = async {
            let mut writer = writer.lock().await;
            let mut all: Vec<Sent> = Vec::new();
            for (second, reports) in &batches {
                let events: Vec<_> = reports.iter().map(|report| report.event(&prefix)).collect();
                let received = at(*second);
                let written = writer.write(&batch_at(received, events.clone())).await.unwrap();
                all.extend(sent(received, &events, &written));
                // What a batch reports of streaks is what then stands in the store.
                let counted = recount(&all);
                for streak in &written.streaks {
                    let job = streak.job.as_ref().map(|job| job.as_str().to_owned());
                    let expected = counted[&streak.device_id][&job].consecutive_failures;
                    prop_assert_eq!(streak.after, expected);
                    prop_assert!(expected > 0 && streak.before < expected);
                }
            }
            for (device_id, jobs) in recount(&all) {
                let (found_jobs, found) = figures_of(&*fixture.store, &device_id).await;
                prop_assert_eq!(&found_jobs, &jobs);
                prop_assert_eq!(found, sum(jobs.values()));
            }
            Ok(())
        };
        block_in_place(|| Handle::current().block_on(work))
    };
    let batches = prop_oneof![batches(), scrambled_batches()];
    TestRunner::new(config).run(&batches, check).unwrap();
}

async fn events_of_one_instant_follow_each_other_as_they_came(fixture: &TestStore) {
    let mut writer = fixture.writer();
    let mut batch_number = 0;
    // Each letter is an event of the same instant, each word a batch: a success or a failure.
    for (device, batches, expected) in [
        ("one-batch", "sfff", 3),
        ("success-last", "fffs", 0),
        ("success-between", "fsffsf", 1),
        ("batch-after-batch", "s ff f", 3),
        ("success-in-the-second", "ff sf", 1),
        ("success-alone", "ff s", 0),
        ("success-twice", "sf sff", 2),
        ("each-alone", "f s f s f f", 2),
    ] {
        for batch in batches.split(' ') {
            let events = batch.chars().enumerate().map(|(index, letter)| {
                let event = if letter == 's' { success } else { failure };
                // The ids that devices give say nothing about the order.
                let event_id = EventId::new(&format!("{batch_number}-{}", 9 - index)).ok();
                SyncEvent { event_id, ..event(device, at(0)) }
            });
            write(&mut *writer, events.collect()).await;
            batch_number += 1;
        }
        let (_, figures) = figures_of(&*fixture.store, &device_id(device)).await;
        assert_eq!(figures.consecutive_failures, expected, "{device}");
    }
    assert_right(&differences(&*fixture.store, false).await);
}
