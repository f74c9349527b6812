//! Figures of the last day, week and month are exact, whatever is aggregated when, and whatever comes late.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicI64, Ordering},
    },
    time::{Duration, Instant},
};

use pisync::store::{
    Batch, Count, Device, DeviceQuery, DeviceSort, FailureQuery, Figures, Freshness, Target, Window,
};
use pisync_core::{Mbps, SyncDuration, SyncEvent, Timestamp};
use proptest::{
    prelude::*,
    test_runner::{Config, TestRunner},
};
use tokio::{runtime::Handle, sync::Mutex, task::block_in_place};

use super::roll_up_tables::{Fleet, assert_tables_exact};
use crate::support::{
    events::{at, batch_at, device_id, failure, somebody, success, write},
    postgres::connect,
    store::{Fixture, TestDatabase, TestStore, differences},
};

both_stores!(
    windows_are_exact_whatever_is_aggregated_when,
    everything_is_aggregated_in_the_end,
    a_database_that_was_filled_before_is_aggregated,
    what_comes_below_the_watermark_is_aggregated_once,
    a_batch_that_waited_until_it_was_below_the_watermark_is_counted,
);

const HOUR: i64 = 60 * 60;
const DAY: i64 = 24 * HOUR;

#[derive(Debug, Clone)]
enum Step {
    /// Events: of which device, how long ago in milliseconds, how many errors, which speed.
    Write(Vec<(u8, i64, u32, Option<i64>)>),
    /// The same, by a node whose clock is slow by so many seconds.
    WriteSlow(i64, Vec<(u8, i64, u32, Option<i64>)>),
    /// The same, of events that were received so many milliseconds after their dates.
    Import(i64, Vec<(u8, i64, u32, Option<i64>)>),
    /// So many seconds pass, and a part of what is stored is aggregated.
    Aggregate(i64),
    /// The summaries of devices are brought up to date.
    Refresh,
    /// A device is deleted.
    Delete(u8),
    /// A device moves to a group, or out of all.
    Move(u8, u8),
    /// The digests of the day are made.
    Digest,
    /// Everything is aggregated, and the tables of days and groups are compared.
    Compare,
}

