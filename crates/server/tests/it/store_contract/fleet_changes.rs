//! What people set for the fleet, its groups and its devices: what a change leaves for the sweep, and what it leaves alone.

use pisync::store::{
    DeviceChange, GroupQuery, LevelChange, NewWindow, PauseChange, Pauses, PolicyUpdate,
    RosterOutcome, RosterRow, WindowEffect, WindowScope,
};
use pisync_core::{
    Timestamp,
    health::{Pause, PolicyChange, WindowTimes, time_zone},
};
use serde_json::{Value, json};

use crate::support::{
    events::{at, device_id, failure, group_name, somebody, success, write},
    store::{TestStore, assert_right, differences},
};

both_stores!(
    each_change_tells_the_sweep_whom_to_evaluate,
    what_changes_nothing_leaves_a_line_in_the_audit_log_alone,
    a_roster_changes_each_device_once,
    a_dry_run_changes_nothing,
    moved_devices_are_waited_for_anew,
    a_group_goes_and_its_devices_stay,
    a_device_that_is_deleted_leaves_nothing,
    rosters_and_reports_wait_for_one_another,
);

fn by(second: i64) -> pisync::store::Actor {
    pisync::store::Actor { at: at(second), ..somebody() }
}

fn policy(value: &Value) -> Option<PolicyUpdate> {
    Some(PolicyUpdate::Merge(PolicyChange::read(value, "policy").unwrap()))
}

fn in_group(group: &str) -> DeviceChange {
    DeviceChange { group: Some(Some(group_name(group))), ..DeviceChange::default() }
}

fn tagged(tags: &[&str]) -> DeviceChange {
    let tags = tags.iter().map(|tag| (*tag).to_owned()).collect();
    DeviceChange { tags: Some(tags), ..DeviceChange::default() }
}

fn paused(pause: PauseChange) -> DeviceChange {
    DeviceChange { pause: Some(pause), ..DeviceChange::default() }
}

/// What is left for the sweep since the version `after`, in the order of versions.
async fn changes(fixture: &TestStore, after: i64) -> Vec<String> {
    let select = format!(
        "select scope || ' ' || key from fleet_changes where version > {after} order by version"
    );
    let changes = fixture.database.texts(&select).await;
    let last = after + changes.len() as i64;
    assert_eq!(fixture.store.fleet_version().await.unwrap(), last);
    assert_eq!(fixture.database.number("(select max(version) from fleet_changes)").await, last);
    changes
}

fn window(scope: WindowScope) -> NewWindow {
    let times = WindowTimes {
        zone: time_zone("Europe/Berlin").unwrap(),
        from: Some(at(0)),
        until: Some(at(3600)),
        weekly: None,
    };
    NewWindow {
        name: "holiday".to_owned(),
        scope,
        effect: WindowEffect::Closed,
        timezone: "Europe/Berlin".to_owned(),
        times,
    }
}

async fn update(fixture: &TestStore, device: &str, change: &DeviceChange, second: i64) {
    let updated = fixture.store.update_device(&device_id(device), change, &by(second)).await;
    assert!(updated.unwrap());
}

async fn each_change_tells_the_sweep_whom_to_evaluate(fixture: &TestStore) {
    let store = &fixture.store;
    let unknown = store.update_device(&device_id("pi"), &tagged(&["a"]), &somebody()).await;
    assert!(!unknown.unwrap());
    assert!(store.put_device(&device_id("pi"), &tagged(&["a"]), &by(1)).await.unwrap());
    assert_eq!(changes(fixture, 0).await, ["device pi"]);
    let grace = json!({"grace_seconds": 60});
    for change in [
        DeviceChange { policy: policy(&grace), ..DeviceChange::default() },
        tagged(&["a", "b"]),
        paused(PauseChange::Until(None)),
        paused(PauseChange::Until(Some(at(100)))),
        paused(PauseChange::End),
        DeviceChange { expected: Some(Some(false)), ..DeviceChange::default() },
        DeviceChange { expected: Some(None), ..DeviceChange::default() },
        in_group("school"),
    ] {
        let before = store.fleet_version().await.unwrap();
        update(fixture, "pi", &change, 2).await;
        assert_eq!(changes(fixture, before).await, ["device pi"], "{change:?}");
    }
    let before = store.fleet_version().await.unwrap();
    let level = LevelChange { policy: policy(&grace), ..LevelChange::default() };
    assert!(store.update_group(&group_name("school"), &level, false, &by(3)).await.unwrap());
    store.update_fleet(&level, &by(3)).await.unwrap();
    let pause = LevelChange { pause: Some(PauseChange::Until(None)), ..LevelChange::default() };
    store.update_fleet(&pause, &by(3)).await.unwrap();
    let nights = window(WindowScope::Tag("indoor".to_owned()));
    let id = store.create_window(&nights, &by(3)).await.unwrap().unwrap();
    let other = NewWindow { scope: WindowScope::Group("school".to_owned()), ..nights };
    assert!(store.replace_window(id, &other, &by(3)).await.unwrap());
    assert!(store.delete_window(id, &by(3)).await.unwrap());
    let expected = [
        "group school",
        "fleet ",
        "fleet ",
        "tag indoor",
        "tag indoor",
        "group school",
        "group school",
    ];
    assert_eq!(changes(fixture, before).await, expected);
    for unknown in [
        store.replace_window(id, &other, &by(3)).await.unwrap(),
        store.delete_window(id, &by(3)).await.unwrap(),
        store.update_group(&group_name("nobody"), &level, false, &by(3)).await.unwrap(),
    ] {
        assert!(!unknown);
    }
    assert_eq!(store.delete_group(&group_name("nobody"), &by(3)).await.unwrap(), None);
    assert_eq!(changes(fixture, before).await, expected);
}

