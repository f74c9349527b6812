//! API keys: who gets in where, on both stores; how keys are made and revoked; what the log of changes
//! keeps.

use std::{collections::BTreeSet, time::Instant};

use pisync::{
    http::AuthMode,
    keys::{KeyWish, REFRESH_INTERVAL},
    store::{Scope, Target},
};
use reqwest::{Method, RequestBuilder};
use serde_json::{Value, json};
use tokio::time::sleep;

use crate::support::{
    events::{at, device_id, now},
    http::{Answer, Client, event, send},
    program::Program,
    server::TestServer,
    store::{Fixture, TestDatabase, wish},
};

both_stores!(
    every_route_asks_for_its_scope,
    a_key_of_a_device_reports_for_it_alone,
    a_key_of_a_group_reports_for_its_devices,
    what_is_made_or_revoked_elsewhere_counts_within_a_second,
    an_expired_key_opens_nothing,
    last_use_is_kept_to_the_hour,
    the_command_line_makes_lists_and_revokes,
    no_start_before_the_network_without_an_admin,
);

/// A server that asks everybody for a key.
struct LockedServer(TestServer);

impl Fixture for LockedServer {
    async fn prepare(database: TestDatabase) -> Self {
        Self(locked(database).await)
    }

    fn into_database(self) -> TestDatabase {
        self.0.into_database()
    }
}

async fn locked(database: TestDatabase) -> TestServer {
    TestServer::start_with(database, |settings| settings.http.auth = AuthMode::Required).await
}

impl LockedServer {
    /// A key that the server knows by now.
    async fn key(&self, wish: KeyWish) -> (i64, Client) {
        let made = self.0.database.make_key(wish).await;
        let client = self.0.with_key(&made.1);
        let is_known = async || client.get("/api/stats").await.status != 401;
        until(is_known).await;
        (made.0, client)
    }

    async fn admin(&self) -> Client {
        self.key(wish(Scope::Admin)).await.1
    }

    /// Revokes a key behind the server's back, as another server does.
    async fn revoke_elsewhere(&self, id: i64) {
        let store = pisync::store::open(&self.0.database.target).await.unwrap();
        store.revoke_key(id, &crate::support::events::somebody()).await.unwrap();
    }
}

/// Waits for a condition that must come true soon.
async fn until(condition: impl AsyncFn() -> bool) {
    let began = Instant::now();
    while !condition().await {
        assert!(began.elapsed().as_secs() < 30, "it does not come true");
        sleep(REFRESH_INTERVAL / 20).await;
    }
}

/// Every operation of the document: method, path, and the scope that it declares; none for what is open
/// to everybody.
fn operations() -> Vec<(Method, String, Option<Scope>)> {
    let document: Value = serde_json::from_str(&pisync::http::openapi_json().unwrap()).unwrap();
    assert_eq!(document["components"]["securitySchemes"]["key"]["scheme"], "bearer");
    let mut operations = Vec::new();
    for (path, item) in document["paths"].as_object().unwrap() {
        for (method, operation) in item.as_object().unwrap() {
            let security = &operation["security"];
            let scope = if *security == json!([{}]) {
                None
            } else {
                let scope = security[0]["key"][0].as_str();
                let scope = scope.unwrap_or_else(|| panic!("{method} {path} declares no scope"));
                assert_eq!(*security, json!([{"key": [scope]}]), "{method} {path}");
                Some(scope.parse().unwrap())
            };
            operations.push((method.to_uppercase().parse().unwrap(), path.clone(), scope));
        }
    }
    operations
}

/// A request to an operation, whose body is right wherever one is asked for.
fn to(client: &Client, method: &Method, path: &str, device: &str) -> RequestBuilder {
    let path = path.replace("{device_id}", device).replace("{key_id}", "999");
    let request = client.request(method.clone(), &path);
    match (method.as_str(), path.as_str()) {
        ("POST", "/api/keys") => request.json(&json!({"scope": "read"})),
        ("POST", "/api/sync-events") => request.json(&json!([event(device)])),
        ("POST", _) => request.json(&event(device)),
        ("PATCH" | "PUT", _) => request.json(&json!({})),
        _ => request,
    }
}

/// Asserts that a request was refused for want of a key, and why.
#[track_caller]
fn unauthorized(answer: &Answer, error: &str) {
    let said = answer.error(401);
    assert!(said.contains(error), "{said}");
    let challenge = answer.header("www-authenticate");
    assert!(challenge.starts_with("Bearer realm=\"pisync\""), "{challenge}");
}

