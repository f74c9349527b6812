//! `GET /api/notifications`: filters and pages, of which every notification is on one, whatever comes and goes meanwhile.

use pisync::store::{self, ChannelCreation, NewChannel, NewConfig};
use serde_json::{Value, json};

use crate::support::{
    events::{at, somebody},
    fleet::time,
    server::TestServer,
    store::{Fixture, TestDatabase},
};

both_stores!(pages_are_complete_and_without_doubles, wrong_queries_are_refused);

const STATES: [&str; 4] = ["pending", "sent", "failed", "dropped"];

/// How many notifications there are.
const ALL: i64 = 23;

/// A server that sends nothing, so that it shows what a test has written.
struct Still(TestServer);

impl std::ops::Deref for Still {
    type Target = TestServer;

    fn deref(&self) -> &TestServer {
        &self.0
    }
}

impl Fixture for Still {
    async fn prepare(database: TestDatabase) -> Self {
        let server = TestServer::start_with(database, |settings| settings.watches_fleet = false);
        let server = server.await;
        server.get("/health/ready").await.json(200);
        let store = store::open(&server.database.target).await.unwrap();
        for name in ["ops", "pager"] {
            let channel = NewChannel {
                name: name.to_owned(),
                kind: "webhook".to_owned(),
                config: NewConfig { public: json!({}), secrets: None },
                is_enabled: true,
                is_default: None,
                template: None,
            };
            let created = store.create_channel(&channel, &somebody()).await.unwrap();
            assert!(matches!(created, ChannelCreation::Created(1 | 2)), "{created:?}");
        }
        store.close().await.unwrap();
        let rows = 1..=ALL;
        server
            .database
            .execute(&rows.map(|id| row(&server.database, id)).collect::<String>())
            .await;
        Self(server)
    }

    fn into_database(self) -> TestDatabase {
        self.0.into_database()
    }
}

/// The channel and the state of a notification.
fn of(id: i64) -> (i64, &'static str) {
    // Neither follows from the other.
    (1 + id % 2, STATES[usize::try_from(id * 7 / 2 % 4).unwrap()])
}

fn row(database: &TestDatabase, id: i64) -> String {
    let (channel, state) = of(id);
    let created = time(database, at(id));
    let ended = if state == "pending" { "null".to_owned() } else { created.clone() };
    format!(
        r#"insert into notifications (id, channel, kind, "group", state, created_at, due_at, frozen_at, ended_at)
           values ({id}, {channel}, 'incidents', 'school', '{state}', {created}, {created}, {created}, {ended});
        "#
    )
}

/// The numbers on a page, and the cursor of the next one.
async fn page(server: &TestServer, query: &str) -> (Vec<i64>, Option<String>, Value) {
    let page = server.get(&format!("/api/notifications?{query}")).await.data(200);
    let notifications = page["notifications"].as_array().unwrap();
    let ids = notifications.iter().map(|one| one["id"].as_i64().unwrap()).collect();
    for one in notifications {
        let (channel, state) = of(one["id"].as_i64().unwrap());
        assert_eq!((&one["channel"]["id"], &one["state"]), (&json!(channel), &json!(state)));
        assert_eq!(one["ended_at"].is_null(), state == "pending", "{one}");
    }
    let next = page["pagination"]["next_cursor"].as_str().map(str::to_owned);
    (ids, next, page["pagination"]["total"].clone())
}

async fn pages_are_complete_and_without_doubles(server: &Still) {
    for channel in [None, Some(1), Some(2)] {
        for state in [None].into_iter().chain(STATES.map(Some)) {
            let is_wanted = |id: &i64| {
                let (of_channel, of_state) = of(*id);
                channel.is_none_or(|wanted| wanted == of_channel)
                    && state.is_none_or(|wanted| wanted == of_state)
            };
            let expected: Vec<_> = (1..=ALL).rev().filter(is_wanted).collect();
            assert!(expected.len() > 1, "{channel:?} {state:?}");
            let channel = channel.map(|id| format!("&channel={id}")).unwrap_or_default();
            let state = state.map(|word| format!("&state={word}")).unwrap_or_default();
            // Of as many as there are, too: no page is empty.
            for limit in [1, 3, expected.len(), 50] {
                let (mut found, mut cursor) = (Vec::new(), String::new());
                loop {
                    let query = format!("limit={limit}{channel}{state}{cursor}");
                    let (ids, next, total) = page(server, &query).await;
                    assert!(!ids.is_empty() && ids.len() <= limit, "{query}: {ids:?}");
                    assert_eq!(total, json!(expected.len()), "{query}");
                    found.extend(ids);
                    let Some(next) = next else { break };
                    cursor = format!("&cursor={next}");
                }
                assert_eq!(found, expected, "limit={limit}{channel}{state}");
            }
        }
    }
    // New ones come, and the last one of the page is deleted.
    let (first, next, _) = page(server, "limit=5").await;
    let cursor = next.unwrap();
    server.database.execute(&row(&server.database, 30)).await;
    let delete = format!("delete from notifications where id = {}", first[4]);
    server.database.execute(&delete).await;
    let (rest, next, _) = page(server, &format!("limit=50&cursor={cursor}")).await;
    assert_eq!([first, rest].concat(), (1..=ALL).rev().collect::<Vec<_>>());
    assert_eq!(next, None);
}

async fn wrong_queries_are_refused(server: &Still) {
    let (_, next, _) = page(server, "limit=5&state=sent").await;
    let cursor = next.unwrap();
    // It is a place among all notifications, whichever of them are asked for.
    let (ids, _, _) = page(server, &format!("cursor={cursor}&state=failed")).await;
    assert!(ids.iter().all(|id| *id < cursor.parse().unwrap()), "{ids:?}");
    for damaged in [
        format!("{cursor}x"),
        format!("-{cursor}"),
        format!("{cursor}.0"),
        "0".to_owned(),
        "x".to_owned(),
        String::new(),
        "99999999999999999999".to_owned(),
    ] {
        let answer = server.get(&format!("/api/notifications?cursor={damaged}")).await;
        let rule = "\"cursor\" must be a next_cursor of this list";
        assert_eq!(answer.complaints(), [rule], "{damaged}");
    }
    let query = "channel=x&state=open&limit=0&cursor=y&group=school";
    let wrong = server.get(&format!("/api/notifications?{query}")).await.wrong_fields();
    let fields: Vec<_> = wrong.iter().map(|(field, _)| field.as_str()).collect();
    assert_eq!(fields, ["channel", "state", "limit", "cursor", "group"]);
}