/// How long ago, often on the border of an hour or a day. All tests begin at noon.
fn age() -> impl Strategy<Value = i64> {
    let near = prop_oneof![Just(-1_i64), Just(0), Just(1), -600_000..600_000_i64];
    prop_oneof![
        (0..26_i64, near.clone()).prop_map(|(hours, off)| hours * HOUR * 1000 + off),
        (0..33_i64, near).prop_map(|(days, off)| (days * DAY - 12 * HOUR) * 1000 + off),
        -300_000..33 * DAY * 1000,
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let events = || {
        let event = (0..5_u8, age(), 0..3_u32, prop::option::of(0..500_i64));
        prop::collection::vec(event, 1..8)
    };
    prop_oneof![
        4 => events().prop_map(Step::Write),
        2 => (0..200_i64, events())
            .prop_map(|(slow, events)| Step::WriteSlow(slow, events)),
        2 => (-300_000..40 * DAY * 1000, events())
            .prop_map(|(took, events)| Step::Import(took, events)),
        3 => (0..7200_i64).prop_map(Step::Aggregate),
        2 => Just(Step::Refresh),
        1 => (0..5_u8).prop_map(Step::Delete),
        2 => (0..5_u8, 0..3_u8).prop_map(|(device, group)| Step::Move(device, group)),
        1 => Just(Step::Digest),
        1 => Just(Step::Compare),
    ]
}

fn is_within(window: &Window, event: &SyncEvent) -> bool {
    (window.from()..window.until()).contains(&event.timestamp)
}

fn naive_figures(sent: &[SyncEvent], window: &Window) -> Figures {
    let mut figures = Figures::default();
    for event in sent.iter().filter(|event| is_within(window, event)) {
        figures.total_syncs += 1;
        figures.failed_syncs += i64::from(event.total_errors > 0);
        figures.total_files_synced += i64::from(event.total_files_synced);
        figures.total_errors += i64::from(event.total_errors);
        figures.speed_sum += event.internet_speed.map_or(0, Mbps::hundredths);
        figures.speed_count += i64::from(event.internet_speed.is_some());
    }
    figures
}

/// Devices and how often they failed, the most failures first.
fn naive_failures(sent: &[SyncEvent], window: &Window, threshold: i64) -> Vec<(String, i64)> {
    let mut failures: BTreeMap<&str, (i64, Option<Timestamp>)> = BTreeMap::new();
    for event in sent.iter().filter(|event| event.total_errors > 0) {
        let (count, latest) = failures.entry(event.device_id.as_str()).or_default();
        *count += i64::from(is_within(window, event));
        *latest = (*latest).max(Some(event.timestamp));
    }
    let mut failures: Vec<_> =
        failures.into_iter().filter(|(_, (count, _))| *count >= threshold).collect();
    failures.sort_by_key(|(device, (count, latest))| {
        (std::cmp::Reverse((*count, *latest)), (*device).to_owned())
    });
    failures.into_iter().map(|(device, (count, _))| (device.to_owned(), count)).collect()
}

async fn assert_exact(fixture: &TestStore, sent: &[SyncEvent], now: Timestamp) {
    let windows =
        [Window::last_24_hours(now), Window::last_days(now, 7), Window::last_days(now, 30)];
    for window in windows {
        let found = fixture.store.window_figures(&window).await.unwrap();
        assert_eq!(found, naive_figures(sent, &window), "{window:?}");
        for threshold in [1, 2, 4] {
            let query = FailureQuery {
                threshold,
                consecutive: false,
                window: Some(window),
                limit: None,
                offset: 0,
                after: None,
            };
            let page = fixture.store.repeated_failures(&query).await.unwrap();
            let found: Vec<_> = page
                .items
                .into_iter()
                .map(|device| (device.device_id, device.figures.failed_syncs))
                .collect();
            assert_eq!(found, naive_failures(sent, &window, threshold.into()), "{window:?}");
            assert_eq!(page.total, Count::Exactly(found.len() as u64));
            // By streaks, those of them that failed within the window.
            let query = FailureQuery { consecutive: true, ..query };
            let page = fixture.store.repeated_failures(&query).await.unwrap();
            let candidates = naive_failures(sent, &window, 1);
            for device in &page.items {
                let failures = (device.device_id.clone(), device.figures.failed_syncs);
                assert!(candidates.contains(&failures));
                assert!(device.figures.consecutive_failures >= i64::from(threshold));
            }
        }
    }
}

/// The device's figure that a list is sorted by.
fn sort_key(sort: DeviceSort, figures: &Figures) -> Option<i64> {
    let time = |time: Option<Timestamp>| time.map(Timestamp::as_millisecond);
    match sort {
        DeviceSort::LastSeen => time(figures.last_seen),
        DeviceSort::LastSync => time(figures.last_sync),
        DeviceSort::LastSuccess => time(figures.last_success),
        DeviceSort::TotalSyncs => Some(figures.total_syncs),
        DeviceSort::FailedSyncs => Some(figures.failed_syncs),
        DeviceSort::ConsecutiveFailures => Some(figures.consecutive_failures),
        DeviceSort::DeviceId
        | DeviceSort::Name
        | DeviceSort::CreatedAt
        | DeviceSort::Status
        | DeviceSort::StatusSince => None,
    }
}

/// Every page of every list, and the counts, follow from the figures of the devices one by one.
async fn assert_lists_exact(fixture: &TestStore, sent: &[SyncEvent]) {
    const SORTS: [DeviceSort; 6] = [
        DeviceSort::LastSeen,
        DeviceSort::LastSync,
        DeviceSort::LastSuccess,
        DeviceSort::TotalSyncs,
        DeviceSort::FailedSyncs,
        DeviceSort::ConsecutiveFailures,
    ];
    let store = &fixture.store;
    let mut fleet = Vec::new();
    for device_id in sent.iter().map(|event| event.device_id.clone()).collect::<BTreeSet<_>>() {
        fleet.push(store.device(&device_id).await.unwrap().unwrap().device);
    }
    let ids = |devices: &[Device]| -> Vec<String> {
        devices.iter().map(|device| device.device_id.clone()).collect()
    };
    for sort in SORTS {
        for descending in [false, true] {
            let mut expected = fleet.clone();
            expected.sort_by_key(|device| {
                let key = sort_key(sort, &device.figures);
                let turned = key.map(|key| if descending { -i128::from(key) } else { key.into() });
                (key.is_none(), turned, device.device_id.clone())
            });
            let mut found = Vec::new();
            let mut query = DeviceQuery {
                search: None,
                group: None,
                tag: None,
                states: Vec::new(),
                is_overdue: false,
                sort,
                descending,
                limit: 2,
                offset: 0,
                after: None,
            };
            loop {
                let page = store.devices(&query).await.unwrap();
                assert_eq!(page.total, Count::Exactly(fleet.len() as u64));
                let offset =
                    DeviceQuery { offset: found.len() as u64, after: None, ..query.clone() };
                let by_offset = store.devices(&offset).await.unwrap();
                assert_eq!(ids(&by_offset.items), ids(&page.items), "{query:?}");
                found.extend(page.items);
                query.after = page.next;
                if query.after.is_none() {
                    break;
                }
            }
            assert_eq!(ids(&found), ids(&expected), "{query:?}");
            let figures = found.iter().map(|device| device.figures);
            assert!(figures.eq(expected.iter().map(|device| device.figures)), "{query:?}");
        }
    }
    for (consecutive, threshold) in [(false, 1), (false, 3), (true, 1), (true, 2)] {
        let failures = |device: &Device| {
            let Figures { failed_syncs, consecutive_failures, .. } = device.figures;
            if consecutive { consecutive_failures } else { failed_syncs }
        };
        let mut expected = fleet.clone();
        expected.retain(|device| failures(device) >= i64::from(threshold));
        expected.sort_by_key(|device| {
            (Reverse((failures(device), device.figures.last_failure)), device.device_id.clone())
        });
        let mut query = FailureQuery {
            threshold,
            consecutive,
            window: None,
            limit: None,
            offset: 0,
            after: None,
        };
        let all = store.repeated_failures(&query).await.unwrap();
        assert_eq!(ids(&all.items), ids(&expected), "{query:?}");
        assert_eq!(all.total, Count::Exactly(expected.len() as u64));
        query.limit = Some(1);
        let mut found = Vec::new();
        loop {
            let page = store.repeated_failures(&query).await.unwrap();
            found.extend(page.items);
            query.after = page.next;
            if query.after.is_none() {
                break;
            }
        }
        assert_eq!(ids(&found), ids(&expected), "{query:?}");
    }
    let mut seen: Vec<_> = fleet.iter().filter_map(|device| device.figures.last_seen).collect();
    seen.sort_unstable();
    let mut recent = fleet.clone();
    recent.sort_by_key(|device| (Reverse(device.figures.last_sync), device.device_id.clone()));
    recent.truncate(2);
    for since in seen.iter().copied().chain([Timestamp::MIN]) {
        let stats = store.fleet_stats(since, 2, Freshness::Everything).await.unwrap();
        assert_eq!(ids(&stats.recent_devices), ids(&recent));
        let active = seen.iter().filter(|seen| **seen >= since).count();
        assert_eq!(
            (stats.total_devices, stats.active_devices),
            (fleet.len() as u64, active as u64)
        );
        let total: i64 = fleet.iter().map(|device| device.figures.total_files_synced).sum();
        let syncs: i64 = fleet.iter().map(|device| device.figures.total_syncs).sum();
        assert_eq!((stats.figures.total_syncs, stats.figures.total_files_synced), (syncs, total));
        assert_eq!(syncs, i64::try_from(sent.len()).unwrap());
    }
}

/// Events of devices, dated so many milliseconds before `now`.
fn events_at(now: Timestamp, events: Vec<(u8, i64, u32, Option<i64>)>) -> Vec<SyncEvent> {
    let event = |(device, age, total_errors, speed): (u8, i64, u32, _)| SyncEvent {
        total_errors,
        internet_speed: Option::and_then(speed, Mbps::from_hundredths),
        duration: (total_errors < 2)
            .then(|| SyncDuration::from_milliseconds(age.abs() % 977))
            .flatten(),
        bytes_synced: speed.map(|speed| speed.unsigned_abs() << 40),
        ..success(&format!("pi-{device}"), now.saturating_add_milliseconds(-age.max(-300_000)))
    };
    events.into_iter().map(event).collect()
}

async fn windows_are_exact_whatever_is_aggregated_when(fixture: &TestStore) {
    let cases = if fixture.is_postgres() { 15 } else { 30 };
    let config =
        Config { cases, failure_persistence: None, max_shrink_iters: 0, ..Config::default() };
    // The fleet is one: all cases share the database, the clock and what was sent.
    let second = AtomicI64::new(0);
    let state = Mutex::new((fixture.writer(), Fleet::default()));
    let check = |steps: Vec<Step>| {
        let work = async {
            let mut state = state.lock().await;
            let (writer, fleet) = &mut *state;
            for step in steps {
                // Each step has an instant of its own, so that the order of moves and reports is clear.
                let now = at(second.fetch_add(1, Ordering::Relaxed) + 1);
                match step {
                    Step::Write(events) => {
                        let events = events_at(now, events);
                        fleet.sent.extend(events.iter().map(|event| (now, event.clone())));
                        writer.write(&batch_at(now, events)).await.unwrap();
                    }
                    Step::WriteSlow(seconds, events) => {
                        let slow = now.saturating_add_milliseconds(-seconds * 1000);
                        let events = events_at(slow, events);
                        fleet.sent.extend(events.iter().map(|event| (slow, event.clone())));
                        fixture.writer().write(&batch_at(slow, events)).await.unwrap();
                    }
                    Step::Import(took, events) => {
                        let events = events_at(now, events);
                        let received = |event: &SyncEvent| {
                            event.timestamp.saturating_add_milliseconds(took).min(now)
                        };
                        let received_at: Vec<_> = events.iter().map(received).collect();
                        fleet.sent.extend(received_at.iter().copied().zip(events.iter().cloned()));
                        let batch = Arc::new(Batch { received_at, ..Batch::new(now, events) });
                        fixture.writer().write(&batch).await.unwrap();
                    }
                    Step::Aggregate(seconds) => {
                        let now = second.fetch_add(seconds, Ordering::Relaxed) + seconds;
                        fixture.store.aggregate_events(at(now)).await.unwrap();
                    }
                    Step::Refresh => fixture.store.refresh_summaries().await.unwrap(),
                    Step::Delete(device) => {
                        let device = format!("pi-{device}");
                        let by = somebody();
                        fixture.store.delete_device(&device_id(&device), &by).await.unwrap();
                        fleet.forget(&device);
                    }
                    Step::Move(device, group) => {
                        let group = ["", "North", "South"][usize::from(group)];
                        fleet.change_group(fixture, &format!("pi-{device}"), group, now).await;
                    }
                    Step::Digest => while fixture.store.make_digests(now).await.unwrap() {},
                    Step::Compare => assert_tables_exact(fixture, fleet, now).await,
                }
            }
            let sent = fleet.events();
            assert_exact(fixture, &sent, at(second.load(Ordering::Relaxed))).await;
            assert_lists_exact(fixture, &sent).await;
            Ok(())
        };
        block_in_place(|| Handle::current().block_on(work))
    };
    let steps = prop::collection::vec(step(), 1..12);
    TestRunner::new(config).run(&steps, check).unwrap();
}

/// What `select` answers with one number, behind the store's back.
async fn number(fixture: &TestStore, select: &str) -> i64 {
    match fixture.target() {
        pisync::store::Target::Sqlite(path) => {
            let connection = rusqlite::Connection::open(path).unwrap();
            connection.query_row(select, [], |row| row.get(0)).unwrap()
        }
        pisync::store::Target::Postgres(target) => {
            let client = crate::support::postgres::connect(&target.config).await;
            client.query_one(select, &[]).await.unwrap().get(0)
        }
    }
}

async fn aggregate_everything(fixture: &TestStore, now: Timestamp) {
    while fixture.store.aggregate_events(now).await.unwrap() {}
}

async fn everything_is_aggregated_in_the_end(fixture: &TestStore) {
    let cast = if fixture.is_postgres() { "::bigint" } else { "" };
    let watermark = format!("select coalesce(sum(total_syncs), 0){cast} from device_days");
    let hours = format!("select coalesce(sum(total_syncs), 0){cast} from fleet_hours");
    aggregate_everything(fixture, at(0)).await;
    assert_eq!(number(fixture, &watermark).await, 0);
    let mut writer = fixture.writer();
    for batch in 0..6 {
        let events = (0..200).map(|event| failure(&format!("pi-{event}"), at(-batch * DAY)));
        write(&mut *writer, events.collect()).await;
    }
    aggregate_everything(fixture, at(HOUR)).await;
    for select in [&watermark, &hours] {
        assert_eq!(number(fixture, select).await, 1200);
    }
    // Nothing twice.
    aggregate_everything(fixture, at(2 * HOUR)).await;
    assert_eq!(number(fixture, &watermark).await, 1200);
    assert_eq!(number(fixture, &hours).await, 1200);
}

async fn a_database_that_was_filled_before_is_aggregated(fixture: &TestStore) {
    let mut writer = fixture.writer();
    let mut sent = Vec::new();
    for days in [400, 200, 35, 20, 3, 0] {
        let events: Vec<_> = (0..20)
            .map(|number| failure(&format!("pi-{}", number % 3), at(-days * DAY - number * HOUR)))
            .collect();
        sent.extend(events.iter().cloned());
        writer.write(&batch_at(at(-days * DAY), events)).await.unwrap();
    }
    assert_exact(fixture, &sent, at(HOUR)).await;
    while fixture.store.aggregate_events(at(HOUR)).await.unwrap() {
        assert_exact(fixture, &sent, at(HOUR)).await;
    }
    assert_exact(fixture, &sent, at(HOUR)).await;
    let cast = if fixture.is_postgres() { "::bigint" } else { "" };
    let watermark = format!("select sum(total_syncs){cast} from device_days");
    assert_eq!(number(fixture, &watermark).await, 120);
}

/// Several nodes store events that were received long ago, then with slow clocks, while another aggregates: each is
/// aggregated once, by whichever of them.
async fn what_comes_below_the_watermark_is_aggregated_once(fixture: &TestStore) {
    const WRITERS: i64 = 3;
    const BATCHES: i64 = 40;
    let write = async |number: i64, is_import: bool| {
        let mut writer = fixture.writer();
        for batch in 0..BATCHES {
            let event =
                |step: i64| failure(&format!("pi-{}", (step + number) % 4), at(-step * 3601));
            let events: Vec<_> = (0..5).map(|step| event(step + batch)).collect();
            let received_at: Vec<_> = events.iter().map(|event| event.timestamp).collect();
            let batch = if is_import {
                Batch { received_at, ..Batch::new(at(0), events) }
            } else {
                Batch::new(at(-200 * number), events)
            };
            writer.write(&Arc::new(batch)).await.unwrap();
        }
    };
    // The imports meet aggregation while it catches up, the slow clocks once it keeps up.
    for is_import in [true, false] {
        let writing = AtomicBool::new(true);
        let aggregate = async {
            // An hour passes, minute by minute.
            let mut minutes = 0;
            while writing.load(Ordering::Relaxed) {
                fixture.store.aggregate_events(at(minutes * 60)).await.unwrap();
                minutes = (minutes + 1).min(60);
                tokio::task::yield_now().await;
            }
        };
        let write_all = async {
            let [first, second, third] = [1, 2, 3].map(|number| write(number, is_import));
            futures_util::future::join3(first, second, third).await;
            writing.store(false, Ordering::Relaxed);
        };
        futures_util::future::join(aggregate, write_all).await;
        aggregate_everything(fixture, at(0)).await;
    }
    aggregate_everything(fixture, at(2 * HOUR)).await;
    let cast = if fixture.is_postgres() { "::bigint" } else { "" };
    for table in ["device_days", "fleet_hours"] {
        let watermark = format!("select sum(total_syncs){cast} from {table}");
        assert_eq!(number(fixture, &watermark).await, 2 * WRITERS * BATCHES * 5, "{table}");
    }
}

/// Attempts that met locks, a database that was away, or a long queue: however late a batch is written, the sums
/// know of it. The writer looked how far aggregation had come before the batch was stamped.
async fn a_batch_that_waited_until_it_was_below_the_watermark_is_counted(fixture: &TestStore) {
    let mut writer = fixture.writer();
    write(&mut *writer, vec![failure("pi", at(0))]).await;
    aggregate_everything(fixture, at(120)).await;
    for (seconds, waited) in [(1, 16), (2, 60), (3, 3600)] {
        let stamped = Instant::now().checked_sub(Duration::from_secs(waited)).unwrap();
        let event = failure("pi", at(seconds));
        let batch = Batch { stamped, ..Batch::new(at(seconds), vec![event]) };
        writer.write(&Arc::new(batch)).await.unwrap();
        let found = fixture.store.window_figures(&Window::last_24_hours(at(120))).await.unwrap();
        assert_eq!(found.total_syncs, seconds + 1, "waited for {waited} s");
        assert!(differences(&*fixture.store, false).await.is_empty());
    }
    assert!(!writer.send(&Arc::new(Batch {
        stamped: Instant::now().checked_sub(Duration::from_secs(16)).unwrap(),
        ..Batch::new(at(4), vec![failure("pi", at(4))])
    })));
}

/// A transaction that takes longer than aggregation waits, such as one whose commit waits for a standby.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn aggregation_waits_for_transactions_that_are_older_than_what_it_aggregates() {
    let fixture = TestStore::prepare(TestDatabase::postgres().await).await;
    let Target::Postgres(target) = fixture.target() else { unreachable!() };
    let mut slow = connect(&target.config).await;
    // By the database's clock, which says when transactions began.
    let now: jiff::Timestamp = slow.query_one("select now()", &[]).await.unwrap().get(0);
    let now = Timestamp::truncate(now);
    let after = |seconds: i64| now.saturating_add_milliseconds(seconds * 1000);
    fixture.store.maintain(now).await.unwrap();
    let mut writer = fixture.writer();
    writer.write(&batch_at(after(-3600), vec![failure("pi", after(-3600))])).await.unwrap();

    let transaction = slow.transaction().await.unwrap();
    let insert = "insert into sync_events (device_id, timestamp, total_files_synced, total_errors, created_at)
                  values ('pi', $1, 0, 1, $1)";
    transaction.execute(insert, &[&now.to_jiff()]).await.unwrap();
    aggregate_everything(&fixture, after(600)).await;
    assert_eq!(number(&fixture, "select sum(total_syncs)::bigint from fleet_hours").await, 1);
    transaction.commit().await.unwrap();
    assert_eq!(fixture.store.verify_hours().await.unwrap(), []);

    aggregate_everything(&fixture, after(600)).await;
    assert_eq!(number(&fixture, "select sum(total_syncs)::bigint from fleet_hours").await, 2);
    assert_eq!(fixture.store.verify_hours().await.unwrap(), []);
}
