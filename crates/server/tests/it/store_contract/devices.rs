//! The list of devices, and what people change about them.

use std::collections::BTreeSet;

use pisync::{
    fleet::sweep::sweep,
    store::{
        Count, Device, DeviceChange, DeviceQuery, DeviceSort, Freshness, GroupFilter, HistoryQuery,
        Page, PauseChange,
    },
};
use pisync_core::health::State;

use crate::support::{
    events::{at, device_id, failure, group_name, now, of_job, somebody, success, write, write_at},
    store::TestStore,
};

both_stores!(
    ids_of_all_devices_by_the_page,
    search_is_literal_and_ignores_the_case_of_ascii,
    search_looks_at_names_too,
    groups,
    tags_and_states,
    every_sort_in_both_directions,
    every_sort_by_state,
    pages_and_their_total,
    a_device_that_never_reported,
    name_and_group_are_set_left_and_emptied,
    an_unknown_device_is_not_changed,
    deleting_takes_everything,
    a_deleted_device_may_come_back,
);

fn all() -> DeviceQuery {
    DeviceQuery {
        search: None,
        group: None,
        tag: None,
        states: Vec::new(),
        is_overdue: false,
        sort: DeviceSort::DeviceId,
        descending: false,
        limit: 100,
        offset: 0,
        after: None,
    }
}

async fn devices(fixture: &TestStore, query: &DeviceQuery) -> Page<Device> {
    fixture.store.devices(query).await.unwrap()
}

/// The ids on the page, which holds all that there are.
async fn ids(fixture: &TestStore, query: &DeviceQuery) -> Vec<String> {
    let page = devices(fixture, query).await;
    assert_eq!(page.total, Count::Exactly(page.items.len() as u64), "{query:?}");
    page.items.into_iter().map(|device| device.device_id).collect()
}

async fn register(fixture: &TestStore, devices: &[&str]) {
    let events = devices.iter().map(|device| success(device, at(0))).collect();
    write(&mut *fixture.writer(), events).await;
}

async fn change(fixture: &TestStore, device: &str, change: DeviceChange) {
    assert!(fixture.store.update_device(&device_id(device), &change, &somebody()).await.unwrap());
}

fn name(text: &str) -> DeviceChange {
    DeviceChange { name: Some(Some(text.to_owned())), ..DeviceChange::default() }
}

fn group(text: &str) -> DeviceChange {
    DeviceChange { group: Some(Some(group_name(text))), ..DeviceChange::default() }
}

async fn search_is_literal_and_ignores_the_case_of_ascii(fixture: &TestStore) {
    let all_ids = ["100%", "1000", "PI_1", "PIx1", "Pi\\2", "Pi/2", "pi-ä", "pi-Ä", "pi-É"];
    register(fixture, &all_ids).await;
    for (search, expected) in [
        ("%", vec!["100%"]),
        ("0%", vec!["100%"]),
        ("_", vec!["PI_1"]),
        ("i_1", vec!["PI_1"]),
        ("\\", vec!["Pi\\2"]),
        ("\\2", vec!["Pi\\2"]),
        ("\\%", vec![]),
        ("pi\\", vec!["Pi\\2"]),
        ("pI-", vec!["pi-Ä", "pi-É", "pi-ä"]),
        ("-ä", vec!["pi-ä"]),
        ("-Ä", vec!["pi-Ä"]),
        ("é", vec![]),
        ("PIX1", vec!["PIx1"]),
        ("00", vec!["100%", "1000"]),
        ("*", vec![]),
        ("'", vec![]),
        (" ", vec![]),
    ] {
        let query = DeviceQuery { search: Some(search.to_owned()), ..all() };
        assert_eq!(ids(fixture, &query).await, expected, "{search:?}");
    }
    let everything = DeviceQuery { search: Some(String::new()), ..all() };
    assert_eq!(ids(fixture, &everything).await.len(), all_ids.len());
}

