//! Incidents: lists, one incident with its members and timeline, and acknowledging. The rows are written with SQL, because
//! only the sweep makes incidents.

use std::collections::BTreeSet;

use pisync::{
    keys::KeyRequest,
    store::{
        AcknowledgeOutcome, Actor, Count, GroupFilter, IncidentQuery, NewAcknowledgement, Scope,
        Via,
    },
};
use pisync_core::{
    Timestamp,
    health::{IncidentScope, ProblemKind},
};
use reqwest::Method;
use serde_json::{Value, json};

use crate::support::{
    events::{at, device_id, group_name, now, somebody},
    fleet::{Row, entry, member, time},
    http::{column, send},
    locked_server::{LockedServer, forbidden},
    server::TestServer,
    store::{TestDatabase, TestStore, key_request},
};

/// The store alone.
mod stored {
    use super::*;

    both_stores!(
        every_filter_and_page_is_as_a_naive_list,
        many_are_counted_up_to_a_bound,
        long_timelines_end_with_the_newest_entry,
        acknowledgements_end_by_themselves,
    );

    /// Whether a device is a member of an incident, and whether it has left.
    fn membership(id: i64) -> Option<bool> {
        match id % 4 {
            1 => Some(false),
            2 => Some(true),
            _ => None,
        }
    }

    /// Incidents of every kind, some of which were opened at the same moment.
    fn rows() -> Vec<Row> {
        let mut rows = Vec::new();
        for id in 1..=120_i64 {
            let scope = ["device", "group", "fleet"][usize::try_from(id / 2 % 3).unwrap()];
            let group = ["north", "south", ""][usize::try_from(id / 6 % 3).unwrap()];
            let subject = match scope {
                "device" if id % 3 == 0 => "pi".to_owned(),
                "device" => format!("other-{id}"),
                // Only one incident of a subject and kind can be open.
                _ => format!("{group}-{id}"),
            };
            let is_over = id % 5 < 3 || subject == "pi" && id != 99;
            rows.push(Row {
                scope,
                subject,
                group: if scope == "fleet" { String::new() } else { group.to_owned() },
                kind: if id / 3 % 2 == 0 { "silent" } else { "failing" },
                // Not in the order of ids.
                opened_at: at(-(id * 37 % 40)),
                resolved_at: is_over.then(|| at(id)),
                ..Row::of_group(id, group)
            });
        }
        rows
    }

    fn is_wanted(row: &Row, query: &IncidentQuery) -> bool {
        let of_device = |device: &str| {
            if row.scope == "device" {
                return row.subject == device;
            }
            let is_member = device == "pi" && membership(row.id).is_some();
            is_member && (query.is_resolved || membership(row.id) == Some(false))
        };
        row.resolved_at.is_some() == query.is_resolved
            && query.kind.is_none_or(|kind| kind.as_str() == row.kind)
            && query.scope.is_none_or(|scope| scope.as_str() == row.scope)
            && query.group.as_ref().is_none_or(|group| {
                // Those of the fleet are of no group, and not about devices in none.
                group.key() == row.group && row.scope != "fleet"
            })
            && query.device_id.as_ref().is_none_or(|device| of_device(device.as_str()))
            && query.since.is_none_or(|since| row.opened_at >= since)
    }

    /// Every combination of filters.
    fn queries() -> Vec<IncidentQuery> {
        let mut queries = Vec::new();
        for scope in IncidentScope::ALL.map(Some).into_iter().chain([None]) {
            for kind in [None, Some(ProblemKind::Silent), Some(ProblemKind::Failing)] {
                for group in [
                    None,
                    Some(group_name("north").into()),
                    Some(group_name("nowhere").into()),
                    Some(GroupFilter::Ungrouped),
                ] {
                    for device in [None, Some(device_id("pi")), Some(device_id("nobody"))] {
                        for since in [None, Some(at(-20))] {
                            queries.extend([false, true].map(|is_resolved| IncidentQuery {
                                is_resolved,
                                kind,
                                scope,
                                group: group.clone(),
                                device_id: device.clone(),
                                since,
                                limit: 7,
                                after: None,
                            }));
                        }
                    }
                }
            }
        }
        queries
    }

