//! Channels and routes through the API: what is kept, what is refused, and that no secret comes back, whatever is asked.

use pisync::{
    config::http::AuthMode,
    notify::{
        manage,
        secrets::{Secrets, SecretsKey},
    },
    random::Randomness,
    store::{self, Scope},
};
use reqwest::Method;
use serde_json::{Value, json};

use crate::support::{
    events::at,
    http::{Answer, Client, column, keys, send, with},
    locked_server::{LockedServer, forbidden},
    server::TestServer,
    store::{Fixture, TestDatabase, key_request},
};

both_stores!(
    channels_of_every_kind_are_kept,
    channels_are_changed_and_replaced,
    wrong_fields_are_all_named_without_their_values,
    no_secret_comes_back,
    secrets_are_rotated,
    changes_at_once_do_not_undo_one_another,
    routes_are_kept,
    wrong_routes,
    scopes_are_asked_for,
    changes_are_in_the_audit_log,
);

const KEY: &str = "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f";
const OTHER_KEY: &str = "202122232425262728292a2b2c2d2e2f303132333435363738393a3b3c3d3e3f";

fn key(text: &str) -> Option<SecretsKey> {
    Some(SecretsKey::parse(text).unwrap())
}

/// A server that can store secrets: on SQLite with the key in a file, on PostgreSQL with one that is set.
struct WithKey(TestServer);

impl std::ops::Deref for WithKey {
    type Target = TestServer;

    fn deref(&self) -> &TestServer {
        &self.0
    }
}

impl Fixture for WithKey {
    async fn prepare(database: TestDatabase) -> Self {
        let key = database.file().is_none().then(|| key(KEY)).flatten();
        Self(TestServer::start_with(database, |settings| settings.secrets_key = key).await)
    }

    fn into_database(self) -> TestDatabase {
        self.0.into_database()
    }
}

const SIGNING: &str = "whsec_c2lnbmluZ19zZWNyZXRfb2ZfdGhlX3Rlc3Qh";

/// What must show nowhere: each is a secret of [`every_kind`].
const SECRETS: [&str; 8] = [
    "hook-path-s3cret",
    "c2lnbmluZ19zZWNyZXRfb2ZfdGhlX3Rlc3Qh",
    "header-v4lue-s3cret",
    "slack-path-s3cret",
    "discord-path-s3cret",
    "topic-s3cret",
    "tk_access-s3cret",
    "123456:bot-s3cret",
];

fn every_kind() -> [Value; 7] {
    [
        json!({
            "name": "hook", "kind": "webhook", "url": "https://hooks.example/hook-path-s3cret",
            "signing_secret": SIGNING, "headers": {"X-Token": "header-v4lue-s3cret"},
        }),
        json!({"name": "slack", "kind": "slack", "url": "https://hooks.slack.com/slack-path-s3cret"}),
        json!({"name": "discord", "kind": "discord", "url": "https://discord.com/discord-path-s3cret"}),
        json!({"name": "teams", "kind": "teams", "url": "https://teams.example/hook-path-s3cret"}),
        json!({
            "name": "ntfy", "kind": "ntfy", "server": "https://ntfy.example/",
            "topic": "topic-s3cret-of-ours", "token": "tk_access-s3cret",
        }),
        json!({
            "name": "telegram", "kind": "telegram", "bot_token": "123456:bot-s3cret",
            "chat_id": "-1001", "thread_id": 7,
        }),
        json!({"name": "email", "kind": "email", "to": "anna@example.org"}),
    ]
}

/// The fields that hold secrets.
const SECRET_FIELDS: [&str; 6] =
    ["url", "signing_secret", "headers", "topic", "token", "bot_token"];

async fn create(server: &Client, channel: &Value) -> i64 {
    server.post("/api/channels", channel).await.data(201)["id"].as_i64().unwrap()
}

fn ntfy(name: &str) -> Value {
    with(every_kind()[4].clone(), &json!({ "name": name }))
}

