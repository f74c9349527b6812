//! API keys: who gets in where, on both stores; how keys are made and revoked; what the log of changes
//! keeps.

use std::{collections::BTreeSet, time::Instant};

use pisync::{
    config::http::AuthMode,
    keys::{KeyRequest, REFRESH_INTERVAL},
    store::{Scope, Target},
};
use reqwest::{Method, RequestBuilder};
use serde_json::{Value, json};
use tokio::{task::JoinSet, time::sleep};

use crate::support::{
    events::{at, device_id, now},
    http::{Answer, Client, column, event, keys, send, with},
    program::Program,
    server::TestServer,
    store::{Fixture, TestDatabase, key_request},
};

both_stores!(
    every_route_asks_for_its_scope,
    a_key_of_a_device_reports_for_it_alone,
    a_key_of_a_device_sends_batches_of_it_alone,
    what_is_made_elsewhere_counts_at_once,
    made_up_keys_are_refused_however_many_there_are,
    what_is_revoked_elsewhere_counts_within_a_second,
    pages_of_keys,
    an_expired_key_opens_nothing,
    last_use_is_kept_to_the_hour,
    admins_make_list_and_revoke_keys,
    changes_are_in_the_audit_log,
    the_command_line_makes_lists_and_revokes,
    no_start_before_the_network_without_an_admin,
);

/// A server that asks everybody for a key.
pub(crate) struct LockedServer(pub(crate) TestServer);

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
    /// A key that is made beside the server.
    pub(crate) async fn key(&self, key_request: KeyRequest) -> (i64, Client) {
        let made = self.0.database.make_key(key_request).await;
        (made.0, self.0.with_key(&made.1))
    }

    pub(crate) async fn admin(&self) -> Client {
        self.key(key_request(Scope::Admin)).await.1
    }

    /// Revokes a key behind the server's back, as another server does.
    async fn revoke_elsewhere(&self, id: i64) {
        let store = pisync::store::open(&self.0.database.target).await.unwrap();
        store.revoke_key(id, &crate::support::events::somebody()).await.unwrap();
    }
}

/// Waits for a condition that must come true soon.
pub(crate) async fn until(condition: impl AsyncFn() -> bool) {
    let began = Instant::now();
    while !condition().await {
        assert!(began.elapsed().as_secs() < 30, "it does not come true");
        sleep(REFRESH_INTERVAL / 20).await;
    }
}

/// Every operation of the document: method, path, and the scope that it declares; none for what is open
/// to everybody.
fn operations() -> Vec<(Method, String, Option<Scope>)> {
    let document: Value = serde_json::from_str(&pisync::api::openapi_json().unwrap()).unwrap();
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
    // As every answer.
    assert_eq!(answer.header("x-content-type-options"), "nosniff");
    assert!(answer.header("content-security-policy").starts_with("default-src 'none';"));
    let challenge = answer.header("www-authenticate");
    assert!(challenge.starts_with("Bearer realm=\"pisync\""), "{challenge}");
}

#[track_caller]
pub(crate) fn forbidden(answer: &Answer, error: &str) {
    let said = answer.error(403);
    assert!(said.contains(error), "{said}");
    assert!(answer.header("www-authenticate").contains("insufficient_scope"));
}