    async fn every_filter_and_page_is_as_a_naive_list(fixture: &TestStore) {
        let rows = rows();
        let mut sql: String = rows.iter().map(|row| row.sql(&fixture.database)).collect();
        for row in rows.iter().filter(|row| row.scope != "device") {
            if let Some(has_left) = membership(row.id) {
                let left_at = has_left.then(now);
                sql += &member(&fixture.database, row.id, "pi", left_at, false);
            }
            sql += &member(&fixture.database, row.id, "another", None, true);
        }
        fixture.database.execute(&sql).await;
        let mut found = 0;
        for query in queries() {
            let mut expected: Vec<_> = rows.iter().filter(|row| is_wanted(row, &query)).collect();
            expected.sort_by_key(|row| std::cmp::Reverse((row.opened_at, row.id)));
            let expected: Vec<_> = expected.iter().map(|row| row.id).collect();
            let (mut listed, mut page_query) = (Vec::new(), query.clone());
            loop {
                let page = fixture.store.incidents(&page_query).await.unwrap();
                assert_eq!(page.total, Count::Exactly(expected.len() as u64), "{query:?}");
                assert!(page.incidents.len() <= 7);
                listed.extend(page.incidents.iter().map(|incident| incident.id));
                page_query.after = page.next;
                if page.next.is_none() {
                    break;
                }
            }
            assert_eq!(listed, expected, "{query:?}");
            found += expected.len();
        }
        assert!(found > 1_000, "the filters found only {found}");
    }

    async fn many_are_counted_up_to_a_bound(fixture: &TestStore) {
        let numbers = if fixture.is_postgres() {
            "generate_series(1, 10001) as number (n)"
        } else {
            "(with recursive number (n) as (select 1 union all select n + 1 from number where n < 10001) select n from number)"
        };
        let at = time(&fixture.database, now());
        let sql = format!(
            r#"insert into incidents (scope, subject, "group", kind, severity, since, opened_at)
               select 'device', cast(n as text), '', 'silent', 'warning', {at}, {at} from {numbers}"#
        );
        fixture.database.execute(&sql).await;
        let query = IncidentQuery {
            is_resolved: false,
            kind: None,
            scope: None,
            group: None,
            device_id: None,
            since: None,
            limit: 1_000,
            after: None,
        };
        let total = fixture.store.incidents(&query).await.unwrap().total;
        assert_eq!(total, Count::AtLeast(10_000));
        let one = IncidentQuery { device_id: Some(device_id("7")), ..query.clone() };
        assert_eq!(fixture.store.incidents(&one).await.unwrap().total, Count::Exactly(1));
        let counts = fixture.store.health_counts().await.unwrap();
        assert_eq!(counts.incidents, [("silent".to_owned(), "device".to_owned(), 10_001)]);
        // A way through the entire list, whose incidents were all opened at one moment.
        let (mut seen, mut query) = (BTreeSet::new(), query);
        loop {
            let page = fixture.store.incidents(&query).await.unwrap();
            seen.extend(page.incidents.iter().map(|incident| incident.id));
            query.after = page.next;
            if page.next.is_none() {
                break;
            }
        }
        assert_eq!(seen.len(), 10_001);
    }

    async fn long_timelines_end_with_the_newest_entry(fixture: &TestStore) {
        let database = &fixture.database;
        let mut sql = Row::of_group(1, "north").sql(database);
        sql.extend((1..=1_001).map(|id| entry(database, 1, id, "joined")));
        database.execute(&sql).await;
        let given = NewAcknowledgement::default();
        let outcome = fixture.store.acknowledge_incident(1, Some(&given), &somebody()).await;
        assert!(matches!(outcome.unwrap(), AcknowledgeOutcome::Done(_)));
        let found = fixture.store.incident(1, 1, 0).await.unwrap().unwrap();
        assert_eq!(found.timeline.len(), 1_000);
        assert_eq!(found.timeline[999].what, "acknowledged");
        assert_eq!(found.timeline[998].what, "joined");
        assert_eq!(database.number("(select max(id) from incident_entries)").await, 1_002);
    }