async fn channels_of_every_kind_are_kept(server: &WithKey) {
    assert_eq!(server.get("/api/channels").await.data(200), json!({"channels": []}));
    for (place, channel) in every_kind().iter().enumerate() {
        let answer = server.post("/api/channels", channel).await;
        assert_eq!(answer.json(201)["message"], "Channel created successfully");
        assert_eq!(answer.header("cache-control"), "no-store");
        let made = answer.data(201);
        for (field, value) in channel.as_object().unwrap() {
            if !SECRET_FIELDS.contains(&field.as_str()) {
                assert_eq!(made[field], *value, "{channel}");
            }
        }
        let usual = [
            ("enabled", json!(true)),
            // The first one.
            ("default", json!(place == 0)),
            ("template", Value::Null),
            ("state", json!("ok")),
            ("last_error", Value::Null),
            ("failing_since", Value::Null),
            ("waiting", json!(0)),
            ("created_at", json!(at(0))),
        ];
        for (field, value) in usual {
            assert_eq!(made[field], value, "{field} of {channel}");
        }
        let shown = server.get(&format!("/api/channel/{}", made["id"])).await.data(200);
        if channel["kind"] == "webhook" {
            assert_eq!(made["signing_secret"], SIGNING);
            assert_eq!(shown["signing_secret"], format!("…{}", &SIGNING[SIGNING.len() - 4..]));
            assert_eq!(
                (&shown["url"], &shown["headers"]["x-token"]),
                (&json!("…cret"), &json!("…cret"))
            );
        } else {
            assert_eq!(shown, made);
        }
    }
    let listed = server.get("/api/channels").await.data(200)["channels"].take();
    let kinds = ["webhook", "slack", "discord", "teams", "ntfy", "telegram", "email"];
    assert_eq!(column(&listed, "kind"), kinds);
    assert_eq!((&listed[4]["topic"], &listed[4]["token"]), (&json!("…ours"), &json!("…cret")));
    assert_eq!(listed[5]["bot_token"], "…cret");
    // The fleet names them.
    let fleet = server.get("/api/fleet").await.data(200)["channels"].take();
    assert_eq!(fleet[6], json!({"id": listed[6]["id"], "name": "email", "state": "ok"}));
    assert_eq!(fleet.as_array().unwrap().len(), 7);
    // A webhook without a signing secret gets one, and short secrets are not shown at all.
    let own = json!({"name": "w", "kind": "webhook", "url": "http://a.b", "headers": {"a": "x-y"}});
    let made = server.post("/api/channels", &own).await.data(201);
    let secret = made["signing_secret"].as_str().unwrap();
    assert!(secret.starts_with("whsec_") && secret.len() == 6 + 44, "{secret}");
    assert_eq!((&made["url"], &made["headers"]), (&json!("…b/"), &json!({"a": "…"})));
    // Names are unique.
    let taken = server.post("/api/channels", &ntfy("w")).await;
    assert_eq!(taken.error(409), "There is another channel with this name");
    let path = format!("/api/channel/{}", made["id"]);
    let deleted = server.delete(&path).await.data(200);
    assert_eq!(deleted, json!({"id": made["id"], "dropped_notifications": 0}));
    let rotate = format!("{path}/rotate-secret");
    for answer in [
        server.get(&path).await,
        server.delete(&path).await,
        server.patch(&path, &json!({})).await,
        server.put(&path, &ntfy("w")).await,
        send(server.request(Method::POST, &rotate)).await,
    ] {
        assert_eq!(answer.error(404), "Channel not found");
    }
    for path in ["/api/channel/x", "/api/channel/0", "/api/channel/-1"] {
        let complaints = server.get(path).await.complaints();
        assert_eq!(complaints, ["\"channel_id\" must be a positive number"]);
    }
}