#[track_caller]
fn forbidden(answer: &Answer, error: &str) {
    let said = answer.error(403);
    assert!(said.contains(error), "{said}");
    assert!(answer.header("www-authenticate").contains("insufficient_scope"));
}

async fn every_route_asks_for_its_scope(server: &LockedServer) {
    let admin = server.admin().await;
    let (_, read) = server.key(wish(Scope::Read)).await;
    let (_, ingest) = server.key(wish(Scope::Ingest)).await;
    let own = KeyWish { device_id: Some(device_id("own")), ..wish(Scope::Ingest) };
    let (_, own) = server.key(own).await;
    let soon = KeyWish { expires_at: Some(at(10)), ..wish(Scope::Admin) };
    let (_, expired) = server.key(soon).await;
    let (revoked_id, revoked) = server.key(wish(Scope::Admin)).await;
    server.revoke_elsewhere(revoked_id).await;
    until(async || revoked.get("/api/stats").await.status == 401).await;
    server.0.clock.set(at(10));

    let unknown = pisync::keys::Secret::new([7; 32]);
    let unknown = server.0.with_key(unknown.as_str());
    let mistyped = server.0.with_key("psk_0123");
    let foreign = server.0.with_key("ghp_0123456789");
    let mut open = BTreeSet::new();
    for (method, path, scope) in operations() {
        let ask = async |client: &Client| send(to(client, &method, &path, "pi")).await;
        let Some(scope) = scope else {
            for client in [&server.0, &unknown, &revoked] {
                assert_eq!(ask(client).await.status, 200, "{method} {path}");
            }
            open.insert(path.clone());
            continue;
        };
        let what = format!("{method} {path}");
        unauthorized(&ask(&server.0).await, "A key is needed");
        unauthorized(&ask(&unknown).await, "This key is not known here");
        unauthorized(&ask(&mistyped).await, "mistyped");
        unauthorized(&ask(&foreign).await, "keys begin with psk_");
        unauthorized(&ask(&expired).await, "has expired");
        unauthorized(&ask(&revoked).await, "was revoked");
        let basic = to(&server.0, &method, &path, "pi").basic_auth("pi", Some("pi"));
        unauthorized(&send(basic).await, "Authorization: Bearer");
        for (client, own) in [(&read, Scope::Read), (&ingest, Scope::Ingest)] {
            if !own.opens(scope) {
                forbidden(&ask(client).await, &format!("a key of the scope {}", scope.as_str()));
            }
        }
        // A device's key opens nothing else, and neither the same for another device.
        let expected = if scope == Scope::Ingest { "for other devices" } else { "scope" };
        forbidden(&ask(&own).await, expected);
        if scope != Scope::Ingest {
            forbidden(&send(to(&own, &method, &path, "own")).await, "scope");
        }
        // Who has the right one gets further.
        let right = if scope == Scope::Ingest { &ingest } else { &admin };
        for client in [right, &admin] {
            let status = ask(client).await.status;
            assert!(!matches!(status, 401 | 403 | 405), "{status} for {what}");
        }
        if method == Method::GET {
            unauthorized(&send(to(&server.0, &Method::GET, &path, "pi")).await, "A key is needed");
            let head = send(to(&server.0, &Method::HEAD, &path, "pi")).await;
            assert_eq!(head.status, 401, "HEAD {path}");
        }
    }
    // These, and no other, are for everybody: load balancers have no key.
    assert_eq!(open, ["/health", "/health/live", "/health/ready"].map(str::to_owned).into());
    // What is no secret: that there is nothing, and the documentation.
    server.0.get("/nothing").await.error(404);
    assert_eq!(server.0.get("/api-docs/").await.status, 200);
    send(server.0.request(Method::PUT, "/api/stats")).await.error(405);
    // Nothing was stored for who was refused.
    assert_eq!(admin.get("/api/stats").await.data(200)["total_sync_events"], 4);
}

async fn a_key_of_a_device_reports_for_it_alone(server: &LockedServer) {
    let bound = KeyWish { device_id: Some(device_id("own")), ..wish(Scope::Ingest) };
    let (_, own) = server.key(bound).await;
    own.report(&event("own")).await.data(201);
    forbidden(&own.report(&event("other")).await, "This key is for other devices");
    forbidden(&own.report(&event("own ")).await, "This key is for other devices");
    // What is wrong is told before whose it is.
    own.report(&json!({})).await.details();
    forbidden(&own.get("/api/device/own").await, "scope read");
    forbidden(&own.get("/api/device/own/sync-history").await, "scope read");
    forbidden(&own.delete("/api/device/own").await, "scope admin");
    let admin = server.admin().await;
    assert_eq!(admin.get("/api/stats").await.data(200)["total_sync_events"], 1);
    admin.get("/api/device/other").await.error(404);
}

