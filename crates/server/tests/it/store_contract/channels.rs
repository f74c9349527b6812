//! Channels and routes: what becomes of each change, what it counts up and leaves in the audit log, and that secrets are
//! stored as they were given.

use std::{collections::BTreeSet, sync::Arc};

use pisync::store::{
    Actor, Channel, ChannelCreation, ChannelOutcome, ChannelUpdate, MOST_CHANNELS, NewChannel,
    NewConfig, Reseal, Resealed, Route, RouteMatch, RoutesOutcome, Seal, UpdateReason,
};
use pisync_core::health::Severity;
use serde_json::json;

use crate::support::{
    events::{at, somebody},
    store::TestStore,
};

both_stores!(
    channels_are_kept,
    names_and_numbers_are_bounded,
    changes_have_outcomes,
    failures_are_forgotten_when_a_channel_is_repaired,
    a_channel_goes_with_what_waits_and_out_of_routes,
    routes_are_replaced_as_a_whole,
    secrets_are_encrypted_anew_all_or_none,
);

fn by(second: i64) -> Actor {
    Actor { at: at(second), ..somebody() }
}

/// Answers the channel's id and some bytes that no text can be.
fn seal(secret: &str) -> Seal {
    let secret = secret.to_owned();
    Arc::new(move |id| Ok([&[0, 0xff], id.to_string().as_bytes(), secret.as_bytes()].concat()))
}

fn broken() -> Seal {
    Arc::new(|id| Err(format!("no key for {id}")))
}

fn new_channel(name: &str) -> NewChannel {
    NewChannel {
        name: name.to_owned(),
        kind: "ntfy".to_owned(),
        config: NewConfig { public: json!({"server": "x"}), secrets: Some(seal("secret")) },
        is_enabled: true,
        is_default: None,
        template: None,
    }
}

fn update_of(channel: &Channel) -> ChannelUpdate {
    ChannelUpdate {
        name: channel.name.clone(),
        config: None,
        is_enabled: channel.is_enabled,
        is_default: channel.is_default,
        template: channel.template.clone(),
        reason: UpdateReason::Setting,
    }
}

async fn create(fixture: &TestStore, channel: &NewChannel) -> i64 {
    match fixture.store.create_channel(channel, &by(1)).await.unwrap() {
        ChannelCreation::Created(id) => id,
        other => panic!("{other:?}"),
    }
}

/// The channels' names, and the number of the last change.
async fn list(fixture: &TestStore) -> (Vec<Channel>, i64) {
    let list = fixture.store.channels().await.unwrap();
    (list.channels, list.version)
}

/// The actions in the audit log with their subjects, the oldest first.
async fn audited(fixture: &TestStore) -> Vec<String> {
    let entries = fixture.store.audit(None, 1000).await.unwrap();
    entries.iter().rev().map(|entry| format!("{} {}", entry.action, entry.subject)).collect()
}

fn route(channels: &[i64]) -> Route {
    Route {
        matching: RouteMatch {
            groups: vec!["süd \"17\"".to_owned()],
            tags: Vec::new(),
            kinds: Vec::new(),
            scopes: Vec::new(),
            severity_at_least: Severity::Info,
        },
        channels: channels.to_vec(),
        wait_seconds: 60,
        interval_seconds: 300,
        remind_seconds: None,
        digest: None,
        stops: false,
    }
}