async fn channels_are_changed_and_replaced(server: &WithKey) {
    let webhook = every_kind()[0].clone();
    let id = create(server, &webhook).await;
    let path = format!("/api/channel/{id}");
    let before = server.get(&path).await.data(200);
    let change = async |body: Value| server.patch(&path, &body).await.data(200);
    assert_eq!(change(json!({})).await, before);
    let template = "{{ text }}\n{{ group }}\t";
    let changes =
        json!({"name": "other", "enabled": false, "default": false, "template": template});
    let changed = change(changes.clone()).await;
    let expected = with(with(before.clone(), &changes), &json!({"state": "disabled"}));
    assert_eq!(changed, expected);
    // One secret, and the others stay.
    let changed = change(json!({"url": "https://hooks.example/another-0ne"})).await;
    assert_eq!(changed, with(expected.clone(), &json!({"url": "…-0ne"})));
    let changed = change(json!({"headers": null, "template": null, "enabled": true})).await;
    assert_eq!((&changed["headers"], &changed["template"]), (&json!({}), &Value::Null));
    assert_eq!(changed["signing_secret"], before["signing_secret"]);
    // PUT keeps the secrets that it leaves out, and nothing else.
    change(json!({"headers": {"X-Token": "header-v4lue-s3cret"}, "default": true})).await;
    let replaced = server.put(&path, &json!({"name": "hook", "kind": "webhook"})).await.data(200);
    let expected = json!({"name": "hook", "default": false, "url": "…-0ne"});
    assert_eq!(replaced, with(before, &expected));
    let missing = server.put(&path, &json!({})).await.complaints();
    assert_eq!(missing, ["\"name\" is required", "\"kind\" is required"]);
    // Public fields are not secrets: PUT needs them, PATCH keeps them.
    let id = create(server, &every_kind()[5]).await;
    let path = format!("/api/channel/{id}");
    let complaints =
        server.put(&path, &json!({"name": "t", "kind": "telegram"})).await.complaints();
    assert_eq!(complaints, ["\"chat_id\" is required"]);
    let changed =
        server.patch(&path, &json!({"bot_token": "654321:new-bot-t0ken"})).await.data(200);
    assert_eq!((&changed["chat_id"], &changed["thread_id"]), (&json!("-1001"), &json!(7)));
    let changed = server.patch(&path, &json!({"thread_id": null, "chat_id": 42})).await.data(200);
    assert_eq!((&changed["chat_id"], &changed["thread_id"]), (&json!("42"), &Value::Null));
    assert_eq!(changed["bot_token"], "…0ken");
    // The kind stays.
    for body in [json!({"kind": "email"}), json!({"kind": "email", "name": "t", "to": "a@b"})] {
        let refused = match body.get("to") {
            None => server.patch(&path, &body).await,
            Some(_) => server.put(&path, &body).await,
        };
        let complaint = "\"kind\" must stay telegram; make another channel for another kind";
        assert!(refused.complaints().contains(&complaint.to_owned()), "{body}");
    }
    let taken = server.patch(&path, &json!({"name": "hook"})).await;
    assert_eq!(taken.error(409), "There is another channel with this name");
}