async fn what_changes_nothing_leaves_a_line_in_the_audit_log_alone(fixture: &TestStore) {
    let store = &fixture.store;
    let grace = json!({"grace_seconds": 60});
    let set = DeviceChange {
        name: Some(Some("Library".to_owned())),
        note: Some(Some("wall".to_owned())),
        policy: policy(&grace),
        ..tagged(&["a"])
    };
    store.put_device(&device_id("pi"), &set, &by(1)).await.unwrap();
    let level = LevelChange {
        policy: policy(&grace),
        note: Some(Some("closed".to_owned())),
        ..LevelChange::default()
    };
    store.update_group(&group_name("school"), &level, true, &by(1)).await.unwrap();
    let level_of_fleet = LevelChange { policy: policy(&grace), ..LevelChange::default() };
    store.update_fleet(&level_of_fleet, &by(1)).await.unwrap();
    let nights = window(WindowScope::Fleet);
    let id = store.create_window(&nights, &by(1)).await.unwrap().unwrap();
    let (version, lines) = (store.fleet_version().await.unwrap(), 4);
    let detail = async || {
        let detail = store.device_detail(&device_id("pi")).await.unwrap().unwrap();
        let group = store.group(&group_name("school")).await.unwrap().unwrap();
        format!("{detail:?} {group:?} {:?} {:?}", store.fleet().await, store.windows().await)
    };
    let before = detail().await;

    assert!(!store.put_device(&device_id("pi"), &set, &by(2)).await.unwrap());
    update(fixture, "pi", &DeviceChange::default(), 2).await;
    update(fixture, "pi", &paused(PauseChange::End), 2).await;
    store.update_group(&group_name("school"), &level, true, &by(2)).await.unwrap();
    store.update_fleet(&level_of_fleet, &by(2)).await.unwrap();
    store.update_fleet(&LevelChange::default(), &by(2)).await.unwrap();
    assert!(store.replace_window(id, &nights, &by(2)).await.unwrap());
    assert_eq!(detail().await, before);
    assert_eq!(store.audit_length(100).await.unwrap(), lines + 7);

    // Names and notes are for people.
    let described = DeviceChange {
        name: Some(None),
        note: Some(Some("behind the door".to_owned())),
        ..DeviceChange::default()
    };
    update(fixture, "pi", &described, 2).await;
    let note = LevelChange { note: Some(None), ..LevelChange::default() };
    store.update_group(&group_name("school"), &note, true, &by(2)).await.unwrap();
    let renamed = NewWindow { name: "nights".to_owned(), ..nights };
    assert!(store.replace_window(id, &renamed, &by(2)).await.unwrap());
    assert_ne!(detail().await, before);
    assert_eq!(store.windows().await.unwrap()[0].name, "nights");
    assert_eq!(store.fleet_version().await.unwrap(), version);
}

fn rows(rows: &[(&str, DeviceChange)]) -> Vec<RosterRow> {
    let row = |(id, change): &(&str, DeviceChange)| RosterRow {
        device_id: device_id(id),
        change: change.clone(),
    };
    rows.iter().map(row).collect()
}

