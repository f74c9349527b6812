//! Who gets in where, with which key and without one, on both stores.

use std::collections::BTreeSet;
use std::time::Instant;

use pisync::config::http::AuthMode;
use pisync::keys::KeyRequest;
use pisync::store::Scope;
use reqwest::{Method, RequestBuilder};
use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::support::events::{at, device_id, now};
use crate::support::http::{Client, event, send};
use crate::support::locked_server::{LockedServer, forbidden, unauthorized, until};
use crate::support::program::Program;
use crate::support::server::TestServer;
use crate::support::store::key_request;

both_stores!(
    every_route_asks_for_its_scope,
    a_key_of_a_device_reports_for_it_alone,
    a_key_of_a_device_sends_batches_of_it_alone,
    what_is_made_elsewhere_counts_at_once,
    made_up_keys_are_refused_however_many_there_are,
    what_is_revoked_elsewhere_counts_within_a_second,
    an_expired_key_opens_nothing,
    last_use_is_kept_to_the_hour,
);

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
    let path = path
        .replace("{device_id}", device)
        .replace("{key_id}", "999")
        .replace("{window_id}", "999")
        .replace("{channel_id}", "999")
        .replace("{incident_id}", "999")
        .replace("{name}", "nobody");
    let request = client.request(method.clone(), &path);
    match (method.as_str(), path.as_str()) {
        ("POST", "/api/keys") => request.json(&json!({"scope": "read"})),
        ("POST", "/api/sync-start") => request.json(&json!({"device_id": device})),
        ("POST", "/api/incident/999/acknowledge") => request.json(&json!({})),
        ("POST", "/api/sync-events") => request.json(&json!([event(device)])),
        ("POST", _) => request.json(&event(device)),
        ("PATCH" | "PUT", _) => request.json(&json!({})),
        _ => request,
    }
}

async fn every_route_asks_for_its_scope(server: &LockedServer) {
    let admin = server.admin().await;
    let (_, read) = server.key(key_request(Scope::Read)).await;
    let (_, operate) = server.key(key_request(Scope::Operate)).await;
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
        for (client, own) in
            [(&read, Scope::Read), (&operate, Scope::Operate), (&ingest, Scope::Ingest)]
        {
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
        let right = match scope {
            Scope::Ingest => vec![&ingest],
            Scope::Read => vec![&read, &operate],
            Scope::Operate => vec![&operate],
            Scope::Admin => vec![],
        };
        for client in right.into_iter().chain([&admin]) {
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

/// A school's devices share one address. Each has a new key of its own, and somebody there guesses keys.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn new_keys_are_not_kept_out_by_the_limit_of_their_address() {
    let server = TestServer::on_sqlite(|settings| {
        settings.auth = AuthMode::Required;
        (settings.sync_per_minute, settings.api_per_minute) = (2, 2);
    })
    .await;
    let guess = server.with_key(pisync::keys::Secret::new([7; 32]).as_str());
    for status in [401, 401, 429, 429] {
        guess.report(&event("pi")).await.error(status);
    }
    for number in 0..10 {
        let (_, key) = server.database.make_key(key_request(Scope::Ingest)).await;
        let device = server.with_key(&key);
        device.report(&event(&format!("pi-{number}"))).await.data(201);
    }
    guess.report(&event("pi")).await.error(429);
    // Nor can they be guessed where requests are not counted.
    for status in [401, 401, 429, 429] {
        guess.get("/metrics").await.error(status);
    }
    let (_, key) = server.database.make_key(key_request(Scope::Read)).await;
    assert_eq!(server.with_key(&key).get("/metrics").await.status, 200);
    server.stop().await;
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