    async fn acknowledgements_end_by_themselves(fixture: &TestStore) {
        fixture.database.execute(&Row::of_group(1, "north").sql(&fixture.database)).await;
        let given = NewAcknowledgement { until: Some(at(60)), note: None };
        let by = |second: i64| Actor { at: at(second), via: Via::CommandLine, address: None };
        let outcome = fixture.store.acknowledge_incident(1, Some(&given), &by(0)).await.unwrap();
        let AcknowledgeOutcome::Done(incident) = outcome else { panic!("{outcome:?}") };
        let acknowledged =
            |now: Timestamp| incident.acknowledged(now).map(|given| given.by.clone());
        assert_eq!(acknowledged(at(59)).as_deref(), Some("command line"));
        assert_eq!(acknowledged(at(60)), None);
        // There is nothing left to withdraw.
        fixture.store.acknowledge_incident(1, None, &by(60)).await.unwrap();
        let counted = "(select count(*) from incident_entries)";
        assert_eq!(fixture.database.number(counted).await, 1);
        fixture.store.acknowledge_incident(1, None, &by(59)).await.unwrap();
        assert_eq!(fixture.database.number(counted).await, 2);
        let unknown = fixture.store.acknowledge_incident(2, None, &by(0)).await.unwrap();
        assert!(matches!(unknown, AcknowledgeOutcome::Unknown));
    }
}

/// Over HTTP.
mod served {
    use super::*;

    both_stores!(an_incident_is_shown, lists_are_paged, what_is_wrong_is_named);

    async fn an_incident_is_shown(server: &TestServer) {
        let database = &server.database;
        let flapping = Row { flapping_since: Some(at(-5)), ..Row::of_device(3, "pi-1", "school") };
        write(
            database,
            [
                Row::of_group(2, "school").sql(database),
                flapping.sql(database),
                member(database, 2, "pi-1", Some(at(-10)), false),
                member(database, 2, "pi-2", None, true),
                entry(database, 2, 1, "opened"),
                entry(database, 2, 2, "joined"),
            ],
        )
        .await;
        let silent = json!({
            "id": 2, "scope": "group", "subject": "school", "kind": "silent", "severity": "critical",
            "state": "open", "since": at(-60), "opened_at": at(-60), "resolved_at": null,
            "resolution": null, "reopened": 0, "flapping": false, "acknowledged": null,
            "devices": {"silent": 199, "presumed": 1, "judged": 200}, "last_heard": at(-5_400),
        });
        let listed = server.get("/api/incidents").await.data(200);
        assert_eq!(listed["incidents"][1], silent);
        let failing = &listed["incidents"][0];
        assert_eq!(failing["devices"], json!({"failing": 1, "judged": 1}));
        assert_eq!((&failing["flapping"], &failing["last_heard"]), (&json!(true), &Value::Null));
        assert_eq!(listed["pagination"], json!({"limit": 50, "next_cursor": null, "total": 2}));

        let mut shown = server.get("/api/incident/2").await.data(200);
        let member = |device: &str, left_at: Value, presumed: bool| {
            json!({
                "device_id": device, "jobs": [null, "nightly"], "joined_at": at(-60),
                "left_at": left_at, "presumed": presumed,
            })
        };
        assert_eq!(
            shown["members"].take(),
            json!([member("pi-1", json!(at(-10)), false), member("pi-2", Value::Null, true)])
        );
        assert_eq!(shown["pagination"].take(), json!({"limit": 50, "offset": 0, "total": 2}));
        let details = json!({"devices": 199});
        assert_eq!(
            shown["timeline"].take(),
            json!([
                {"at": at(-60), "what": "opened", "by": null, "details": details},
                {"at": at(-60), "what": "joined", "by": null, "details": details},
            ])
        );
        for (field, value) in silent.as_object().unwrap() {
            assert_eq!(&shown[field], value, "{field}");
        }
        let second = server.get("/api/incident/2?limit=1&offset=1").await.data(200);
        assert_eq!(column(&second["members"], "device_id"), ["pi-2"]);
        assert_eq!(server.get("/api/incident/4").await.error(404), "Incident not found");
    }