async fn a_roster_changes_each_device_once(fixture: &TestStore) {
    let store = &fixture.store;
    let events = ["b", "d", "e"].map(|device| failure(device, at(0))).to_vec();
    write(&mut *fixture.writer(), events).await;
    let listed = rows(&[
        ("d", tagged(&["y", "z"])),
        ("a", in_group("school")),
        ("b", DeviceChange::default()),
        ("c", DeviceChange { note: Some(Some("new".to_owned())), ..DeviceChange::default() }),
    ]);
    let outcome = store.put_roster(&listed, false, &by(1)).await.unwrap();
    let expected = RosterOutcome { created: 2, updated: 2, unchanged: 0, not_listed: 1 };
    assert_eq!(outcome, expected);
    let mut changed = changes(fixture, 0).await;
    changed.sort();
    assert_eq!(changed, ["device a", "device b", "device c", "device d"]);
    let again = store.put_roster(&listed, false, &by(2)).await.unwrap();
    assert_eq!(again, RosterOutcome { unchanged: 4, not_listed: 1, ..RosterOutcome::default() });
    assert_eq!(store.fleet_version().await.unwrap(), 4);

    let ids = ["a", "b", "c", "d", "e"].map(str::to_owned);
    let views = store.device_views(&ids).await.unwrap();
    let expected_from = |id: &str| views[id].settings.expected_from;
    let since: Vec<_> = ids.iter().map(|id| expected_from(id)).collect();
    assert_eq!(since, [Some(at(1)), Some(at(1)), Some(at(1)), Some(at(1)), None]);
    assert_eq!(views["d"].settings.tags, ["y", "z"]);
    assert_eq!(views["c"].settings.level.note.as_deref(), Some("new"));
    assert!(views["a"].health.is_none());
    // The new ones are in the lists and counts of devices, and have no figures.
    let stats = store.fleet_stats(at(-60), 10, pisync::store::Freshness::Everything).await.unwrap();
    assert_eq!(stats.total_devices, 5);
    assert_eq!(store.device(&device_id("a")).await.unwrap().unwrap().device.figures.total_syncs, 0);
    while store.aggregate_events(at(10_000)).await.unwrap() {}
    let derived = store.verify_summaries(at(10_000), false).await.unwrap();
    assert_eq!(derived.number(), 0, "{derived:?}");
    // Then they report.
    write(&mut *fixture.writer(), vec![success("a", at(5)), success("c", at(5))]).await;
    assert_right(&differences(&**store, false).await);
    assert_eq!(store.device(&device_id("a")).await.unwrap().unwrap().device.figures.total_syncs, 1);
}

async fn a_dry_run_changes_nothing(fixture: &TestStore) {
    let store = &fixture.store;
    let listed = rows(&[("a", in_group("school")), ("b", DeviceChange::default())]);
    let outcome = store.put_roster(&listed, true, &by(1)).await.unwrap();
    assert_eq!(outcome, RosterOutcome { created: 2, ..RosterOutcome::default() });
    assert_eq!(store.fleet_version().await.unwrap(), 0);
    assert_eq!(store.audit_length(10).await.unwrap(), 0);
    assert!(store.device(&device_id("a")).await.unwrap().is_none());
    assert!(store.device_views(&["a".to_owned()]).await.unwrap().is_empty());
}

async fn moved_devices_are_waited_for_anew(fixture: &TestStore) {
    let store = &fixture.store;
    let reports = vec![success("a", at(0)), success("b", at(0))];
    write(&mut *fixture.writer(), reports).await;
    let since = async |device: &str| -> Option<Timestamp> {
        let view = store.device_detail(&device_id(device)).await.unwrap().unwrap().device;
        view.settings.level.policy_since
    };
    update(fixture, "a", &in_group("school"), 1).await;
    assert_eq!(since("a").await, Some(at(1)));
    update(fixture, "a", &in_group("school"), 2).await;
    assert_eq!(since("a").await, Some(at(1)));
    let listed = rows(&[("b", in_group("school")), ("a", in_group("library"))]);
    store.put_roster(&listed, false, &by(3)).await.unwrap();
    assert_eq!([since("a").await, since("b").await], [Some(at(3)); 2]);
    // What they have reported belongs to the groups in which they were.
    write(&mut *fixture.writer(), vec![failure("b", at(10))]).await;
    let moves = "(select count(*) from group_changes)";
    assert_eq!(fixture.database.number(moves).await, 3);
    assert_right(&differences(&**store, false).await);
}