async fn a_key_of_a_group_reports_for_its_devices(server: &LockedServer) {
    let admin = server.admin().await;
    let of = |group: &str| KeyWish { group: Some(group.to_owned()), ..wish(Scope::Ingest) };
    let (_, north) = server.key(of("north")).await;
    let (_, south) = server.key(of("south")).await;
    // A new device joins the group, in which it stays.
    north.report(&event("new")).await.data(201);
    north.report(&event("new")).await.data(201);
    assert_eq!(admin.get("/api/device/new").await.data(200)["group"], "north");
    forbidden(&south.report(&event("new")).await, "This key is for other devices");
    // A device of no group is nobody's.
    admin.report(&event("old")).await.data(201);
    forbidden(&north.report(&event("old")).await, "This key is for other devices");
    admin.patch("/api/device/old", &json!({"group": "south"})).await.data(200);
    south.report(&event("old")).await.data(201);
    forbidden(&north.report(&event("old")).await, "This key is for other devices");
    assert_eq!(admin.get("/api/stats").await.data(200)["total_sync_events"], 4);
}

async fn what_is_made_or_revoked_elsewhere_counts_within_a_second(server: &LockedServer) {
    let admin = server.admin().await;
    for scope in [Scope::Read, Scope::Admin] {
        let (id, key) = server.key(wish(scope)).await;
        key.get("/api/stats").await.data(200);
        server.revoke_elsewhere(id).await;
        let revoked = Instant::now();
        until(async || key.get("/api/stats").await.status == 401).await;
        // Twice the promise, for a loaded machine: what it rules out is a cache of minutes.
        assert!(revoked.elapsed().as_millis() < 2_000, "{:?}", revoked.elapsed());
        unauthorized(&key.get("/api/stats").await, "This key was revoked");
        // The others are not touched.
        admin.get("/api/stats").await.data(200);
    }
}

async fn an_expired_key_opens_nothing(server: &LockedServer) {
    let (_, key) = server.key(KeyWish { expires_at: Some(at(60)), ..wish(Scope::Read) }).await;
    server.0.clock.set(at(59));
    key.get("/api/stats").await.data(200);
    server.0.clock.set(at(60));
    unauthorized(&key.get("/api/stats").await, "This key has expired");
}

async fn last_use_is_kept_to_the_hour(server: &LockedServer) {
    let (id, key) = server.key(wish(Scope::Read)).await;
    let store = pisync::store::open(&server.0.database.target).await.unwrap();
    let last_used = async || {
        let keys = store.keys().await.unwrap().keys;
        keys.into_iter().find(|key| key.id == id).unwrap().last_used
    };
    // `now` is the full hour.
    until(async || last_used().await == Some(now())).await;
    server.0.clock.set(at(3_599));
    key.get("/api/stats").await.data(200);
    server.0.clock.set(at(3 * 3_600 + 17));
    key.get("/api/stats").await.data(200);
    until(async || last_used().await == Some(at(3 * 3_600))).await;
    // Also what is not let in for want of scope is a use; a refusal for its age is none.
    key.delete("/api/device/pi").await.error(403);
}

/// A database, and a program that is told of it.
struct Installed {
    program: Program,
    database: TestDatabase,
}

impl Fixture for Installed {
    async fn prepare(database: TestDatabase) -> Self {
        let program = Program::new()
            .with("DATABASE_URL", crate::support::program::url(&database.target))
            .with("PORT", 0);
        Self { program, database }
    }

    fn into_database(self) -> TestDatabase {
        self.database
    }
}

/// The key in what `key create` said.
fn shown(said: &str) -> &str {
    let lines: Vec<_> = said.lines().collect();
    assert_eq!(lines.len(), 2, "{said}");
    assert!(lines[0].starts_with("made key "), "{said}");
    assert!(lines[1].starts_with("psk_") && lines[1].len() == 53, "{said}");
    lines[1]
}