async fn search_looks_at_names_too(fixture: &TestStore) {
    register(fixture, &["a", "b", "c"]).await;
    change(fixture, "a", name("Library 50%_\\")).await;
    change(fixture, "c", name("B-Wing")).await;
    for (search, expected) in [
        ("LIBRARY", vec!["a"]),
        ("b", vec!["a", "b", "c"]),
        ("0%_\\", vec!["a"]),
        ("wing", vec!["c"]),
    ] {
        let query = DeviceQuery { search: Some(search.to_owned()), ..all() };
        assert_eq!(ids(fixture, &query).await, expected, "{search:?}");
    }
}

async fn groups(fixture: &TestStore) {
    register(fixture, &["a", "b", "c", "ab"]).await;
    change(fixture, "a", group("School")).await;
    change(fixture, "b", group("school")).await;
    change(fixture, "ab", group("School")).await;
    let of_group = |text: &str| DeviceQuery { group: Some(group_name(text).into()), ..all() };
    let ungrouped = DeviceQuery { group: Some(GroupFilter::Ungrouped), ..all() };
    for sort in [DeviceSort::DeviceId, DeviceSort::LastSeen, DeviceSort::Status] {
        assert_eq!(ids(fixture, &DeviceQuery { sort, ..ungrouped.clone() }).await, ["c"]);
    }
    assert_eq!(ids(fixture, &of_group("School")).await, ["a", "ab"]);
    assert_eq!(ids(fixture, &of_group("school")).await, ["b"]);
    assert_eq!(ids(fixture, &of_group("Schoo_")).await, [""; 0]);
    let both = DeviceQuery { search: Some("B".to_owned()), ..of_group("School") };
    assert_eq!(ids(fixture, &both).await, ["ab"]);
}

/// What indexes find is in every order, also where there are more devices than are sorted in memory.
async fn tags_and_states(fixture: &TestStore) {
    register(fixture, &["a", "b", "c", "d"]).await;
    for (device, tags) in [("a", vec!["x", "y"]), ("b", vec!["y"]), ("d", vec!["x"])] {
        let tags = tags.into_iter().map(str::to_owned).collect();
        change(fixture, device, DeviceChange { tags: Some(tags), ..DeviceChange::default() }).await;
    }
    for (device, state, is_overdue) in
        [("a", "ok", false), ("b", "silent", true), ("c", "never", true), ("d", "failing", false)]
    {
        let (key, time, no) = match fixture.is_postgres() {
            true => (format!("'{device}'"), "timestamptz '2026-11-22 11:00+00'", "false"),
            false => (
                format!("(select id from devices where device_id = '{device}')"),
                "1795345200000",
                "0",
            ),
        };
        let is_overdue = match (fixture.is_postgres(), is_overdue) {
            (true, true) => "true",
            (true, false) => "false",
            (false, true) => "1",
            (false, false) => "0",
        };
        let row = format!(
            "insert into device_health values
                 ({key}, '', '{state}', {time}, '[]', {no}, {is_overdue}, {no}, 1, 1, {time}, {time}, {time}, 3, 4,
                  {time}, {time}, {time}, 1)"
        );
        fixture.database.execute(&row).await;
    }
    let tagged = |tag: &str| DeviceQuery { tag: Some(tag.to_owned()), ..all() };
    let in_states = |states: &[State]| DeviceQuery { states: states.to_vec(), ..all() };
    let overdue = DeviceQuery { is_overdue: true, ..all() };
    for (query, expected) in [
        (tagged("x"), &["a", "d"][..]),
        (tagged("y"), &["a", "b"]),
        (tagged("X"), &[]),
        (in_states(&[State::Ok]), &["a"]),
        (in_states(&[State::Silent, State::Failing, State::Silent]), &["b", "d"]),
        (in_states(&[State::Paused]), &[]),
        (overdue.clone(), &["b", "c"]),
        (DeviceQuery { tag: Some("y".to_owned()), ..overdue.clone() }, &["b"]),
        (DeviceQuery { states: vec![State::Never], ..overdue.clone() }, &["c"]),
        (DeviceQuery { search: Some("C".to_owned()), ..overdue }, &["c"]),
    ] {
        assert_eq!(ids(fixture, &query).await, expected, "{query:?}");
        for sort in [
            DeviceSort::Name,
            DeviceSort::LastSeen,
            DeviceSort::TotalSyncs,
            DeviceSort::StatusSince,
        ] {
            let query = DeviceQuery { sort, ..query.clone() };
            assert_eq!(ids(fixture, &query).await, expected, "{query:?}");
        }
    }
    let first = DeviceQuery { limit: 1, ..tagged("y") };
    let page = devices(fixture, &first).await;
    let second = devices(fixture, &DeviceQuery { after: page.next, ..first }).await;
    assert_eq!(second.items[0].device_id, "b");
    assert!(second.next.is_none());
}