    async fn lists_are_paged(server: &TestServer) {
        let database = &server.database;
        let rows = (1..=5).map(|id| Row::of_device(id, &format!("pi-{id}"), "school"));
        let over = Row::of_group(6, "school").resolved(at(-1));
        write(database, rows.chain([over]).map(|row| row.sql(database))).await;
        let mut ids = Vec::new();
        let mut path = "/api/incidents?limit=2&kind=failing&scope=device&group=school".to_owned();
        loop {
            let page = server.get(&path).await.data(200);
            ids.extend(column(&page["incidents"], "id"));
            assert_eq!(page["pagination"]["total"], 5);
            let Some(cursor) = page["pagination"]["next_cursor"].as_str() else { break };
            path = format!("/api/incidents?limit=2&cursor={cursor}");
        }
        assert_eq!(ids, [5, 4, 3, 2, 1].map(Value::from));
        let over = server.get("/api/incidents?state=resolved").await.data(200);
        assert_eq!(over["incidents"][0]["resolution"], "recovered");
        assert_eq!(over["incidents"][0]["state"], "resolved");
        for (query, expected) in [
            ("device_id=pi-3", 1),
            ("device_id=pi-3&kind=silent", 0),
            ("scope=fleet", 0),
            ("since=2026-11-22T11:59:00Z", 5),
            ("since=2026-11-22T11:59:00.001Z", 0),
        ] {
            let listed = server.get(&format!("/api/incidents?{query}")).await.data(200);
            assert_eq!(listed["pagination"]["total"], expected, "{query}");
        }
        // Those about devices in no group, and not that of the fleet.
        let fleet = Row { scope: "fleet", subject: "fleet".to_owned(), ..Row::of_group(7, "") };
        write(database, [Row::of_device(8, "lone", "").sql(database), fleet.sql(database)]).await;
        let ungrouped = server.get("/api/incidents?group=").await.data(200);
        assert_eq!(column(&ungrouped["incidents"], "id"), [8].map(Value::from));
        let none = server.get("/api/incidents?group=&scope=fleet").await.data(200);
        assert_eq!(none["pagination"]["total"], 0);
    }

    async fn what_is_wrong_is_named(server: &TestServer) {
        write(&server.database, [Row::of_group(1, "school").sql(&server.database)]).await;
        let query = "state=closed&kind=degraded&scope=world&group=%00&device_id=&since=never&limit=0&cursor=x&other=1";
        let wrong = server.get(&format!("/api/incidents?{query}")).await.wrong_fields();
        let fields: Vec<_> = wrong.iter().map(|(field, _)| field.as_str()).collect();
        assert_eq!(
            fields,
            ["state", "kind", "scope", "group", "device_id", "since", "limit", "cursor", "other"]
        );
        for path in ["/api/incident/0", "/api/incident/x", "/api/incident/9223372036854775808"] {
            let wrong = server.get(path).await.wrong_fields();
            assert_eq!(wrong, [("incident_id".to_owned(), "format".to_owned())], "{path}");
        }
        let wrong =
            server.get("/api/incident/1?limit=1001&offset=-1&cursor=1").await.wrong_fields();
        assert_eq!(wrong.len(), 3, "{wrong:?}");
        const PATH: &str = "/api/incident/1/acknowledge";
        let body = json!({"note": "two\nlines", "until": at(0), "by": "me"});
        let complaints = server.post(PATH, &body).await.complaints();
        assert_eq!(
            complaints,
            [
                "\"note\" must not contain control characters",
                "\"until\" must be in the future",
                "\"by\" is not allowed",
            ]
        );
        let body = json!({"until": "9999-12-31T00:00:00Z"});
        let complaints = server.post(PATH, &body).await.complaints();
        assert_eq!(complaints, ["\"until\" must be within 10 years"]);
        let body = json!({"note": "x".repeat(1_001), "until": "tomorrow"});
        assert_eq!(server.post(PATH, &body).await.complaints().len(), 2);
        assert_eq!(server.get("/api/incident/1").await.data(200)["timeline"], json!([]));
    }
}

