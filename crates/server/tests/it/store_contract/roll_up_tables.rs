//! What the tables of days, groups and digests must hold, counted the plain way from everything that was sent. The tables
//! are read with SQL, because pages will do that.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use pisync::store::{Actor, DeviceChange, Target};
use pisync_core::{Mbps, SyncDuration, SyncEvent, Timestamp};

use super::retention::{aggregate, expire, retention};
use crate::support::{
    events::{
        at, batch_at, device_id, failure, group_name, now, somebody, success, write, write_at,
    },
    postgres::connect,
    store::{Fixture, TestDatabase, TestStore, differences},
};

both_stores!(
    a_run_stays_with_the_group_of_its_time,
    what_is_no_longer_kept_is_subtracted_with_its_device,
    wrong_tables_are_found_and_made_anew,
    days_of_an_earlier_version_are_filled,
    many_moves_cost_little,
    what_foreign_sql_wrote_stops_no_aggregation,
    hours_are_counted_again_after_a_clock_was_ahead,
);

const HOUR: i64 = 60 * 60 * 1000;
const DAY: i64 = 24 * HOUR;

/// Everything that was done to a fleet.
#[derive(Default)]
pub(super) struct Fleet {
    /// When each event was received.
    pub(super) sent: Vec<(Timestamp, SyncEvent)>,
    /// When devices left which group; empty for none.
    moves: BTreeMap<String, Vec<(Timestamp, String)>>,
    groups: BTreeMap<String, String>,
}

impl Fleet {
    pub(super) fn events(&self) -> Vec<SyncEvent> {
        self.sent.iter().map(|(_, event)| event.clone()).collect()
    }

    /// Moves a device to another group, or out of all groups, if it is known.
    pub(super) async fn change_group(
        &mut self,
        fixture: &TestStore,
        device: &str,
        group: &str,
        at: Timestamp,
    ) {
        let named = (!group.is_empty()).then(|| group_name(group));
        let change = DeviceChange { group: Some(named), ..DeviceChange::default() };
        let by = Actor { at, ..somebody() };
        if fixture.store.update_device(&device_id(device), &change, &by).await.unwrap() {
            let former =
                self.groups.insert(device.to_owned(), group.to_owned()).unwrap_or_default();
            if former != group {
                self.moves.entry(device.to_owned()).or_default().push((at, former));
            }
        }
    }

    pub(super) fn forget(&mut self, device: &str) {
        self.sent.retain(|(_, event)| event.device_id.as_str() != device);
        self.moves.remove(device);
        self.groups.remove(device);
    }

    fn group_of(&self, received: Timestamp, event: &SyncEvent) -> String {
        let device = event.device_id.as_str();
        let moves = self.moves.get(device).map(Vec::as_slice).unwrap_or_default();
        let former = moves.iter().find(|(at, _)| received < *at).map(|(_, former)| former);
        former.or_else(|| self.groups.get(device)).cloned().unwrap_or_default()
    }
}

/// SQL for a text of a row: its columns with spaces between, and "-" for nulls.
fn text(columns: &[&str]) -> String {
    let columns: Vec<_> =
        columns.iter().map(|column| format!("coalesce(cast({column} as text), '-')")).collect();
    columns.join(" || ' ' || ")
}

/// SQL for the number of the day, or of the hour, in a column.
fn number_of(fixture: &TestStore, column: &str, length: i64) -> String {
    match (fixture.is_postgres(), column) {
        (false, _) => format!("{column} / {length}"),
        (true, "hour") => "cast(extract(epoch from hour) as bigint) / 3600".to_owned(),
        (true, _) => format!("{column} - date '1970-01-01'"),
    }
}

fn or_none(number: Option<i64>) -> String {
    number.map_or_else(|| "-".to_owned(), |number| number.to_string())
}