async fn every_sort_in_both_directions(fixture: &TestStore) {
    let mut writer = fixture.writer();
    // In order of registration; b and c register together.
    write_at(&mut *writer, at(-400), vec![failure("D", at(-10)), failure("D", at(-9))]).await;
    let events = vec![success("c", at(-20)), success("b", at(-30)), failure("c", at(-21))];
    write_at(&mut *writer, at(-300), events).await;
    write_at(&mut *writer, at(-200), vec![success("a", at(-40)), failure("a", at(-30))]).await;
    write_at(&mut *writer, at(-100), vec![of_job("x", failure("b", at(-50)))]).await;
    change(fixture, "c", name("Zoo")).await;
    change(fixture, "a", name("zoo")).await;
    change(fixture, "D", name("Ähre")).await;

    // Ties by id whatever the direction; what is missing comes last in both.
    for (sort, ascending, descending) in [
        (DeviceSort::DeviceId, "Dabc", "cbaD"),
        (DeviceSort::Name, "caDb", "Dacb"),
        (DeviceSort::CreatedAt, "Dbca", "abcD"),
        (DeviceSort::LastSeen, "Dcab", "bacD"),
        (DeviceSort::LastSync, "abcD", "Dcab"),
        (DeviceSort::LastSuccess, "abcD", "cbaD"),
        (DeviceSort::TotalSyncs, "Dabc", "Dabc"),
        (DeviceSort::FailedSyncs, "abcD", "Dabc"),
        (DeviceSort::ConsecutiveFailures, "cabD", "Dabc"),
    ] {
        for (descending, expected) in [(false, ascending), (true, descending)] {
            let query = DeviceQuery { sort, descending, ..all() };
            let found = ids(fixture, &query).await.concat();
            assert_eq!(found, expected, "{sort:?}, descending: {descending}");
        }
    }
}