async fn the_command_line_makes_lists_and_revokes(installed: &Installed) {
    let Installed { program, database } = installed;
    if matches!(database.target, Target::Postgres(_)) {
        let refused = program.run(&["key", "create", "--scope", "admin"]);
        assert!(refused.failure().contains("run `pisync migrate up` first"), "{refused:?}");
        program.run(&["migrate", "up"]).success();
    }
    let none = program.run(&["key", "list"]);
    assert_eq!(none.success(), "there are no keys yet; make one with `pisync key create`\n");
    let create = |arguments: &[&str]| {
        let ended = program.run(&[&["key", "create", "--scope"], arguments].concat());
        shown(ended.success()).to_owned()
    };
    let admin = create(&["admin", "--name", "the boss", "--expires", "90d"]);
    let serving = program.serve(&["--auth", "required"]);
    // Beside the running server.
    let device = create(&["ingest", "--device", "pi-1"]);
    let group = create(&["ingest", "--group", "school 17"]);
    let client = |key: &str| serving.client.with_key(key);
    until(async || client(&group).get("/api/stats").await.status == 403).await;
    client(&admin).get("/api/stats").await.data(200);
    client(&device).report(&event("pi-1")).await.data(201);
    forbidden(&client(&device).report(&event("pi-2")).await, "for other devices");
    client(&group).report(&event("pi-2")).await.data(201);

    let listed = program.run(&["key", "list"]);
    let lines: Vec<_> = listed.success().lines().collect();
    assert_eq!(lines.len(), 4, "{listed:?}");
    assert!(lines[0].starts_with("NUMBER  KEY        SCOPE   FOR"), "{listed:?}");
    for (line, words) in lines[1..].iter().zip([
        ["1 ", &admin[..8], "admin", "all", "until 20", "the boss"],
        ["2 ", &device[..8], "ingest", "device pi-1", "valid", ""],
        ["3 ", &group[..8], "ingest", "group school 17", "valid", ""],
    ]) {
        assert!(words.iter().all(|word| line.contains(word)), "{words:?} in {line}");
    }
    for key in [&admin, &device, &group] {
        assert!(!listed.stdout.contains(key.as_str()));
    }

    let revoked = program.run(&["key", "revoke", "2", "3"]);
    assert_eq!(revoked.success(), "revoked key 2\nrevoked key 3\n");
    until(async || client(&device).report(&event("pi-1")).await.status == 401).await;
    let again = program.run(&["key", "revoke", "2"]);
    assert_eq!(again.success(), "key 2 was revoked before\n");
    let unknown = program.run(&["key", "revoke", "7", "8"]);
    assert_eq!(unknown.failure(), "no such key: 7, 8; `pisync key list` lists them");
    let listed = program.run(&["key", "list"]);
    assert_eq!(listed.success().matches("revoked 20").count(), 2, "{listed:?}");
    let ended = serving.stop();
    let said = format!("{ended:?}{:?}", program.log("combined.log"));
    for key in [&admin, &device, &group] {
        assert!(!said.contains(key.as_str()), "{said}");
    }
}

#[test]
fn wishes_that_make_no_sense() {
    let program = Program::new();
    for (arguments, code, expected) in [
        (&["--scope", "all"][..], 2, "must be one of [ingest, read, admin]"),
        (&[], 2, "--scope <SCOPE>"),
        (&["--scope", "ingest", "--device", "a", "--group", "b"], 2, "cannot be used with"),
        (
            &["--scope", "read", "--device", "pi"],
            1,
            "device_id is only for keys of the scope ingest",
        ),
        (&["--scope", "admin", "--group", "g"], 1, "group is only for keys of the scope ingest"),
        (&["--scope", "ingest", "--device", ""], 1, "--device is not allowed to be empty"),
        (&["--scope", "read", "--name", "two\nlines"], 1, "--name must not contain control"),
        (&["--scope", "read", "--expires", "soon"], 1, "--expires soon: expected so many hours"),
        (&["--scope", "read", "--expires", "2020-01-01"], 1, "expires_at must be in the future"),
    ] {
        let ended = program.run(&[&["key", "create"], arguments].concat());
        assert_eq!(ended.code(), code, "{ended:?}");
        assert!(ended.stderr.contains(expected), "{ended:?}");
    }
    assert!(program.names_in(".").is_empty(), "nothing was made");
}