async fn a_group_goes_and_its_devices_stay(fixture: &TestStore) {
    let store = &fixture.store;
    let listed =
        rows(&[("a", in_group("school")), ("b", in_group("school")), ("c", in_group("library"))]);
    store.put_roster(&listed, false, &by(1)).await.unwrap();
    let pause = LevelChange { pause: Some(PauseChange::Until(None)), ..LevelChange::default() };
    assert!(store.update_group(&group_name("school"), &pause, false, &by(2)).await.unwrap());
    assert!(store.update_group(&group_name("empty"), &pause, true, &by(2)).await.unwrap());
    let query = GroupQuery { search: None, limit: 10, offset: 0 };
    let groups = store.groups(&query).await.unwrap();
    let seen: Vec<_> =
        groups.items.iter().map(|group| (group.name.as_str(), group.devices)).collect();
    assert_eq!(seen, [("empty", 0), ("library", 1), ("school", 2)]);
    assert_eq!(groups.items[2].level.pause, Some(Pause { from: at(2), until: None }));
    let page = GroupQuery { search: Some("L".to_owned()), limit: 1, offset: 1 };
    let page = store.groups(&page).await.unwrap();
    assert_eq!(
        (page.items[0].name.as_str(), page.total),
        ("school", pisync::store::Count::Exactly(2))
    );

    let before = store.fleet_version().await.unwrap();
    assert_eq!(store.delete_group(&group_name("school"), &by(3)).await.unwrap(), Some(2));
    let mut changed = changes(fixture, before).await;
    changed.sort();
    assert_eq!(changed, ["device a", "device b"]);
    for device in ["a", "b"] {
        let found = store.device(&device_id(device)).await.unwrap().unwrap();
        assert_eq!(found.device.group, None);
        let detail = store.device_detail(&device_id(device)).await.unwrap().unwrap();
        assert_eq!(detail.pauses, Pauses::default());
        assert_eq!(detail.device.settings.level.policy_since, Some(at(3)));
    }
    assert_eq!(store.delete_group(&group_name("empty"), &by(3)).await.unwrap(), Some(0));
    assert!(store.group(&group_name("school")).await.unwrap().is_none());
    assert_eq!(store.groups(&query).await.unwrap().items.len(), 1);
    let lines = store.audit(None, 2).await.unwrap();
    assert_eq!((lines[1].action.as_str(), lines[1].subject.as_str()), ("group.delete", "school"));
    assert_eq!(lines[1].details, json!({"devices": 2}));
}

/// Even if it reports while it is deleted, and is there again.
async fn a_device_that_is_deleted_leaves_nothing(fixture: &TestStore) {
    let store = &fixture.store;
    write(&mut *fixture.writer(), vec![success("a", at(0)), success("b", at(0))]).await;
    for device in ["a", "b"] {
        let change = DeviceChange { note: Some(Some("x".to_owned())), ..tagged(&["indoor"]) };
        store.put_device(&device_id(device), &change, &somebody()).await.unwrap();
    }
    for device in ["a", "b"] {
        assert!(store.begin_deletion(&device_id(device), &somebody()).await.unwrap());
        if device == "b" {
            crate::support::events::write_at(
                &mut *fixture.writer(),
                at(60),
                vec![success("b", at(50))],
            )
            .await;
        }
        store.delete_device(&device_id(device), &somebody()).await.unwrap();
    }
    assert!(store.device(&device_id("a")).await.unwrap().is_none());
    let view = store.device_views(&["b".to_owned()]).await.unwrap().remove("b").unwrap();
    assert_eq!(view.settings, pisync::store::DeviceSettings::default());
    for table in ["device_settings", "device_tags"] {
        let left = fixture.database.number(&format!("(select count(*) from {table})")).await;
        assert_eq!(left, 0, "{table}");
    }
}

/// Whoever comes first, nobody is refused, and nothing is lost.
async fn rosters_and_reports_wait_for_one_another(fixture: &TestStore) {
    const DEVICES: usize = 300;
    const ROUNDS: usize = 15;
    let store = &fixture.store;
    let listed: Vec<_> = (0..DEVICES)
        .map(|number| RosterRow {
            device_id: device_id(&format!("pi-{:03}", (number * 7) % DEVICES)),
            change: DeviceChange::default(),
        })
        .collect();
    let rosters = async {
        for round in 0..ROUNDS {
            let group = if round % 2 == 0 { "even" } else { "odd" };
            let change = in_group(group);
            let rows: Vec<_> = listed
                .iter()
                .map(|row| RosterRow { change: change.clone(), ..row.clone() })
                .collect();
            store.put_roster(&rows, false, &by(1)).await.unwrap();
        }
    };
    let mut writer = fixture.writer();
    let reports = async {
        for round in 0..ROUNDS {
            let events = (0..DEVICES)
                .map(|number| success(&format!("pi-{number:03}"), at(round as i64)))
                .collect();
            write(&mut *writer, events).await;
        }
    };
    tokio::join!(rosters, reports);
    let total = fixture.database.number("(select sum(total_syncs) from device_jobs)").await;
    assert_eq!(total, (DEVICES * ROUNDS) as i64);
    assert_eq!(fixture.database.number("(select count(*) from devices)").await, DEVICES as i64);
    assert_right(&differences(&**store, false).await);
}