/// Lists by state have what the last sweep found, page by page. A device that was never evaluated comes last.
async fn every_sort_by_state(fixture: &TestStore) {
    let mut writer = fixture.writer();
    let mut events = Vec::new();
    for number in 0..30 {
        let device = format!("d{:02}", (number * 7) % 30);
        // Some are silent, some since the same moment.
        let last = at(-60 * 60 * (number % 4) - 60 * (number / 8));
        let streak = number % 5;
        events.extend((0..streak).map(|back| failure(&device, at(-10_000 - back))));
        events.push(if streak > 0 { failure(&device, last) } else { success(&device, last) });
    }
    for event in events {
        write_at(&mut *writer, event.timestamp.max(at(-20_000)), vec![event]).await;
    }
    let paused = DeviceChange { pause: Some(PauseChange::Until(None)), ..DeviceChange::default() };
    change(fixture, "d04", paused).await;
    let expected = DeviceChange { expected: Some(Some(true)), ..DeviceChange::default() };
    fixture.store.put_device(&device_id("n1"), &expected, &somebody()).await.unwrap();
    sweep(&*fixture.store, at(0)).await.unwrap();
    write_at(&mut *writer, at(5), vec![success("d03", at(5))]).await;
    fixture.store.delete_device(&device_id("d09"), &somebody()).await.unwrap();
    sweep(&*fixture.store, at(600)).await.unwrap();
    // No sweep has seen these.
    register(fixture, &["x2", "c1", "x1"]).await;

    let all_ids = ids(fixture, &all()).await;
    assert_eq!(all_ids.len(), 33);
    let views = fixture.store.device_views(&all_ids).await.unwrap();
    let urgency = |state: State| {
        let order = [
            State::Silent,
            State::Failing,
            State::Degraded,
            State::Never,
            State::Ok,
            State::Paused,
        ];
        order.iter().position(|known| *known == state).unwrap()
    };
    let key = |device_id: &String, sort| {
        let health = views[device_id].health.as_ref()?;
        let urgency = if sort == DeviceSort::Status { urgency(health.state) } else { 0 };
        Some((urgency, health.since))
    };
    let states: BTreeSet<_> = all_ids
        .iter()
        .filter_map(|id| views[id].health.as_ref().map(|health| health.state))
        .collect();
    assert_eq!(states.len(), State::ALL.len(), "{states:?}");
    for (sort, descending) in [
        (DeviceSort::Status, false),
        (DeviceSort::Status, true),
        (DeviceSort::StatusSince, false),
        (DeviceSort::StatusSince, true),
    ] {
        let mut expected = all_ids.clone();
        expected.sort_by(|left, right| {
            let (left_key, right_key) = (key(left, sort), key(right, sort));
            let of_keys = match (left_key, right_key) {
                (Some(left), Some(right)) if descending => right.cmp(&left),
                (Some(left), Some(right)) => left.cmp(&right),
                _ => left_key.is_none().cmp(&right_key.is_none()),
            };
            of_keys.then_with(|| left.cmp(right))
        });
        for search in [None, Some("1".to_owned())] {
            let mut query = DeviceQuery { sort, descending, limit: 4, search, ..all() };
            let mut found = Vec::new();
            loop {
                let page = devices(fixture, &query).await;
                assert!(page.next.as_ref().is_none_or(|place| sort.has(place)), "{page:?}");
                found.extend(page.items.into_iter().map(|device| device.device_id));
                query.after = page.next;
                if query.after.is_none() {
                    break;
                }
            }
            let is_searched =
                |id: &&String| query.search.as_ref().is_none_or(|text| id.contains(text.as_str()));
            let expected: Vec<_> = expected.iter().filter(is_searched).cloned().collect();
            assert_eq!(found, expected, "{sort:?}, descending: {descending}, {:?}", query.search);
        }
    }
}

async fn pages_and_their_total(fixture: &TestStore) {
    register(fixture, &["e", "c", "a", "d", "b"]).await;
    for sort in [DeviceSort::DeviceId, DeviceSort::Name, DeviceSort::TotalSyncs] {
        for (limit, offset, expected) in [
            (2, 0, vec!["a", "b"]),
            (2, 2, vec!["c", "d"]),
            (2, 4, vec!["e"]),
            (2, 5, vec![]),
            (1, 3, vec!["d"]),
        ] {
            let page = devices(fixture, &DeviceQuery { sort, limit, offset, ..all() }).await;
            let found: Vec<_> = page.items.iter().map(|device| &device.device_id).collect();
            assert_eq!(found, expected, "{sort:?}: {limit} after {offset}");
            assert_eq!(page.total, Count::Exactly(5));
        }
    }
    let filtered = DeviceQuery { search: Some("C".to_owned()), limit: 1, ..all() };
    assert_eq!(devices(fixture, &filtered).await.total, Count::Exactly(1));
    let beyond = DeviceQuery { offset: 1, ..filtered };
    let page = devices(fixture, &beyond).await;
    assert_eq!((page.items.len(), page.total), (0, Count::Exactly(1)));
}