async fn every_route_asks_for_its_scope(server: &LockedServer) {
    let admin = server.admin().await;
    let (_, read) = server.key(key_request(Scope::Read)).await;
    let (_, ingest) = server.key(key_request(Scope::Ingest)).await;
    let own = KeyRequest { device_id: Some(device_id("own")), ..key_request(Scope::Ingest) };
    let (_, own) = server.key(own).await;
    let soon = KeyRequest { expires_at: Some(at(10)), ..key_request(Scope::Admin) };
    let (_, expired) = server.key(soon).await;
    let (revoked_id, revoked) = server.key(key_request(Scope::Admin)).await;
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
    let bound = KeyRequest { device_id: Some(device_id("own")), ..key_request(Scope::Ingest) };
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

/// One event that the key may not report is a mistake about all of them.
async fn a_key_of_a_device_sends_batches_of_it_alone(server: &LockedServer) {
    let bound = KeyRequest { device_id: Some(device_id("own")), ..key_request(Scope::Ingest) };
    let (_, own) = server.key(bound).await;
    let batch = |devices: &[&str]| Value::Array(devices.iter().map(|name| event(name)).collect());
    for foreign in [&["other"][..], &["own", "own", "other"], &["other", "own"]] {
        let answer = own.post("/api/sync-events", &batch(foreign)).await;
        forbidden(&answer, "This key is for other devices");
    }
    let stored = own.post("/api/sync-events", &batch(&["own", "own"])).await.data(200);
    assert_eq!(stored["accepted"], 2);
    let admin = server.admin().await;
    assert_eq!(admin.get("/api/stats").await.data(200)["total_sync_events"], 2);
    admin.get("/api/device/other").await.error(404);
}

/// The first request with a key is served, whoever made it, and whatever it asks for.
async fn what_is_made_elsewhere_counts_at_once(server: &LockedServer) {
    for round in 0..10 {
        let (_, key) = server.key(key_request(Scope::Read)).await;
        key.get("/api/stats").await.data(200);
        let (_, key) = server.key(key_request(Scope::Ingest)).await;
        key.report(&event(&format!("pi-{round}"))).await.data(201);
        // It is known, and opens what it opens.
        let (_, key) = server.key(key_request(Scope::Ingest)).await;
        assert_eq!(key.get("/api/stats").await.code(403), "scope_missing");
    }
    // One that is revoked before its first use is known, too, unless the server has already heard that it was made.
    let (id, key) = server.key(key_request(Scope::Admin)).await;
    server.revoke_elsewhere(id).await;
    let answer = key.get("/api/stats").await;
    assert!(answer.status == 200 || answer.code(401) == "key_revoked", "{}", answer.text());
}

/// Whoever makes up keys with a right checksum waits for a look at the database, together with the others who do. Nobody
/// else waits.
async fn made_up_keys_are_refused_however_many_there_are(server: &LockedServer) {
    let admin = server.admin().await;
    admin.get("/api/stats").await.data(200);
    let mut guesses = JoinSet::new();
    for guess in 0..200_u8 {
        let client = server.0.with_key(pisync::keys::Secret::new([guess; 32]).as_str());
        guesses.spawn(async move { client.get("/api/stats").await });
    }
    let began = Instant::now();
    let (_, new) = server.key(key_request(Scope::Read)).await;
    new.get("/api/stats").await.data(200);
    while let Some(answer) = guesses.join_next().await {
        let answer = answer.unwrap();
        unauthorized(&answer, "This key is not known here");
        assert_eq!(answer.code(401), "key_unknown");
    }
    // One after the other, 50 ms apart, they would take 10 s.
    assert!(began.elapsed().as_secs() < 8, "{:?}", began.elapsed());
}

async fn pages_of_keys(server: &LockedServer) {
    let admin = server.admin().await;
    for _ in 0..4 {
        server.key(key_request(Scope::Read)).await;
    }
    let (mut ids, mut cursor) = (Vec::new(), String::new());
    loop {
        let page = admin.get(&format!("/api/keys?limit=2{cursor}")).await.data(200);
        ids.extend(column(&page["keys"], "id"));
        let pagination = &page["pagination"];
        assert_eq!((&pagination["total"], &pagination["total_keys"]), (&json!(5), &json!(5)));
        let Some(next) = pagination["next_cursor"].as_str() else { break };
        cursor = format!("&cursor={next}");
    }
    assert_eq!(json!(ids), json!([1, 2, 3, 4, 5]));
    for (query, complaint) in [
        ("cursor=x", "\"cursor\" must be a next_cursor of this list"),
        ("cursor=0", "\"cursor\" must be a next_cursor of this list"),
        ("curser=1", "\"curser\" is not allowed"),
    ] {
        let complaints = admin.get(&format!("/api/keys?{query}")).await.complaints();
        assert_eq!(complaints, [complaint], "{query}");
    }
}

async fn what_is_revoked_elsewhere_counts_within_a_second(server: &LockedServer) {
    let admin = server.admin().await;
    for scope in [Scope::Read, Scope::Admin] {
        let (id, key) = server.key(key_request(scope)).await;
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
    let (_, key) =
        server.key(KeyRequest { expires_at: Some(at(60)), ..key_request(Scope::Read) }).await;
    server.0.clock.set(at(59));
    key.get("/api/stats").await.data(200);
    server.0.clock.set(at(60));
    unauthorized(&key.get("/api/stats").await, "This key has expired");
}

async fn last_use_is_kept_to_the_hour(server: &LockedServer) {
    let (id, key) = server.key(key_request(Scope::Read)).await;
    let store = pisync::store::open(&server.0.database.target).await.unwrap();
    let last_used = async || {
        let keys = store.keys().await.unwrap().keys;
        keys.into_iter().find(|key| key.id == id).unwrap().last_used
    };
    // `now` is the full hour.
    key.get("/api/stats").await.data(200);
    until(async || last_used().await == Some(now())).await;
    server.0.clock.set(at(3_599));
    key.get("/api/stats").await.data(200);
    server.0.clock.set(at(3 * 3_600 + 17));
    key.get("/api/stats").await.data(200);
    until(async || last_used().await == Some(at(3 * 3_600))).await;
    // Also what is not let in for want of scope is a use; a refusal for its age is none.
    key.delete("/api/device/pi").await.error(403);
}

async fn admins_make_list_and_revoke_keys(server: &LockedServer) {
    let admin = server.admin().await;
    let key_request =
        json!({"scope": "ingest", "device_id": "pi-1", "name": "Ω", "expires_at": at(60)});
    let answer = admin.post("/api/keys", &key_request).await;
    assert_eq!(answer.header("cache-control"), "no-store");
    let made = answer.data(201);
    assert_eq!(keys(&made), ["id", "key"]);
    let key = made["key"].as_str().unwrap();
    // At once.
    let client = server.0.with_key(key);
    client.report(&event("pi-1")).await.data(201);
    forbidden(&client.report(&event("pi-2")).await, "for other devices");

    let answer = admin.get("/api/keys").await;
    assert!(!answer.text().contains(key));
    let listed = answer.data(200);
    assert_eq!(
        listed["pagination"],
        json!({"limit": 50, "offset": 0, "total": 2, "total_keys": 2, "next_cursor": null})
    );
    let expected = json!({
        "id": 2, "hint": key[..8], "name": "Ω", "scope": "ingest", "device_id": "pi-1", "group": null,
        "created_at": now(), "expires_at": at(60), "revoked_at": null, "last_used": null,
    });
    // The use may not be noted yet; that it will be, and how, is tested by itself.
    let mut listed = listed["keys"][1].clone();
    let last_used = listed["last_used"].take();
    assert!(last_used.is_null() || last_used == json!(now()), "{last_used}");
    assert_eq!(listed, expected);
    let second = admin.get("/api/keys?limit=1&offset=1").await.data(200);
    assert_eq!(second["keys"].as_array().unwrap().len(), 1);
    assert_eq!(second["keys"][0]["id"], 2);

    for _ in 0..2 {
        assert_eq!(admin.delete("/api/key/2").await.data(200), json!({"id": 2}));
        unauthorized(&client.report(&event("pi-1")).await, "This key was revoked");
    }
    assert_eq!(
        admin.get("/api/keys?offset=1").await.data(200)["keys"][0]["revoked_at"],
        json!(now())
    );
    assert_eq!(admin.delete("/api/key/99").await.error(404), "Key not found");
    for wrong in ["0", "-1", "x", "1e3", "%00"] {
        let complaints = admin.delete(&format!("/api/key/{wrong}")).await.complaints();
        assert_eq!(complaints, ["\"key_id\" must be a positive number"], "{wrong}");
    }
    for (wrong, complaints) in [
        (json!({}), &["\"scope\" is required"][..]),
        (json!({"scope": null}), &["\"scope\" must be a string"]),
        (json!({"scope": "root"}), &["\"scope\" must be one of [ingest, read, admin]"]),
        (
            json!({"scope": "read", "device_id": "pi"}),
            &["\"device_id\" is only for keys of the scope ingest"],
        ),
        (
            json!({"scope": "ingest", "device_id": "pi", "group": "g"}),
            &["\"group\" cannot stand beside \"device_id\""],
        ),
        (json!({"scope": "read", "expires_at": at(0)}), &["\"expires_at\" must be in the future"]),
        (
            json!({"scope": 1, "name": "", "expires_at": "soon", "expires": "90d"}),
            &[
                "\"scope\" must be a string",
                "\"name\" is not allowed to be empty",
                "\"expires_at\" must be in ISO 8601 date format",
                "\"expires\" is not allowed",
            ],
        ),
        (
            json!({"scope": "all", "device_id": "pi", "group": "g", "expires_at": at(0)}),
            &[
                "\"scope\" must be one of [ingest, read, admin]",
                "\"group\" cannot stand beside \"device_id\"",
                "\"expires_at\" must be in the future",
            ],
        ),
        (
            json!({"scope": "read", "device_id": "pi", "group": "g", "expires_at": at(0)}),
            &[
                "\"device_id\" is only for keys of the scope ingest",
                "\"group\" is only for keys of the scope ingest",
                "\"group\" cannot stand beside \"device_id\"",
                "\"expires_at\" must be in the future",
            ],
        ),
        (json!([]), &["\"value\" must be of type object"]),
    ] {
        assert_eq!(admin.post("/api/keys", &wrong).await.complaints(), complaints, "{wrong}");
    }
    assert_eq!(admin.get("/api/keys").await.data(200)["pagination"]["total_keys"], 2);
}

async fn changes_are_in_the_audit_log(server: &LockedServer) {
    let admin = server.admin().await;
    admin.report(&event("pi")).await.data(201);
    server.0.clock.set(at(1));
    let change = json!({"name": "Library", "group": null});
    admin.patch("/api/device/pi", &change).await.data(200);
    let made = admin.post("/api/keys", &json!({"scope": "read", "name": "n"})).await.data(201);
    admin.delete("/api/key/2").await.data(200);
    // What changes nothing leaves nothing.
    admin.delete("/api/key/2").await.data(200);
    admin.delete("/api/device/nobody").await.error(404);
    admin.patch("/api/device/nobody", &json!({})).await.error(404);
    admin.delete("/api/device/pi").await.data(200);
    let answer = admin.get("/api/audit").await;
    assert!(!answer.text().contains(made["key"].as_str().unwrap()));
    let log = answer.data(200);
    assert_eq!(log["next_before"], Value::Null);
    let by_key = json!({"at": at(1), "via": "key", "key_id": 1, "address": "127.0.0.1"});
    let hint = &made["key"].as_str().unwrap()[..8];
    let expected = [
        json!({"action": "device.delete", "subject": "pi", "details": {"deleted_events": 1}}),
        json!({"action": "key.revoke", "subject": "2", "details": {}}),
        json!({"action": "key.create", "subject": "2", "details": {
            "hint": hint, "name": "n", "scope": "read", "device_id": null, "group": null, "expires_at": null,
        }}),
        json!({"action": "device.update", "subject": "pi", "details": change}),
    ];
    let entries = log["entries"].as_array().unwrap();
    assert_eq!(entries.len(), 5, "{log}");
    for (entry, expected) in entries.iter().zip(&expected) {
        let expected = with(with(expected.clone(), &by_key), &json!({"id": entry["id"]}));
        assert_eq!(*entry, expected);
    }
    let first = &entries[4];
    assert_eq!(first["action"], "key.create");
    assert_eq!(first["via"], "command line");
    assert_eq!((&first["key_id"], &first["address"]), (&Value::Null, &Value::Null));
    // Page by page.
    let mut paged = Vec::new();
    let mut rest = String::new();
    loop {
        let page = admin.get(&format!("/api/audit?limit=2{rest}")).await.data(200);
        paged.extend(page["entries"].as_array().unwrap().clone());
        let pagination = &page["pagination"];
        assert_eq!((&pagination["limit"], &pagination["offset"]), (&json!(2), &json!(0)));
        assert_eq!(pagination["total"], 5);
        let Some(next) = page["next_before"].as_i64() else {
            assert_eq!(pagination["next_cursor"], Value::Null);
            break;
        };
        assert_eq!(pagination["next_cursor"], next.to_string());
        // Both names say the same.
        let name = if paged.len() == 2 { "before" } else { "cursor" };
        rest = format!("&{name}={next}");
    }
    assert_eq!(&paged, entries);
    // The last page is full, and yet the last.
    let page = admin.get("/api/audit?limit=5").await.data(200);
    assert_eq!(page["next_before"], Value::Null);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn so_many_requests_a_minute_with_a_key() {
    let limited = TestServer::on_sqlite(|settings| {
        settings.auth = AuthMode::Required;
        (settings.sync_per_minute, settings.api_per_minute) = (2, 1);
        settings.key_per_minute = 5;
    })
    .await;
    let (_, admin) = limited.database.make_key(key_request(Scope::Admin)).await;
    let (_, other) = limited.database.make_key(key_request(Scope::Read)).await;
    let (admin, other) = (limited.with_key(&admin), limited.with_key(&other));
    // Measurements are not counted.
    until(async || admin.get("/metrics").await.status == 200).await;
    until(async || other.get("/metrics").await.status == 200).await;
    for remaining in ["4", "3", "2", "1", "0"] {
        let answer = admin.report(&event("pi")).await;
        answer.data(201);
        assert_eq!(answer.header("ratelimit-remaining"), remaining);
        assert_eq!(answer.header("ratelimit-limit"), "5");
    }
    for answer in [admin.get("/api/stats").await, admin.report(&event("pi")).await] {
        let error = "Too many requests with this key, please try again later";
        assert_eq!(answer.error(429), error);
        assert!(answer.headers.contains_key("retry-after"));
    }
    // Each key has an account of its own, and so has the address without one.
    other.get("/api/stats").await.data(200);
    unauthorized(&limited.get("/api/stats").await, "A key is needed");
    assert!(limited.get("/api/stats").await.error(429).contains("from this IP"));
    unauthorized(&limited.with_key("psk_no").report(&event("pi")).await, "mistyped");
    limited.stop().await;
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

async fn the_command_line_makes_lists_and_revokes(installed: &Installed) {
    let Installed { program, database } = installed;
    if matches!(database.target, Target::Postgres(_)) {
        let refused = program.run(&["key", "create", "--scope", "admin"]);
        assert!(refused.failure().contains("run `pisync migrate up` first"), "{refused:?}");
    }
    program.run(&["migrate", "up"]).success();
    let none = program.run(&["key", "list"]);
    assert_eq!(none.success(), "there are no keys yet; make one with `pisync key create`\n");
    let create = |arguments: &[&str]| {
        let ended = program.run(&[&["key", "create", "--scope"], arguments].concat());
        ended.made_key().to_owned()
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
            2,
            "device_id is only for keys of the scope ingest",
        ),
        (
            &["--scope", "admin", "--group", "g", "--expires", "2020-01-01"],
            2,
            "group is only for keys of the scope ingest; expires_at must be in the future",
        ),
        (&["--scope", "ingest", "--device", ""], 2, "--device is not allowed to be empty"),
        (&["--scope", "read", "--name", "two\nlines"], 2, "--name must not contain control"),
        (&["--scope", "read", "--expires", "soon"], 2, "--expires soon: expected so many hours"),
        (&["--scope", "read", "--expires", "2020-01-01"], 2, "expires_at must be in the future"),
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
    program.run(&["key", "create", "--scope", "ingest"]).made_key();
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
    let key = made.made_key();
    let guarded = program.serve(&["--host", "0.0.0.0"]);
    unauthorized(&guarded.client.get("/api/stats").await, "A key is needed");
    guarded.client.with_key(key).get("/api/stats").await.data(200);
    guarded.stop();
    // Revoked, it is as if there were none.
    program.run(&["key", "revoke", "2"]).success();
    program.run(&["serve", "--host", "0.0.0.0"]).failure();
}

/// Hourly jobs all start at the full hour, and a school's devices share an address: with the defaults.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fleet_of_5_000_reports_within_a_minute_with_one_key() {
    let program = Program::new().with("PORT", 0);
    program.run(&["db", "setup"]).success();
    let made = program.run(&["key", "create", "--scope", "ingest"]);
    let serving = program.serve(&["--auth", "required"]);
    let client = serving.client.with_key(made.made_key());
    let began = Instant::now();
    let mut reporters = JoinSet::new();
    for reporter in 0..20 {
        let client = client.clone();
        reporters.spawn(async move {
            for number in 0..250 {
                client.store(&event(&format!("pi-{reporter}-{number}"))).await;
            }
        });
    }
    reporters.join_all().await;
    // Else the limit would have had time to let more in.
    assert!(began.elapsed().as_secs() < 60, "{:?}", began.elapsed());
    serving.stop();
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
    let (_, key) = server.database.make_key(key_request(Scope::Read)).await;
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