async fn wrong_fields_are_all_named_without_their_values(server: &WithKey) {
    let kind = "must be one of [webhook, slack, discord, teams, ntfy, telegram, email]";
    for (body, expected) in [
        (json!({}), vec!["\"name\" is required".to_owned(), "\"kind\" is required".to_owned()]),
        (
            json!({"name": "", "kind": "fax", "enabled": 1, "default": null, "template": 7}),
            vec![
                "\"name\" is not allowed to be empty".to_owned(),
                format!("\"kind\" {kind}"),
                "\"enabled\" must be a boolean".to_owned(),
                "\"default\" must be a boolean".to_owned(),
                "\"template\" must be a string".to_owned(),
            ],
        ),
        (
            json!({"name": "a\nb", "kind": "slack", "url": "ftp://s3cret", "to": "s3cret"}),
            vec![
                "\"name\" must not contain control characters".to_owned(),
                "\"url\" must begin with https:// or http://".to_owned(),
                "\"to\" is not allowed".to_owned(),
            ],
        ),
        (
            json!({"name": "a", "kind": "slack", "url": "https://s3cret:s3cret@h/", "template": "\u{0}s3cret"}),
            vec![
                "\"template\" must not contain control characters".to_owned(),
                "\"url\" must not hold a user name or a password".to_owned(),
            ],
        ),
        (
            json!({"name": "a", "kind": "webhook", "url": "…cret", "signing_secret": "s3cret", "headers": {"a b": "s3cret"}}),
            vec![
                "\"url\" is masked; leave it out to keep it".to_owned(),
                "\"signing_secret\" must be whsec_ and 24 to 64 bytes in base64".to_owned(),
                "\"headers\" holds a name that no header has".to_owned(),
            ],
        ),
        (
            json!({"name": "a", "kind": "ntfy", "tokne": "s3cret", "topic": {"a": "s3cret"}}),
            vec![
                "\"server\" is required".to_owned(),
                "\"topic\" must be a string".to_owned(),
                "\"tokne\" is not allowed".to_owned(),
            ],
        ),
        (
            json!({"name": "a", "kind": "telegram", "bot_token": "", "chat_id": [], "thread_id": -1}),
            vec![
                "\"bot_token\" must be the token of a bot, such as 123456:ABC-DEF1234ghIkl"
                    .to_owned(),
                "\"chat_id\" must be a string".to_owned(),
                "\"thread_id\" must be a positive number".to_owned(),
            ],
        ),
        (
            json!({"name": "a", "kind": "email", "to": "a@b, c@d"}),
            vec!["\"to\" must be one e-mail address, such as ada@example.com".to_owned()],
        ),
    ] {
        let answer = server.post("/api/channels", &body).await;
        assert_eq!(answer.complaints(), expected, "{body}");
        assert!(!answer.text().contains("s3cret"), "{}", answer.text());
        for detail in answer.coded_details().as_array().unwrap() {
            let field = detail["field"].as_str().unwrap();
            let may_show = ["name", "kind", "enabled", "default"].contains(&field);
            assert!(may_show || detail.get("value").is_none(), "{detail}");
        }
    }
    let long = with(ntfy("a"), &json!({"template": "x".repeat((16 << 10) + 1)}));
    let complaints = server.post("/api/channels", &long).await.complaints();
    assert_eq!(complaints, ["\"template\" must have at most 16384 bytes"]);
    let headers: Value = (0..11)
        .map(|number| (format!("x-{number}"), json!("v")))
        .collect::<serde_json::Map<_, _>>()
        .into();
    let many = with(every_kind()[0].clone(), &json!({ "headers": headers }));
    let complaints = server.post("/api/channels", &many).await.complaints();
    assert_eq!(complaints, ["\"headers\" must have at most 10 headers"]);
    assert_eq!(server.get("/api/channels").await.data(200), json!({"channels": []}));
    // What is shown cannot be sent back.
    let id = create(server, &every_kind()[0]).await;
    let path = format!("/api/channel/{id}");
    let shown = server.get(&path).await.data(200);
    for field in ["url", "signing_secret", "headers"] {
        let body = json!({ field: shown[field] });
        let complaints = server.patch(&path, &body).await.complaints();
        assert_eq!(complaints, [format!("\"{field}\" is masked; leave it out to keep it")]);
    }
    let null = server.patch(&path, &json!({"name": null, "kind": null, "url": null})).await;
    let rule = "must be a string";
    let expected = ["name", "kind", "url"].map(|field| format!("\"{field}\" {rule}"));
    assert_eq!(null.complaints(), expected);
}

/// Nothing that the server answers holds a secret, be it right or wrong what is asked.
async fn no_secret_comes_back(server: &WithKey) {
    let mut answers: Vec<Answer> = Vec::new();
    let mut ids = Vec::new();
    for channel in every_kind() {
        let answer = server.post("/api/channels", &channel).await;
        let made = answer.data(201);
        ids.push(made["id"].as_i64().unwrap());
        // This one answer shows what the client has made.
        if channel["kind"] == "webhook" {
            let others = SECRETS.iter().filter(|secret| !SIGNING.contains(*secret));
            for secret in others {
                assert!(!answer.text().contains(secret), "{}", answer.text());
            }
        } else {
            answers.push(answer);
        }
        answers.push(server.post("/api/channels", &channel).await);
        let misspelt: Value = channel
            .as_object()
            .unwrap()
            .iter()
            .map(|(field, value)| (format!("{field}x"), value.clone()))
            .collect::<serde_json::Map<_, _>>()
            .into();
        answers.push(server.post("/api/channels", &misspelt).await);
        let other_kind = with(channel.clone(), &json!({"kind": "email", "name": "x"}));
        answers.push(server.post("/api/channels", &other_kind).await);
        let cut = channel.to_string();
        let cut = cut.trim_end_matches('}').to_owned();
        for body in [cut.clone(), format!("[{channel}]"), format!("{cut}, \"a\": \\u}}")] {
            let request = server.request(Method::POST, "/api/channels");
            let request = request.header("content-type", "application/json").body(body);
            answers.push(send(request).await);
        }
    }
    for (id, channel) in ids.iter().zip(every_kind()) {
        let path = format!("/api/channel/{id}");
        answers.push(server.get(&path).await);
        answers.push(server.put(&path, &channel).await);
        answers.push(server.patch(&path, &channel).await);
        answers.push(server.patch(&path, &with(channel, &json!({"more": SECRETS[0]}))).await);
    }
    for path in [
        "/api/channels",
        "/api/fleet",
        "/api/routes",
        "/api/audit?limit=1000",
        "/metrics",
        "/api",
        "/api-docs/openapi.json",
    ] {
        answers.push(server.get(path).await);
    }
    for id in &ids {
        answers.push(server.delete(&format!("/api/channel/{id}")).await);
    }
    answers.push(server.get("/api/audit?limit=1000").await);
    let statuses: std::collections::BTreeSet<_> =
        answers.iter().map(|answer| answer.status).collect();
    assert_eq!(statuses, [200, 201, 400, 409].into());
    for answer in &answers {
        for secret in SECRETS {
            assert!(!answer.text().contains(secret), "{secret}: {}", answer.text());
        }
    }
    assert!(answers.len() > 75, "{}", answers.len());
}