/// No method registers such a device yet, but foreign SQL does.
async fn a_device_that_never_reported(fixture: &TestStore) {
    register(fixture, &["m"]).await;
    let created = if fixture.is_postgres() {
        format!("'{now}'", now = now())
    } else {
        now().as_millisecond().to_string()
    };
    let insert = "insert into devices (device_id, created_at) values";
    fixture.database.execute(&format!("{insert} ('a', {created}), ('z', {created})")).await;

    let found = fixture.store.device(&device_id("a")).await.unwrap().unwrap();
    assert_eq!(found.device.created_at, now());
    assert_eq!(found.device.figures, Default::default());
    assert_eq!(found.jobs, []);
    let history = HistoryQuery::newest(device_id("a"), 10);
    let history = fixture.store.sync_history(&history).await.unwrap().unwrap();
    assert_eq!((history.events.len(), history.total_events), (0, 0));
    assert_eq!(history.figures, Default::default());
    let stats = fixture.store.fleet_stats(at(-1), 10, Freshness::Everything).await.unwrap();
    assert_eq!((stats.total_devices, stats.active_devices), (3, 1));
    assert_eq!(stats.recent_devices.len(), 1);
    for sort in [
        DeviceSort::LastSeen,
        DeviceSort::LastSync,
        DeviceSort::LastSuccess,
        DeviceSort::TotalSyncs,
        DeviceSort::FailedSyncs,
        DeviceSort::ConsecutiveFailures,
    ] {
        for descending in [false, true] {
            let query = DeviceQuery { sort, descending, ..all() };
            assert_eq!(ids(fixture, &query).await, ["m", "a", "z"], "{sort:?}");
        }
    }
    // Its first report is nothing new: the device was known.
    let written = write(&mut *fixture.writer(), vec![success("a", at(0))]).await;
    assert_eq!(written.new_devices, []);
    let found = fixture.store.device(&device_id("a")).await.unwrap().unwrap();
    assert_eq!(found.device.figures.total_syncs, 1);
}

async fn name_and_group_are_set_left_and_emptied(fixture: &TestStore) {
    register(fixture, &["pi", "other"]).await;
    let odd = "O'Brien \"\\ %_ $1 ?1 🥧";
    for (step, expected) in [
        (name("first"), (Some("first"), None)),
        (group(odd), (Some("first"), Some(odd))),
        (name(odd), (Some(odd), Some(odd))),
        (DeviceChange::default(), (Some(odd), Some(odd))),
        (DeviceChange { name: Some(None), ..DeviceChange::default() }, (None, Some(odd))),
        (
            DeviceChange {
                name: Some(Some("n".into())),
                group: Some(None),
                ..DeviceChange::default()
            },
            (Some("n"), None),
        ),
        (
            DeviceChange { name: Some(None), group: Some(None), ..DeviceChange::default() },
            (None, None),
        ),
    ] {
        change(fixture, "pi", step.clone()).await;
        let found = fixture.store.device(&device_id("pi")).await.unwrap().unwrap().device;
        assert_eq!((found.name.as_deref(), found.group.as_deref()), expected, "{step:?}");
        assert_eq!((found.created_at, found.figures.total_syncs), (now(), 1));
    }
    change(fixture, "pi", name("kept")).await;
    // Reports leave what people said alone.
    write_at(&mut *fixture.writer(), at(7200), vec![success("pi", at(1))]).await;
    let found = fixture.store.device(&device_id("pi")).await.unwrap().unwrap().device;
    assert_eq!((found.name.as_deref(), found.created_at), (Some("kept"), now()));
    let other = fixture.store.device(&device_id("other")).await.unwrap().unwrap().device;
    assert_eq!((other.name, other.group), (None, None));
}