async fn no_start_before_the_network_without_an_admin(installed: &Installed) {
    let Installed { program, .. } = installed;
    let setup = program.run(&["db", "setup"]);
    setup.success();
    program.run(&["key", "create", "--scope", "ingest"]).success();
    let refused = program.run(&["serve", "--host", "0.0.0.0"]);
    let expected = "listening on 0.0.0.0:";
    assert!(refused.failure().starts_with(expected), "{refused:?}");
    assert!(
        refused.failure().ends_with(
            "needs a key, and there is none yet: make one with `pisync key create --scope admin`, or let everybody in with AUTH=off"
        ),
        "{refused:?}"
    );
    // Expressly.
    let open = program.serve(&["--host", "0.0.0.0", "--auth", "off"]);
    open.client.get("/api/stats").await.data(200);
    let log = open.stop().stdout;
    assert!(log.contains("whoever reaches the server can read and write everything"), "{log}");
    // With a key: also who comes from this machine is asked for it.
    let made = program.run(&["key", "create", "--scope", "admin"]);
    let key = shown(made.success());
    let guarded = program.serve(&["--host", "0.0.0.0"]);
    unauthorized(&guarded.client.get("/api/stats").await, "A key is needed");
    guarded.client.with_key(key).get("/api/stats").await.data(200);
    guarded.stop();
    // Revoked, it is as if there were none.
    program.run(&["key", "revoke", "2"]).success();
    program.run(&["serve", "--host", "0.0.0.0"]).failure();
}

/// The statuses of requests without a key to a server of its own user, made as given.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_key_only_this_machines_own_user_is_served() {
    let server = TestServer::on_sqlite(|_| {}).await;
    let ask = async |head: &str| -> (u16, String) {
        let mut connection = server.connect().await;
        connection.write(head.replace('\n', "\r\n") + "\r\n\r\n").await;
        let answer = connection.answer().await;
        (answer.status, answer.body)
    };
    for host in ["localhost", "localhost:3000", "127.0.0.1:3000", "[::1]:3000", "LocalHost"] {
        let head = format!("GET /api/stats HTTP/1.1\nhost: {host}");
        assert_eq!(ask(&head).await.0, 200, "{host}");
        let own = format!("{head}\norigin: http://{host}");
        assert_eq!(ask(&own).await.0, 200, "{own}");
    }
    let local = "GET /api/stats HTTP/1.1\nhost: localhost";
    for (head, why) in [
        ("GET /api/stats HTTP/1.1\nhost: pisync.example".to_owned(), "only requests to localhost"),
        (
            "GET /api/stats HTTP/1.1\nhost: localhost.evil.example:3000".to_owned(),
            "only requests to",
        ),
        ("GET /api/stats HTTP/1.1\nhost: 192.168.1.2".to_owned(), "only requests to localhost"),
        ("GET http://evil.example/api/stats HTTP/1.1\nhost: localhost".to_owned(), "only requests"),
        (format!("{local}\nhost: evil.example"), "only requests to localhost"),
        ("GET /api/stats HTTP/1.0\nhost: localhost".to_owned(), "HTTP/1.0 may be a proxy's"),
        (format!("{local}\nx-forwarded-for: 127.0.0.1"), "came through a proxy"),
        (format!("{local}\nx-forwarded-proto: https"), "came through a proxy"),
        (format!("{local}\nforwarded: for=127.0.0.1"), "came through a proxy"),
        (format!("{local}\nx-real-ip: 127.0.0.1"), "came through a proxy"),
        (format!("{local}\nvia: 1.1 proxy"), "came through a proxy"),
        (format!("{local}\ncf-connecting-ip: ::1"), "came through a proxy"),
        (format!("{local}\norigin: https://evil.example"), "a web page elsewhere"),
        (format!("{local}\norigin: null"), "a web page elsewhere"),
        (format!("{local}\norigin: http://localhost:8080"), "a web page elsewhere"),
    ] {
        let (status, body) = ask(&head).await;
        assert_eq!(status, 401, "{head}");
        assert!(body.contains("A key is needed") && body.contains(why), "{head}: {body}");
    }
    // A key opens all of them, and a wrong one is never as good as none.
    let (_, key) = server.database.make_key(wish(Scope::Read)).await;
    let client = server.with_key(&key);
    until(async || client.get("/api/stats").await.status == 200).await;
    let proxied = format!("{local}\nx-forwarded-for: 192.0.2.1\nauthorization: bearer {key}");
    assert_eq!(ask(&proxied).await.0, 200);
    assert_eq!(ask(&format!("{local}\nauthorization: Bearer psk_wrong")).await.0, 401);
    assert_eq!(
        ask(&format!("{local}\nauthorization: Bearer {key}\nauthorization: Bearer {key}")).await.0,
        401
    );
    assert_eq!(ask(&format!("{local}\nauthorization: Bearer")).await.0, 401);
    server.stop().await;
}