async fn secrets_are_rotated(server: &WithKey) {
    let id = create(server, &every_kind()[0]).await;
    let path = format!("/api/channel/{id}/rotate-secret");
    let rotate = async || send(server.request(Method::POST, &path)).await;
    server.clock.set(at(100));
    let answer = rotate().await;
    assert_eq!(answer.header("cache-control"), "no-store");
    let made = answer.data(200);
    assert_eq!(keys(&made), ["id", "signing_secret"]);
    let secret = made["signing_secret"].as_str().unwrap().to_owned();
    assert!(secret.starts_with("whsec_") && secret != SIGNING, "{secret}");
    let shown = server.get(&format!("/api/channel/{id}")).await.data(200);
    assert_eq!(shown["signing_secret"], format!("…{}", &secret[secret.len() - 4..]));
    assert_eq!(shown["url"], "…cret");
    // Both are in use for a day.
    let stored = async || {
        let store = store::open(&server.database.target).await.unwrap();
        let key = server.is_postgres().then(|| key(KEY)).flatten();
        let secrets = Secrets::of(&server.database.target, key, Randomness::system());
        let view = manage::channel(&*store, &secrets, id).await.unwrap();
        let (_, secrets) = view.config.unwrap().stored();
        let secrets: Value = serde_json::from_slice(&secrets).unwrap();
        (secrets["signing_secret"].clone(), secrets["former_secret"].clone())
    };
    let day = 24 * 60 * 60;
    let former = |secret: &str, second| json!({"secret": secret, "until": at(second)});
    assert_eq!(stored().await, (json!(secret), former(SIGNING, 100 + day)));
    // Of two changes within a day, the last two secrets are.
    server.clock.set(at(200));
    let second = rotate().await.data(200)["signing_secret"].as_str().unwrap().to_owned();
    let both = (json!(second), former(&secret, 200 + day));
    assert_eq!(stored().await, both);
    // Other changes leave them; one that is set counts at once.
    server.patch(&format!("/api/channel/{id}"), &json!({"url": "https://a.b/c"})).await.data(200);
    assert_eq!(stored().await, both);
    let set = json!({"signing_secret": SIGNING});
    server.patch(&format!("/api/channel/{id}"), &set).await.data(200);
    assert_eq!(stored().await, (json!(SIGNING), Value::Null));
    let other = create(server, &ntfy("ntfy")).await;
    let refused =
        send(server.request(Method::POST, &format!("/api/channel/{other}/rotate-secret")));
    let expected = "Channel has no signing secret: only webhooks have one";
    assert_eq!(refused.await.error(409), expected);
}

async fn changes_at_once_do_not_undo_one_another(server: &WithKey) {
    let id = create(server, &every_kind()[0]).await;
    let path = format!("/api/channel/{id}");
    for round in 0..5 {
        let template = format!("round {round}");
        let url = format!("https://hooks.example/round-{round:04}");
        let name = format!("hook {round}");
        let (one, other, third) =
            (json!({"template": template}), json!({"url": url}), json!({"name": name}));
        let (one, other, third) = tokio::join!(
            server.patch(&path, &one),
            server.patch(&path, &other),
            server.patch(&path, &third),
        );
        for answer in [one, other, third] {
            answer.data(200);
        }
        let now = server.get(&path).await.data(200);
        let expected = json!({"template": template, "url": format!("…{round:04}"), "name": name});
        assert_eq!(now, with(now.clone(), &expected));
    }
}