/// Over HTTP, with keys.
mod locked {
    use super::*;

    both_stores!(acknowledging_and_withdrawing);

    async fn acknowledging_and_withdrawing(locked: &LockedServer) {
        let server = &locked.0;
        let admin = KeyRequest { name: Some("Ada".to_owned()), ..key_request(Scope::Admin) };
        let (key_id, ada) = locked.key(admin).await;
        let nameless = locked.admin().await;
        let (_, reader) = locked.key(key_request(Scope::Read)).await;
        write(
            &server.database,
            [
                Row::of_group(1, "school").sql(&server.database),
                Row::of_group(2, "other").resolved(at(-1)).sql(&server.database),
            ],
        )
        .await;
        const PATH: &str = "/api/incident/1/acknowledge";
        forbidden(&reader.post(PATH, &json!({})).await, "This key does not open this");
        let body = json!({"note": "power cut", "until": at(3_600)});
        let given = ada.post(PATH, &body).await.data(200);
        let expected = json!({"at": at(0), "by": "Ada", "until": at(3_600), "note": "power cut"});
        assert_eq!(given["acknowledged"], expected);
        server.clock.set(at(3_600));
        let over = reader.get("/api/incident/1").await.data(200);
        assert_eq!(over["acknowledged"], Value::Null);
        // With an empty body, without one, and again.
        let again = send(nameless.request(Method::POST, PATH).json(&Value::Null)).await.data(200);
        assert_eq!(again["acknowledged"]["note"], Value::Null);
        let again = send(nameless.request(Method::POST, PATH)).await.data(200);
        let by = format!("key {}", key_id + 1);
        let expected = json!({"at": at(3_600), "by": by, "until": null, "note": null});
        assert_eq!(again["acknowledged"], expected);
        for _ in 0..2 {
            let withdrawn = ada.delete(PATH).await.data(200);
            assert_eq!(withdrawn["acknowledged"], Value::Null);
        }
        let timeline = reader.get("/api/incident/1").await.data(200)["timeline"].take();
        assert_eq!(column(&timeline, "what"), ["acknowledged"; 4].map(Value::from));
        assert_eq!(column(&timeline, "by"), ["Ada", &by, &by, "Ada"].map(Value::from));
        assert_eq!(
            column(&timeline, "details"),
            [
                json!({"note": "power cut", "until": at(3_600)}),
                json!({}),
                json!({}),
                json!({"withdrawn": true}),
            ]
        );
        let lines = ada.get("/api/audit?limit=4").await.data(200)["entries"].take();
        assert_eq!(
            column(&lines, "action"),
            [
                "incident.withdraw",
                "incident.acknowledge",
                "incident.acknowledge",
                "incident.acknowledge",
            ]
            .map(Value::from)
        );
        assert_eq!(column(&lines, "subject"), ["1"; 4].map(Value::from));
        assert_eq!(lines[3]["details"], json!({"note": "power cut", "until": at(3_600)}));
        assert_eq!(lines[3]["key_id"], key_id);

        for (path, status, error) in [
            ("/api/incident/2/acknowledge", 409, "Incident is already resolved"),
            ("/api/incident/3/acknowledge", 404, "Incident not found"),
        ] {
            assert_eq!(ada.post(path, &json!({})).await.error(status), error);
            assert_eq!(ada.delete(path).await.error(status), error);
        }
    }
}

async fn write(database: &TestDatabase, sql: impl IntoIterator<Item = String>) {
    let sql: String = sql.into_iter().collect();
    database.execute(&sql).await;
}