async fn an_unknown_device_is_not_changed(fixture: &TestStore) {
    register(fixture, &["pi"]).await;
    for unknown in ["Pi", "pi ", "p_"] {
        let unknown = device_id(unknown);
        assert!(!fixture.store.update_device(&unknown, &name("x"), &somebody()).await.unwrap());
        assert!(
            !fixture
                .store
                .update_device(&unknown, &DeviceChange::default(), &somebody())
                .await
                .unwrap()
        );
        assert_eq!(fixture.store.delete_device(&unknown, &somebody()).await.unwrap(), None);
    }
    assert_eq!(ids(fixture, &all()).await, ["pi"]);
}

async fn deleting_takes_everything(fixture: &TestStore) {
    let mut writer = fixture.writer();
    let mut events: Vec<_> = (0..5).map(|second| failure("gone", at(second))).collect();
    events.push(of_job("x", success("gone", at(9))));
    events.push(failure("kept", at(0)));
    write(&mut *writer, events).await;
    // In another month, too.
    write_at(&mut *writer, at(40 * 86_400), vec![success("gone", at(0))]).await;

    assert_eq!(
        fixture.store.delete_device(&device_id("gone"), &somebody()).await.unwrap(),
        Some(7)
    );
    assert_eq!(fixture.store.delete_device(&device_id("gone"), &somebody()).await.unwrap(), None);
    assert!(fixture.store.device(&device_id("gone")).await.unwrap().is_none());
    assert_eq!(ids(fixture, &all()).await, ["kept"]);
    let stats = fixture.store.fleet_stats(at(-1), 10, Freshness::Everything).await.unwrap();
    assert_eq!((stats.total_devices, stats.figures.total_syncs), (1, 1));
    assert_eq!(stats.figures.total_errors, 1);
}

async fn a_deleted_device_may_come_back(fixture: &TestStore) {
    let mut writer = fixture.writer();
    for round in 0..3 {
        let received = at(round);
        let events = vec![failure("pi", at(0)), success("pi-2", at(0)), failure("pi", at(1))];
        let written = write_at(&mut *writer, received, events).await;
        // The writer has this device in its memory from the last round.
        assert!(written.new_devices.contains(&device_id("pi")), "round {round}");
        assert_eq!(written.new_devices.len(), if round == 0 { 2 } else { 1 });
        assert_eq!(written.streaks.len(), 1);
        assert_eq!((written.streaks[0].before, written.streaks[0].after), (0, 2));
        let found = fixture.store.device(&device_id("pi")).await.unwrap().unwrap();
        assert_eq!(found.device.figures.total_syncs, 2);
        assert_eq!(found.device.figures.consecutive_failures, 2);
        assert_eq!(found.device.created_at, received);
        assert_eq!(
            fixture.store.delete_device(&device_id("pi"), &somebody()).await.unwrap(),
            Some(2)
        );
    }
    // The figures of those that were not deleted are whole.
    let other = fixture.store.device(&device_id("pi-2")).await.unwrap().unwrap();
    assert_eq!(other.device.figures.total_syncs, 3);
}

async fn ids_of_all_devices_by_the_page(fixture: &TestStore) {
    let mut expected: Vec<_> =
        (0..2_300).map(|number| format!("ü-{}", number * 7_919 % 2_300)).collect();
    let events = expected.iter().map(|device| success(device, now())).collect();
    write(&mut *fixture.writer(), events).await;
    expected.sort_unstable();
    let group = DeviceChange { group: Some(Some(group_name("odd"))), ..DeviceChange::default() };
    for device in ["ü-7", "ü-71"] {
        fixture.store.update_device(&device_id(device), &group, &somebody()).await.unwrap();
    }
    for (group, expected) in
        [(None, expected), (Some(group_name("odd")), vec!["ü-7".to_owned(), "ü-71".to_owned()])]
    {
        let (mut found, mut after): (Vec<String>, Option<String>) = (Vec::new(), None);
        loop {
            let page = fixture.store.device_ids(group.as_ref(), after.as_deref()).await.unwrap();
            found.extend(page.iter().map(ToString::to_string));
            if page.is_empty() {
                break;
            }
            after = found.last().cloned();
        }
        assert_eq!(found, expected);
    }
}