async fn routes_are_kept(server: &WithKey) {
    let none = server.get("/api/routes").await.data(200);
    assert_eq!(none, json!({"version": 0, "routes": []}));
    let (first, second) = (create(server, &ntfy("a")).await, create(server, &ntfy("b")).await);
    let full = json!({
        "match": {
            "groups": ["school-17"], "tags": ["indoor"], "kinds": ["silent"], "scopes": ["group", "fleet"],
            "severity_at_least": "critical",
        },
        "channels": [first, second], "wait_seconds": 0, "interval_seconds": 86_400,
        "remind_seconds": 86_400,
        "digest": {"at": "07:00", "days": ["mon", "fri"], "timezone": "Europe/Berlin"},
        "stop": true,
    });
    let short = json!({"channels": [first], "digest": {"at": "18:30", "timezone": "UTC"}});
    let body = json!({"version": 2, "routes": [full, short]});
    let answer = server.put("/api/routes", &body).await;
    assert_eq!(answer.json(200)["message"], "Routes updated successfully");
    let days = ["mon", "tue", "wed", "thu", "fri", "sat", "sun"];
    let usual = json!({
        "match": {"groups": [], "tags": [], "kinds": [], "scopes": [], "severity_at_least": "info"},
        "channels": [first], "wait_seconds": 60, "interval_seconds": 300, "remind_seconds": null,
        "digest": {"at": "18:30", "days": days, "timezone": "UTC"}, "stop": false,
    });
    let expected = json!({"version": 3, "routes": [full, usual]});
    assert_eq!(answer.data(200), expected);
    assert_eq!(server.get("/api/routes").await.data(200), expected);
    // Somebody was faster.
    let stale = server.put("/api/routes", &body).await;
    assert_eq!(stale.error(409), "Routes were changed meanwhile");
    // What is read can be sent back.
    let again = server.put("/api/routes", &expected).await.data(200);
    assert_eq!(again, with(expected, &json!({"version": 4})));
    server.delete(&format!("/api/channel/{first}")).await.data(200);
    let left = server.get("/api/routes").await.data(200);
    let full = with(full, &json!({"channels": [second]}));
    assert_eq!(left, json!({"version": 5, "routes": [full]}));
    let empty = server.put("/api/routes", &json!({"version": 5, "routes": []})).await.data(200);
    assert_eq!(empty, json!({"version": 6, "routes": []}));
}