async fn channels_are_kept(fixture: &TestStore) {
    let store = &fixture.store;
    let first = create(fixture, &new_channel("on call")).await;
    let other = NewChannel {
        kind: "email".to_owned(),
        config: NewConfig { public: json!({"to": "a@b"}), secrets: None },
        is_enabled: false,
        template: Some("{{ text }}\n".to_owned()),
        ..new_channel("office")
    };
    let second = create(fixture, &other).await;
    let default = NewChannel { is_default: Some(true), ..new_channel("third") };
    let third = create(fixture, &default).await;
    let (channels, version) = list(fixture).await;
    assert_eq!(version, 3);
    let ids: Vec<_> = channels.iter().map(|channel| channel.id).collect();
    assert_eq!(ids, [first, second, third]);
    let defaults: Vec<_> = channels.iter().map(|channel| channel.is_default).collect();
    // Only the first is one by itself.
    assert_eq!(defaults, [true, false, true]);
    let channel = &channels[0];
    assert_eq!((channel.name.as_str(), channel.kind.as_str()), ("on call", "ntfy"));
    assert_eq!((&channel.config, channel.created_at), (&json!({"server": "x"}), at(1)));
    assert_eq!(channel.secrets, Some(seal("secret")(first).unwrap()));
    assert_eq!((channel.is_enabled, channel.failures, channel.waiting), (true, 0, 0));
    let channel = &channels[1];
    assert_eq!((channel.secrets.as_ref(), channel.is_enabled), (None, false));
    assert_eq!(channel.template.as_deref(), Some("{{ text }}\n"));
    let expected = [first, second, third].map(|id| format!("channel.create {id}"));
    assert_eq!(audited(fixture).await, expected);
    let entry = store.audit(None, 1).await.unwrap().remove(0);
    assert_eq!((entry.at, &entry.details["default"]), (at(1), &json!(true)));
    assert_eq!(entry.details["config"], json!({"server": "x"}));
    assert!(!entry.details.to_string().contains("secret"), "{entry:?}");
    assert!(!format!("{channels:?}").contains("secret"), "{channels:?}");
}

async fn names_and_numbers_are_bounded(fixture: &TestStore) {
    let store = &fixture.store;
    let unsealed = NewChannel {
        config: NewConfig { public: json!({}), secrets: Some(broken()) },
        ..new_channel("unsealed")
    };
    let outcome = store.create_channel(&unsealed, &by(1)).await.unwrap();
    assert!(matches!(outcome, ChannelCreation::NotSealed(why) if why.starts_with("no key for ")));
    assert!(list(fixture).await.0.is_empty());
    for number in 0..MOST_CHANNELS {
        create(fixture, &new_channel(&format!("channel {number}"))).await;
    }
    let outcome = store.create_channel(&new_channel("one more"), &by(1)).await.unwrap();
    assert_eq!(outcome, ChannelCreation::TooMany);
    let id = list(fixture).await.0[7].id;
    assert_eq!(store.delete_channel(id, &by(1)).await.unwrap(), Some(0));
    let outcome = store.create_channel(&new_channel("channel 8"), &by(1)).await.unwrap();
    assert_eq!(outcome, ChannelCreation::NameTaken);
    let created = create(fixture, &new_channel("channel 7")).await;
    assert!(created > id, "an id is never used again");
    let (channels, version) = list(fixture).await;
    assert_eq!(channels.len(), MOST_CHANNELS as usize);
    // What was refused has left nothing.
    assert_eq!(version, i64::from(MOST_CHANNELS) + 2);
    assert_eq!(audited(fixture).await.len(), MOST_CHANNELS as usize + 2);
}

async fn changes_have_outcomes(fixture: &TestStore) {
    let store = &fixture.store;
    let id = create(fixture, &new_channel("on call")).await;
    create(fixture, &new_channel("office")).await;
    let (channels, version) = list(fixture).await;
    let same = update_of(&channels[0]);
    let taken = ChannelUpdate { name: "office".to_owned(), ..same.clone() };
    let unsealed = ChannelUpdate {
        name: "other".to_owned(),
        config: Some(NewConfig { public: json!({}), secrets: Some(broken()) }),
        ..same.clone()
    };
    let why = format!("no key for {id}");
    for (id, version, update, expected) in [
        (99, version, &same, ChannelOutcome::Unknown),
        (id, version - 1, &same, ChannelOutcome::Stale),
        (id, version, &taken, ChannelOutcome::NameTaken),
        (id, version, &unsealed, ChannelOutcome::NotSealed(why)),
    ] {
        let outcome = store.update_channel(id, version, update, &by(2)).await.unwrap();
        assert_eq!(outcome, expected);
        let (now, version_now) = list(fixture).await;
        assert_eq!((now[0].name.as_str(), version_now), ("on call", version.max(2)));
        assert_eq!(now[0].secrets, channels[0].secrets);
    }
    let changed = ChannelUpdate {
        name: "renamed".to_owned(),
        is_enabled: false,
        is_default: false,
        template: Some("x".to_owned()),
        ..same.clone()
    };
    let outcome = store.update_channel(id, version, &changed, &by(2)).await.unwrap();
    assert_eq!(outcome, ChannelOutcome::Changed);
    let (now, version) = list(fixture).await;
    assert_eq!((now[0].name.as_str(), now[0].template.as_deref()), ("renamed", Some("x")));
    assert_eq!((now[0].is_enabled, now[0].is_default, version), (false, false, 3));
    // What it is told stays, unless it is named.
    assert_eq!((&now[0].secrets, &now[0].config), (&channels[0].secrets, &channels[0].config));
    for (secrets, reason) in
        [(Some(seal("new")), UpdateReason::Rotation), (None, UpdateReason::Repair)]
    {
        let (_, version) = list(fixture).await;
        let expected = secrets.as_ref().map(|seal| seal(id).unwrap());
        let config = Some(NewConfig { public: json!({"server": "y"}), secrets });
        let update = ChannelUpdate { config, reason, ..changed.clone() };
        let outcome = store.update_channel(id, version, &update, &by(3)).await.unwrap();
        assert_eq!(outcome, ChannelOutcome::Changed);
        let (now, _) = list(fixture).await;
        assert_eq!((&now[0].secrets, &now[0].config), (&expected, &json!({"server": "y"})));
    }
    let audited = audited(fixture).await;
    let actions = ["channel.update", "channel.rotate", "channel.update"];
    assert_eq!(audited[2..], actions.map(|action| format!("{action} {id}")));
}