/// All tables hold what follows from the events that are aggregated. `now` is the clock of upkeep.
pub(super) async fn assert_tables_exact(fixture: &TestStore, fleet: &Fleet, now: Timestamp) {
    fixture.store.maintain(now).await.unwrap();
    fixture.store.drop_group_hours(now).await.unwrap();
    while fixture.store.aggregate_events(now).await.unwrap() {}
    let database = &fixture.database;
    let number = async |select: &str| database.number(select).await;
    let (since, until) = if fixture.is_postgres() {
        let milliseconds = |column: &str| {
            format!("(select floor(extract(epoch from {column}) * 1000) from roll_up_state)")
        };
        let until = format!("coalesce({}, -1)", milliseconds("folded_until"));
        (number(&milliseconds("group_hours_since")).await, number(&until).await)
    } else {
        (number("(select group_hours_since from roll_up_state)").await, i64::MAX)
    };
    assert_eq!(since, (now.as_millisecond().div_euclid(HOUR) - 14 * 24) * HOUR);

    let mut days = BTreeMap::<(String, i64), Day>::new();
    let mut group_days = BTreeMap::<(String, i64), (i64, i64)>::new();
    let mut group_hours = BTreeMap::<(String, i64), (i64, i64)>::new();
    for (received, event) in &fleet.sent {
        if received.as_millisecond() > until {
            continue;
        }
        let (millisecond, failed) =
            (event.timestamp.as_millisecond(), i64::from(event.total_errors > 0));
        let (day, hour) = (millisecond.div_euclid(DAY), millisecond.div_euclid(HOUR));
        days.entry((event.device_id.to_string(), day)).or_default().add(event);
        let group = fleet.group_of(*received, event);
        let of_day = group_days.entry((group.clone(), day)).or_default();
        *of_day = (of_day.0 + 1, of_day.1 + failed);
        if hour * HOUR >= since {
            let of_hour = group_hours.entry((group, hour)).or_default();
            *of_hour = (of_hour.0 + 1, of_hour.1 + failed);
        }
    }

    let (device, join) = if fixture.is_postgres() {
        ("days.device_id", "")
    } else {
        ("devices.device_id", "join devices on devices.id = days.device")
    };
    let day = number_of(fixture, "day", DAY);
    let columns = [
        device,
        &day,
        "total_syncs",
        "failed_syncs",
        "speed_min",
        "speed_max",
        "duration_sum",
        "duration_count",
        "duration_max",
        "bytes_sum",
    ];
    let select =
        format!("select {} from device_days days {join} where total_syncs > 0", text(&columns));
    let expected =
        days.iter().map(|((device, day), of_day)| format!("{device} {day} {}", of_day.text()));
    assert_same(expected.collect(), database.texts(&select).await, "device_days");

    let hour = number_of(fixture, "hour", HOUR);
    for (table, begins, expected) in
        [("group_days", &day, group_days), ("group_hours", &hour, group_hours)]
    {
        let columns = [r#""group""#, begins, "runs", "failed_runs"];
        let select =
            format!("select {} from {table} where runs <> 0 or failed_runs <> 0", text(&columns));
        let expected = expected
            .into_iter()
            .map(|((group, begins), (runs, failed))| format!("{group} {begins} {runs} {failed}"));
        assert_same(expected.collect(), database.texts(&select).await, table);
    }

    while fixture.store.make_digests(now).await.unwrap() {}
    let columns = [device, &day, "runs_30d", "failed_30d", "speed_7d"];
    let digests = format!("select {} from device_digest days {join}", text(&columns));
    for digest in database.texts(&digests).await {
        let mut parts = digest.split(' ');
        let (device, day) = (parts.next().unwrap(), parts.next().unwrap());
        let of_device = |length: i64| {
            let day: i64 = day.parse().unwrap();
            days.range((device.to_owned(), day - length)..(device.to_owned(), day))
                .map(|(_, day)| day)
        };
        let runs: i64 = of_device(30).map(|day| day.runs).sum();
        let failed: i64 = of_device(30).map(|day| day.failed).sum();
        let speeds: Vec<i64> = of_device(7).flat_map(|day| day.speeds.iter().copied()).collect();
        let speed = (!speeds.is_empty()).then(|| {
            let count = i64::try_from(speeds.len()).unwrap();
            (2 * speeds.iter().sum::<i64>() + count) / (2 * count)
        });
        assert_eq!(digest, format!("{device} {day} {runs} {failed} {}", or_none(speed)));
    }
    let found = fixture.store.verify_summaries(now, false).await.unwrap();
    assert_eq!((found.number(), found.uncounted_group_hours), (0, 0), "{found:?}");
}

fn assert_same(mut expected: Vec<String>, mut found: Vec<String>, table: &str) {
    expected.sort();
    found.sort();
    assert_eq!(found, expected, "{table}");
}

/// A device's day.
#[derive(Default)]
struct Day {
    runs: i64,
    failed: i64,
    speeds: Vec<i64>,
    durations: Vec<i64>,
    bytes: u64,
}

impl Day {
    fn add(&mut self, event: &SyncEvent) {
        self.runs += 1;
        self.failed += i64::from(event.total_errors > 0);
        self.speeds.extend(event.internet_speed.map(Mbps::hundredths));
        self.durations.extend(event.duration.map(SyncDuration::milliseconds));
        self.bytes += event.bytes_synced.unwrap_or(0);
    }

    fn text(&self) -> String {
        let Self { runs, failed, speeds, durations, bytes } = self;
        let (count, sum) = (durations.len(), durations.iter().sum::<i64>());
        let (slowest, fastest) = (speeds.iter().min(), speeds.iter().max());
        let [slowest, fastest, longest] =
            [slowest, fastest, durations.iter().max()].map(|value| or_none(value.copied()));
        format!("{runs} {failed} {slowest} {fastest} {sum} {count} {longest} {bytes}")
    }
}

async fn group_days(fixture: &TestStore) -> Vec<String> {
    let day = number_of(fixture, "day", DAY);
    let columns = [r#""group""#, &day, "runs", "failed_runs"];
    let mut found = fixture
        .database
        .texts(&format!("select {} from group_days where runs <> 0", text(&columns)))
        .await;
    found.sort();
    found
}

/// What comes late counts for the group in which its device was when it was received, also when it is imported. What
/// another device of the group did, and the hours and digests, do not matter here.
async fn a_run_stays_with_the_group_of_its_time(fixture: &TestStore) {
    let mut fleet = Fleet::default();
    let mut writer = fixture.writer();
    write_at(&mut *writer, at(-600), vec![failure("pi", at(-900))]).await;
    fleet.change_group(fixture, "pi", "North", at(-500)).await;
    // To the group where it is: no move.
    fleet.change_group(fixture, "pi", "North", at(-450)).await;
    write_at(&mut *writer, at(-400), vec![success("pi", at(-900)), success("pi", at(-400))]).await;
    while fixture.store.aggregate_events(at(-330)).await.unwrap() {}
    fleet.change_group(fixture, "pi", "South", at(-300)).await;
    fleet.change_group(fixture, "pi", "", at(-200)).await;
    fleet.change_group(fixture, "pi", "South", at(-150)).await;
    write_at(&mut *writer, at(-120), vec![failure("pi", at(-900))]).await;
    // Received between the moves to South and away from it.
    write_at(&mut *writer, at(-250), vec![success("pi", at(-260))]).await;
    aggregate(&*fixture.store).await;
    let today = now().as_millisecond() / DAY;
    let expected =
        [format!(" {today} 1 1"), format!("North {today} 2 0"), format!("South {today} 2 1")];
    assert_eq!(group_days(fixture).await, expected);
    assert_eq!(fixture.store.verify_summaries(now(), false).await.unwrap().number(), 0);
}

/// Days stay when their events are dropped; a device that is deleted takes its own away from its groups.
async fn what_is_no_longer_kept_is_subtracted_with_its_device(fixture: &TestStore) {
    let mut fleet = Fleet::default();
    let mut writer = fixture.writer();
    let long_ago = |days: i64| at(-days * 24 * 60 * 60);
    for days in [95, 90, 3] {
        let events = ["mover", "stayer"].map(|device| failure(device, long_ago(days)));
        write_at(&mut *writer, long_ago(days), events.to_vec()).await;
        if days == 95 {
            fleet.change_group(fixture, "mover", "North", long_ago(92)).await;
            fleet.change_group(fixture, "stayer", "North", long_ago(99)).await;
        }
    }
    aggregate(&*fixture.store).await;
    let before = group_days(fixture).await;
    expire(&*fixture.store, &retention(30)).await;
    let kept = fixture.database.number("(select count(*) from sync_events)").await;
    assert!(kept < 6, "{kept} events are kept");
    assert_eq!(group_days(fixture).await, before);
    assert_eq!(fixture.store.verify_summaries(now(), false).await.unwrap().number(), 0);
    fixture.store.delete_device(&device_id("mover"), &somebody()).await.unwrap();
    let today = now().as_millisecond() / DAY;
    let expected: Vec<_> =
        [95, 90, 3].map(|days| format!("North {} 1 1", today - days)).into_iter().collect();
    assert_eq!(group_days(fixture).await, expected);
    assert_eq!(fixture.store.verify_summaries(now(), false).await.unwrap().number(), 0);
}

async fn wrong_tables_are_found_and_made_anew(fixture: &TestStore) {
    let mut fleet = Fleet::default();
    let mut writer = fixture.writer();
    for day in 1..4 {
        for device in ["pi-1", "pi-2"] {
            let event = SyncEvent {
                internet_speed: Mbps::from_hundredths(100 * day),
                ..failure(device, at(-day * 24 * 60 * 60))
            };
            write_at(&mut *writer, at(100 * day - 600), vec![event]).await;
        }
        let group = if day % 2 == 1 { "North" } else { "South" };
        fleet.change_group(fixture, "pi-1", group, at(100 * day - 550)).await;
    }
    write(&mut *writer, vec![success("pi-1", at(0)), success("pi-2", at(0))]).await;
    aggregate(&*fixture.store).await;
    while fixture.store.make_digests(now()).await.unwrap() {}
    let rows = async || {
        let mut rows = Vec::new();
        for table in ["device_day_groups", "group_days", "group_hours", "device_digest"] {
            let row = if fixture.is_postgres() {
                format!("select '{table}' || t::text from {table} t order by 1")
            } else {
                let columns = fixture
                    .database
                    .texts(&format!(
                        "select '\"' || name || '\"' from pragma_table_info('{table}')"
                    ))
                    .await;
                let columns: Vec<_> = columns.iter().map(String::as_str).collect();
                format!("select '{table}' || {} from {table} order by 1", text(&columns))
            };
            rows.extend(fixture.database.texts(&row).await);
        }
        rows
    };
    let right = rows().await;
    let day_before = if fixture.is_postgres() { "day - 1" } else { "day - 86400000" };
    for (wrong, days, hours, digests) in [
        ("update group_days set runs = runs + 1", true, false, false),
        ("delete from group_days", true, false, false),
        ("update device_day_groups set failed_runs = 0", true, false, false),
        ("delete from device_day_groups", true, false, false),
        ("update group_hours set failed_runs = 7", false, true, false),
        ("delete from group_hours", false, true, false),
        ("update device_digest set runs_30d = 1", false, false, true),
        ("update device_digest set speed_7d = null", false, false, true),
        ("delete from device_digest", false, false, true),
        (&format!("update device_digest set day = {day_before}"), false, false, true),
    ] {
        fixture.database.execute(wrong).await;
        let found = fixture.store.verify_summaries(now(), false).await.unwrap();
        let found = (found.group_days > 0, found.group_hours > 0, found.digests > 0);
        assert_eq!(found, (days, hours, digests), "{wrong}");
        fixture.store.verify_summaries(now(), true).await.unwrap();
        assert_eq!(
            fixture.store.verify_summaries(now(), false).await.unwrap().number(),
            0,
            "{wrong}"
        );
        assert_eq!(rows().await, right, "{wrong}");
    }
}

/// An earlier version knew neither the range of speeds, nor hours of groups.
async fn days_of_an_earlier_version_are_filled(fixture: &TestStore) {
    let mut writer = fixture.writer();
    let event = |hours: i64| SyncEvent {
        internet_speed: Mbps::from_hundredths(100 * hours),
        duration: SyncDuration::from_milliseconds(1500 * hours),
        bytes_synced: Some((1 << 53) - 1),
        ..failure("pi", at(-hours * 60 * 60))
    };
    let sent: Vec<_> = (1..40).map(event).collect();
    writer.write(&batch_at(at(-60), sent.clone())).await.unwrap();
    aggregate(&*fixture.store).await;
    let since = if fixture.is_postgres() {
        "'2026-11-22 12:00+00'".to_owned()
    } else {
        now().as_millisecond().to_string()
    };
    let earlier = format!(
        "update device_days
            set speed_min = null, speed_max = null, duration_sum = null, duration_count = null,
                duration_max = null, bytes_sum = null;
         delete from group_hours;
         update roll_up_state set group_hours_since = {since}"
    );
    fixture.database.execute(&earlier).await;
    // What comes late does not make it look counted.
    let late = SyncEvent { total_errors: 0, ..event(30) };
    write(&mut *writer, vec![late.clone()]).await;
    aggregate(&*fixture.store).await;

    let found = fixture.store.verify(None, at(60), false).await.unwrap();
    assert_eq!((found.days.len(), found.unfilled_days.len()), (0, 3), "{found:?}");
    let found = fixture.store.verify_summaries(now(), false).await.unwrap();
    assert_eq!((found.number(), found.uncounted_group_hours), (0, 14 * 24));
    fixture.store.verify(None, at(60), true).await.unwrap();
    fixture.store.verify_summaries(now(), true).await.unwrap();
    assert!(differences(&*fixture.store, false).await.is_empty());
    let found = fixture.store.verify(None, at(60), false).await.unwrap();
    assert_eq!((found.days.len(), found.unfilled_days.len()), (0, 0));
    let sent = sent.into_iter().map(|event| (at(-60), event)).chain([(now(), late)]).collect();
    let fleet = Fleet { sent, ..Fleet::default() };
    assert_tables_exact(fixture, &fleet, at(120)).await;
}

/// A script that moves a device to and fro.
async fn many_moves_cost_little(fixture: &TestStore) {
    const MOVES: i64 = 20_000;
    const EVENTS: i64 = 5_000;
    let mut fleet = Fleet::default();
    let mut writer = fixture.writer();
    write_at(&mut *writer, at(-90_000), vec![success("pi", at(-90_000))]).await;
    while fixture.store.aggregate_events(at(-80_000)).await.unwrap() {}
    let moves = if fixture.is_postgres() {
        format!(
            "insert into group_changes (device_id, changed_at, changed_id, former_group)
             select 'pi', timestamptz '2026-11-21 15:00+00' + number * interval '1 s', 0,
                    case when number = 1 then '' else 'group ' || number % 2 end
               from generate_series(1, {MOVES}) number"
        )
    } else {
        format!(
            "insert into group_changes (device, changed_at, changed_id, former_group)
             with recursive numbers (number) as (
                 select 1 union all select number + 1 from numbers where number < {MOVES}
             )
             select 1, 1795273200000 + number * 1000, 0, iif(number = 1, '', 'group ' || number % 2)
               from numbers"
        )
    };
    fixture.database.execute(&moves).await;
    fleet.change_group(fixture, "pi", "now", at(-50_000)).await;
    let began = Instant::now();
    for batch in 0..5 {
        let events = (0..EVENTS / 5).map(|number| failure("pi", at(-number - batch)));
        write_at(&mut *writer, at(-3600), events.collect()).await;
    }
    aggregate(&*fixture.store).await;
    assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
    let found = group_days(fixture).await;
    assert!(
        found.iter().any(|day| day.starts_with("now ") && day.ends_with(" 5000 5000")),
        "{found:?}"
    );
    assert_eq!(fixture.store.verify_summaries(now(), false).await.unwrap().number(), 0);
}

/// Values that no device can report, in columns that have no limits of their own.
async fn what_foreign_sql_wrote_stops_no_aggregation(fixture: &TestStore) {
    let mut writer = fixture.writer();
    let events = (0..6).map(|number| success("pi", at(-4000 - number))).collect();
    write_at(&mut *writer, at(-3900), events).await;
    let wrong = if fixture.is_postgres() {
        "update sync_events set duration_seconds = 'NaN', bytes_synced = -9223372036854775808 where id <= 2;
         update sync_events set duration_seconds = 99999999.999, bytes_synced = 9223372036854775807 where id > 2"
    } else {
        "update sync_events set duration = -9223372036854775808, bytes_synced = -9223372036854775808 where id <= 2;
         update sync_events set duration = 9223372036854775807, bytes_synced = 9223372036854775807,
                                internet_speed = null
          where id > 2"
    };
    fixture.database.execute(wrong).await;
    aggregate(&*fixture.store).await;
    let columns = ["total_syncs", "duration_sum", "duration_count", "duration_max", "bytes_sum"];
    let select = format!("select {} from device_days", text(&columns));
    assert_eq!(fixture.database.texts(&select).await, ["6 0 0 - 0"]);
    let found = fixture.store.verify(None, at(60), false).await.unwrap();
    assert_eq!((found.days, found.unfilled_days), (Vec::new(), Vec::new()));
}

async fn hours_are_counted_again_after_a_clock_was_ahead(fixture: &TestStore) {
    let year = 365 * 24 * 60 * 60;
    fixture.store.drop_group_hours(at(year)).await.unwrap();
    fixture.store.drop_group_hours(at(0)).await.unwrap();
    let mut writer = fixture.writer();
    let events = vec![success("pi", at(-10)), success("pi", at(3600))];
    write_at(&mut *writer, at(3600), events).await;
    while fixture.store.aggregate_events(at(7200)).await.unwrap() {}
    let hours = "(select coalesce(sum(runs), 0) from group_hours)";
    assert_eq!(fixture.database.number(hours).await, 1);
    let found = fixture.store.verify_summaries(at(7200), false).await.unwrap();
    assert_eq!(found.number(), 0, "{found:?}");
    assert!(found.uncounted_group_hours > 300, "{found:?}");
    fixture.store.verify_summaries(at(7200), true).await.unwrap();
    assert_eq!(fixture.database.number(hours).await, 2);
}

/// A long step of aggregation, or a repair, must not keep a server from starting.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn upkeep_at_the_start_waits_for_no_aggregation() {
    let fixture = TestStore::prepare(TestDatabase::postgres().await).await;
    let Target::Postgres(target) = fixture.target() else { unreachable!() };
    let mut other = connect(&target.config).await;
    let step = other.transaction().await.unwrap();
    step.batch_execute("select from roll_up_state for update").await.unwrap();
    let upkeep = tokio::time::timeout(Duration::from_secs(10), fixture.store.maintain(now()));
    upkeep.await.expect("it waits").unwrap();
}