async fn wrong_routes(server: &WithKey) {
    let id = create(server, &ntfy("a")).await;
    let put = async |routes: Value| {
        server.put("/api/routes", &json!({"version": 1, "routes": routes})).await.complaints()
    };
    let required = ["\"version\" is required", "\"routes\" is required"];
    assert_eq!(server.put("/api/routes", &json!({})).await.complaints(), required);
    let odd = server.put("/api/routes", &json!({"version": "1", "routes": {}, "more": 1})).await;
    let expected = [
        "\"version\" must be the version of the routes that are replaced",
        "\"routes\" must be an array",
        "\"more\" is not allowed",
    ];
    assert_eq!(odd.complaints(), expected);
    for (route, expected) in [
        (json!(7), vec!["\"routes[0]\" must be of type object"]),
        (json!({}), vec!["\"routes[0].channels\" is required"]),
        (json!({"channels": null}), vec!["\"routes[0].channels\" must be an array"]),
        (
            json!({"channels": [id, "3", 0], "colour": 1, "stop": "yes", "match": []}),
            vec![
                "\"routes[0].match\" must be of type object",
                "\"routes[0].channels[1]\" must be the id of a channel",
                "\"routes[0].channels[2]\" must be the id of a channel",
                "\"routes[0].stop\" must be a boolean",
                "\"routes[0].colour\" is not allowed",
            ],
        ),
        (
            json!({"channels": [id], "wait_seconds": -1, "interval_seconds": 86_401, "remind_seconds": 299.5}),
            vec![
                "\"routes[0].wait_seconds\" must be greater than or equal to 0",
                "\"routes[0].interval_seconds\" must be less than or equal to 86400",
                "\"routes[0].remind_seconds\" must be an integer",
            ],
        ),
        (
            json!({"channels": [id], "remind_seconds": 299, "wait_seconds": "60", "interval_seconds": 1e300}),
            vec![
                "\"routes[0].wait_seconds\" must be a number",
                "\"routes[0].interval_seconds\" must be less than or equal to 86400",
                "\"routes[0].remind_seconds\" must be greater than or equal to 300",
            ],
        ),
        (
            json!({"channels": [id], "match": {
                "groups": ["a", ""], "tags": ["x".repeat(51)], "kinds": ["degraded"], "scopes": "fleet",
                "severity_at_least": "high", "jobs": [],
            }}),
            vec![
                "\"routes[0].match.groups[1]\" must be the name of a group",
                "\"routes[0].match.tags[0]\" must be a tag",
                "\"routes[0].match.kinds[0]\" must be one of [silent, failing]",
                "\"routes[0].match.scopes\" must be an array",
                "\"routes[0].match.severity_at_least\" must be one of [info, warning, critical]",
                "\"routes[0].match.jobs\" is not allowed",
            ],
        ),
        (
            json!({"channels": [id], "digest": {"at": "7", "days": ["Monday"], "timezone": "CET"}}),
            vec![
                "\"routes[0].digest.at\" must be a time of day such as 07:00, from 00:00 to 23:59",
                "\"routes[0].digest.days[0]\" must be one of [mon, tue, wed, thu, fri, sat, sun]",
                "\"routes[0].digest.timezone\" must be an IANA time zone",
            ],
        ),
    ] {
        assert_eq!(put(json!([route])).await, expected, "{route}");
    }
    let unknown = put(json!([{"channels": [id]}, {"channels": [99, id, 98]}])).await;
    let expected = [
        "\"routes[1].channels[0]\" is the id of no channel",
        "\"routes[1].channels[2]\" is the id of no channel",
    ];
    assert_eq!(unknown, expected);
    let many = vec![json!({"channels": [id]}); 101];
    assert_eq!(put(many.into()).await, ["\"routes\" must contain less than or equal to 100 items"]);
    // No more are named than somebody reads.
    let wrong = vec![json!({"channels": [0, 0]}); 100];
    assert_eq!(put(wrong.into()).await.len(), 100);
    let none = server.get("/api/routes").await.data(200);
    assert_eq!(none, json!({"version": 1, "routes": []}));
}

async fn scopes_are_asked_for(server: &LockedServer) {
    let admin = server.admin().await;
    // On PostgreSQL there is no key, which an e-mail channel does not need.
    let id = create(&admin, &every_kind()[6]).await;
    let (path, rotate) = (format!("/api/channel/{id}"), format!("/api/channel/{id}/rotate-secret"));
    for scope in [Scope::Read, Scope::Operate] {
        let (_, client) = server.key(key_request(scope)).await;
        for path in ["/api/channels", &path, "/api/routes", "/api/fleet"] {
            client.get(path).await.data(200);
        }
        for answer in [
            client.post("/api/channels", &every_kind()[6]).await,
            client.put(&path, &every_kind()[6]).await,
            client.patch(&path, &json!({"enabled": false})).await,
            client.delete(&path).await,
            send(client.request(Method::POST, &rotate)).await,
            client.put("/api/routes", &json!({"version": 1, "routes": []})).await,
        ] {
            forbidden(&answer, "a key of the scope admin");
        }
    }
    let (_, ingest) = server.key(key_request(Scope::Ingest)).await;
    for path in ["/api/channels", &path, "/api/routes"] {
        forbidden(&ingest.get(path).await, "a key of the scope read");
    }
    assert_eq!(admin.get(&path).await.data(200)["enabled"], true);
}

async fn changes_are_in_the_audit_log(server: &WithKey) {
    let id = create(server, &every_kind()[0]).await;
    let path = format!("/api/channel/{id}");
    server.patch(&path, &json!({"enabled": false})).await.data(200);
    send(server.request(Method::POST, &format!("{path}/rotate-secret"))).await.data(200);
    server.put("/api/routes", &json!({"version": 3, "routes": []})).await.data(200);
    server.delete(&path).await.data(200);
    let entries = server.get("/api/audit").await.data(200)["entries"].take();
    let entries: Vec<_> = entries.as_array().unwrap().iter().rev().collect();
    let actions: Vec<_> = entries.iter().map(|entry| entry["action"].as_str().unwrap()).collect();
    let expected =
        ["channel.create", "channel.update", "channel.rotate", "routes.put", "channel.delete"];
    assert_eq!(actions, expected);
    let id = id.to_string();
    for (entry, subject) in entries.iter().zip([&*id, &*id, &*id, "", &*id]) {
        assert_eq!(entry["subject"], subject);
    }
    let details = json!({
        "name": "hook", "kind": "webhook", "config": {}, "enabled": true, "default": true, "has_template": false,
    });
    assert_eq!(entries[0]["details"], details);
}