async fn failures_are_forgotten_when_a_channel_is_repaired(fixture: &TestStore) {
    let store = &fixture.store;
    let id = create(fixture, &new_channel("on call")).await;
    let time = match fixture.is_postgres() {
        true => "timestamptz '2026-11-22 12:00+00'",
        false => "1795348800000",
    };
    let fail = format!(
        "update channels set failures = 3, failing_since = {time}, last_error = 'timed out', next_send_at = {time}"
    );
    fixture.database.execute(&fail).await;
    for (reason, failures) in
        [(UpdateReason::Setting, 3), (UpdateReason::Rotation, 3), (UpdateReason::Repair, 0)]
    {
        let (channels, version) = list(fixture).await;
        let update = ChannelUpdate { reason, ..update_of(&channels[0]) };
        let outcome = store.update_channel(id, version, &update, &by(2)).await.unwrap();
        assert_eq!(outcome, ChannelOutcome::Changed);
        let channel = list(fixture).await.0.remove(0);
        let is_failing = failures > 0;
        assert_eq!(channel.failures, failures, "{reason:?}");
        assert_eq!(channel.failing_since, is_failing.then(|| at(0)), "{reason:?}");
        assert_eq!(channel.last_error.is_some(), is_failing, "{reason:?}");
        let waits = "(select count(*) from channels where next_send_at is not null)";
        assert_eq!(fixture.database.number(waits).await, i64::from(is_failing), "{reason:?}");
    }
}

async fn a_channel_goes_with_what_waits_and_out_of_routes(fixture: &TestStore) {
    let store = &fixture.store;
    let first = create(fixture, &new_channel("on call")).await;
    let second = create(fixture, &new_channel("office")).await;
    let time = match fixture.is_postgres() {
        true => "timestamptz '2026-11-22 12:00+00'",
        false => "1795348800000",
    };
    let insert = |group: &str, channel, state| {
        format!(
            r#"insert into notifications (channel, kind, "group", state, created_at, due_at)
               values ({channel}, 'incidents', '{group}', '{state}', {time}, {time});"#
        )
    };
    let rows: String = [
        insert("a", first, "pending"),
        insert("b", first, "pending"),
        insert("c", first, "sent"),
        insert("d", second, "pending"),
    ]
    .concat();
    fixture.database.execute(&rows).await;
    let (channels, version) = list(fixture).await;
    let waiting: Vec<_> = channels.iter().map(|channel| channel.waiting).collect();
    assert_eq!(waiting, [2, 1]);
    let routes = [route(&[first]), route(&[first, second]), route(&[])];
    let outcome = store.replace_routes(version, &routes, &by(1)).await.unwrap();
    assert_eq!(outcome, RoutesOutcome::Replaced(version + 1));
    assert_eq!(store.delete_channel(99, &by(2)).await.unwrap(), None);
    assert_eq!(store.delete_channel(first, &by(2)).await.unwrap(), Some(2));
    assert_eq!(store.delete_channel(first, &by(2)).await.unwrap(), None);
    assert_eq!(fixture.database.number("(select count(*) from notifications)").await, 1);
    let list = store.routes().await.unwrap();
    assert_eq!(list.routes, [route(&[second]), route(&[])]);
    assert_eq!(list.version, version + 2);
    let last = store.audit(None, 1).await.unwrap().remove(0);
    assert_eq!((last.action.as_str(), last.subject), ("channel.delete", first.to_string()));
    assert_eq!(last.details, json!({"name": "on call", "dropped_notifications": 2}));
}