/// A server that has another key than channels were stored under, or none.
async fn locked(database: TestDatabase, other: Option<SecretsKey>) {
    let start = async |database, key| {
        TestServer::start_with(database, |settings| settings.secrets_key = key).await
    };
    let server = start(database, key(KEY)).await;
    let hook = create(&server, &every_kind()[0]).await;
    create(&server, &every_kind()[6]).await;
    let shown = server.get(&format!("/api/channel/{hook}")).await.data(200);
    let database = server.stop().await;

    let server = start(database, other.clone()).await;
    let can_store = other.is_some() || !server.is_postgres();
    let path = format!("/api/channel/{hook}");
    let state = async || server.get(&path).await.data(200)["state"].take();
    let locked = server.get(&path).await.data(200);
    assert_eq!((&locked["state"], locked.get("url")), (&json!("locked"), None));
    let listed = server.get("/api/channels").await.data(200)["channels"].take();
    // What has no secrets needs no key.
    assert_eq!(column(&listed, "state"), ["locked", "ok"]);
    let fleet = server.get("/api/fleet").await.data(200)["channels"].take();
    assert_eq!(column(&fleet, "state"), ["locked", "ok"]);
    let rotate = send(server.request(Method::POST, &format!("{path}/rotate-secret"))).await;
    assert!(rotate.error(409).starts_with("Channel is locked"), "{}", rotate.text());
    // What needs no secrets can be changed, and the secrets stay.
    let renamed =
        server.patch(&path, &json!({"name": "renamed", "enabled": false})).await.data(200);
    assert_eq!((&renamed["name"], &renamed["state"]), (&json!("renamed"), &json!("disabled")));
    server.patch(&path, &json!({"name": "hook", "enabled": true})).await.data(200);
    let missing = server.put(&path, &json!({"name": "hook", "kind": "webhook"})).await.complaints();
    assert_eq!(missing, ["\"url\" is required", "\"signing_secret\" is required"]);
    let made = server.post("/api/channels", &ntfy("another")).await;
    if can_store {
        let made = made.data(201)["id"].take();
        server.delete(&format!("/api/channel/{made}")).await.data(200);
    } else {
        let expected = "Secrets cannot be stored: set SECRETS_KEY, and start the server again";
        assert_eq!(made.error(409), expected);
        assert_eq!(server.put(&path, &every_kind()[0]).await.error(409), expected);
    }
    assert_eq!(state().await, "locked");
    let database = server.stop().await;

    // The right key opens it again.
    let server = start(database, key(KEY)).await;
    let same = server.get(&format!("/api/channel/{hook}")).await.data(200);
    assert_eq!(same, shown);
    let database = server.stop().await;
    if can_store {
        let server = start(database, other).await;
        let path = format!("/api/channel/{hook}");
        let set = server.put(&path, &every_kind()[0]).await.data(200);
        assert_eq!(set["state"], "ok");
        server.stop().await.remove().await;
    } else {
        database.remove().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_the_right_key_channels_are_locked_on_sqlite() {
    locked(TestDatabase::sqlite(), key(OTHER_KEY)).await;
    locked(TestDatabase::sqlite(), None).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_the_right_key_channels_are_locked_on_postgresql() {
    locked(TestDatabase::postgres().await, key(OTHER_KEY)).await;
    locked(TestDatabase::postgres().await, None).await;
}

/// A row with the secrets of another channel opens nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn secrets_of_another_channel_are_not_taken() {
    let server = TestServer::start_with(TestDatabase::sqlite(), |settings| {
        settings.http.auth = AuthMode::Off;
    })
    .await;
    let (one, other) = (create(&server, &ntfy("a")).await, create(&server, &ntfy("b")).await);
    let exchange = format!(
        "update channels set secrets = (select secrets from channels where id = {one}) where id = {other}"
    );
    server.database.execute(&exchange).await;
    let listed = server.get("/api/channels").await.data(200)["channels"].take();
    assert_eq!(column(&listed, "state"), ["ok", "locked"]);
    server.stop().await;
}