async fn routes_are_replaced_as_a_whole(fixture: &TestStore) {
    let store = &fixture.store;
    let list = store.routes().await.unwrap();
    assert_eq!((list.version, list.routes), (0, Vec::new()));
    let id = create(fixture, &new_channel("on call")).await;
    let stale = store.replace_routes(0, &[route(&[id])], &by(1)).await.unwrap();
    assert_eq!(stale, RoutesOutcome::Stale);
    let unknown = store.replace_routes(1, &[route(&[id, 98]), route(&[97])], &by(1)).await.unwrap();
    assert_eq!(unknown, RoutesOutcome::UnknownChannels(BTreeSet::from([97, 98])));
    assert_eq!(store.routes().await.unwrap().routes, []);
    let routes: Vec<_> = (0..12).map(|wait| Route { wait_seconds: wait, ..route(&[id]) }).collect();
    let outcome = store.replace_routes(1, &routes, &by(1)).await.unwrap();
    assert_eq!(outcome, RoutesOutcome::Replaced(2));
    assert_eq!(store.routes().await.unwrap().routes, routes);
    let outcome = store.replace_routes(2, &routes[3..5], &by(1)).await.unwrap();
    assert_eq!(outcome, RoutesOutcome::Replaced(3));
    let list = store.routes().await.unwrap();
    assert_eq!((list.version, list.routes.as_slice()), (3, &routes[3..5]));
    let entry = store.audit(None, 1).await.unwrap().remove(0);
    assert_eq!(entry.details, json!({"routes": 2, "channels": [id]}));
    assert_eq!(audited(fixture).await[1..], ["routes.put ", "routes.put "]);
    // What foreign SQL has written is no route, and hides none of the others.
    fixture.database.execute("update routes set route = '{}' where position = 1").await;
    assert_eq!(store.routes().await.unwrap().routes, routes[4..5]);
}

async fn secrets_are_encrypted_anew_all_or_none(fixture: &TestStore) {
    let store = &fixture.store;
    let first = create(fixture, &new_channel("on call")).await;
    let without = NewChannel {
        config: NewConfig { public: json!({}), secrets: None },
        ..new_channel("office")
    };
    create(fixture, &without).await;
    let third = create(fixture, &new_channel("third")).await;
    let (before, version) = list(fixture).await;
    let refusing: Reseal = Arc::new(move |id: i64, sealed: &[u8]| match id == third {
        true => Err("it is locked".to_owned()),
        false => Ok(sealed.repeat(2)),
    });
    let outcome = store.reseal_channels(&refusing, &by(2)).await.unwrap();
    let why = "it is locked".to_owned();
    assert_eq!(outcome, Resealed::Refused { channel: third, why });
    let secrets =
        |channels: &[Channel]| channels.iter().map(|one| one.secrets.clone()).collect::<Vec<_>>();
    let (now, same) = list(fixture).await;
    assert_eq!((secrets(&now), same), (secrets(&before), version));
    let doubling: Reseal = Arc::new(|_: i64, sealed: &[u8]| Ok(sealed.repeat(2)));
    let outcome = store.reseal_channels(&doubling, &by(2)).await.unwrap();
    assert_eq!(outcome, Resealed::All(2));
    let (now, counted) = list(fixture).await;
    let twice = |id| Some(seal("secret")(id).unwrap().repeat(2));
    assert_eq!((secrets(&now), counted), (vec![twice(first), None, twice(third)], version + 1));
    let entry = store.audit(None, 1).await.unwrap().remove(0);
    assert_eq!((entry.action.as_str(), entry.details), ("secrets.rekey", json!({"channels": 2})));
}
