//! Requests that were let in with a key, and go on after it was revoked, has expired or was narrowed: nothing more is
//! read or stored with it. No store has a part in this.

use pisync::{
    config::http::AuthMode,
    keys::KeyRequest,
    store::{Scope, Store},
};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream},
};

use crate::{
    ingest::until,
    support::{
        events::{at, somebody},
        http::{Client, event},
        server::TestServer,
        store::key_request,
    },
    sync_history::store_long_history,
};

async fn locked() -> TestServer {
    TestServer::on_sqlite(|settings| settings.auth = AuthMode::Required).await
}

/// A key that the server knows by now.
async fn key(server: &TestServer, key_request: KeyRequest) -> (i64, String, Client) {
    let (id, key) = server.database.make_key(key_request).await;
    let client = server.with_key(&key);
    until(async || client.get("/api/stats").await.status != 401).await;
    (id, key, client)
}

async fn store(server: &TestServer) -> std::sync::Arc<dyn Store> {
    pisync::store::open(&server.database.target).await.unwrap()
}

/// How a key is lost.
#[derive(Debug, Clone, Copy)]
enum Loss {
    Revoked,
    Expired,
    /// To another scope, as only SQL can.
    Narrowed,
    /// Its row is gone.
    Removed,
}

impl Loss {
    const ALL: [Self; 4] = [Self::Revoked, Self::Expired, Self::Narrowed, Self::Removed];

    /// A key that can be lost so.
    fn of(self, scope: Scope) -> KeyRequest {
        let expires_at = matches!(self, Self::Expired).then(|| at(60));
        KeyRequest { expires_at, ..key_request(scope) }
    }

    /// Takes the key away and returns when the server knows.
    async fn happen(self, server: &TestServer, scope: Scope, id: i64, client: &Client) {
        let change = match self {
            Self::Revoked => {
                store(server).await.revoke_key(id, &somebody()).await.unwrap();
                String::new()
            }
            Self::Expired => {
                server.clock.set(at(60));
                String::new()
            }
            Self::Narrowed => {
                format!(
                    "update api_keys set scope = iif(scope = 'read', 'ingest', 'read') where id = {id};"
                )
            }
            Self::Removed => format!("delete from api_keys where id = {id};"),
        };
        let count = "update api_key_changes set version = version + 1";
        server.database.execute(&format!("{change}{count}")).await;
        until(async || {
            let (read, reported) =
                (client.get("/api/stats").await, client.report(&json!({})).await);
            // A refusal of the body would mean that the key still opens it.
            match (self, scope) {
                (Self::Narrowed, Scope::Read) => read.status == 403,
                // It reports nothing either way.
                (Self::Narrowed, Scope::Operate) => {
                    client.patch("/api/device/nobody", &json!({})).await.status == 403
                }
                (Self::Narrowed, _) => reported.status == 403,
                _ => read.status == 401 && reported.status == 401,
            }
        })
        .await;
    }
}

/// Begins to read a history of more than fits between server and client.
async fn begin_reading(server: &TestServer, version: &str, accept: &str, key: &str) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(64 << 10).unwrap();
    let mut connection = socket.connect(server.address()).await.unwrap();
    let request = format!(
        "GET /api/device/pi/sync-history {version}\r\nhost: pisync\r\naccept: {accept}\r\n\
         authorization: Bearer {key}\r\nconnection: close\r\n\r\n"
    );
    connection.write_all(request.as_bytes()).await.unwrap();
    let mut beginning = vec![0; 32 << 10];
    connection.read_exact(&mut beginning).await.unwrap();
    assert!(beginning.starts_with(format!("{version} 200").as_bytes()));
    connection
}

/// What comes until the connection ends.
async fn rest(mut connection: TcpStream) -> String {
    let mut text = Vec::new();
    // Whether it is closed or broken says nothing of HTTP/1.0.
    let _ = connection.read_to_end(&mut text).await;
    String::from_utf8_lossy(&text).into_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_is_visibly_broken_off() {
    const EVENTS: i64 = 5_000;
    let server = locked().await;
    store_long_history(&server, EVENTS).await;
    let (_, admin_key, admin) = key(&server, key_request(Scope::Admin)).await;
    let ways =
        [("HTTP/1.1", "text/csv"), ("HTTP/1.0", "text/csv"), ("HTTP/1.1", "application/x-ndjson")];
    let check = |text: &str, version: &str, why: &str| {
        assert!(!text.ends_with("\r\n0\r\n\r\n"), "the last chunk has come");
        assert!(text.lines().count() < 4_900, "all of it came");
        // There the connection does not tell.
        if version == "HTTP/1.0" {
            let last = text.lines().last().unwrap();
            assert!(last.starts_with("\"broken off: ") && last.ends_with(why), "{last}");
        }
    };
    for loss in Loss::ALL {
        let (id, secret, client) = key(&server, loss.of(Scope::Read)).await;
        let mut readers = Vec::new();
        for (version, accept) in ways {
            readers.push(begin_reading(&server, version, accept, &secret).await);
        }
        let unharmed = begin_reading(&server, "HTTP/1.1", "text/csv", &admin_key).await;
        loss.happen(&server, Scope::Read, id, &client).await;
        for ((version, _), reader) in ways.iter().zip(readers) {
            check(&rest(reader).await, version, "the key no longer opens this");
        }
        let all = rest(unharmed).await;
        assert!(all.ends_with("\r\n0\r\n\r\n") && !all.contains("broken off"), "{loss:?}");
    }
    // A device that goes takes its history with it: what was sent of that is not all there was.
    let reader = begin_reading(&server, "HTTP/1.0", "text/csv", &admin_key).await;
    admin.delete("/api/device/pi").await.data(200);
    check(&rest(reader).await, "HTTP/1.0", "the device was deleted");
    server.stop().await;
}

/// Where a body is on its way while the key is lost.
fn uploads() -> [(&'static str, &'static str, Scope, Value); 4] {
    [
        ("POST", "/api/sync-event", Scope::Ingest, event("pi")),
        ("POST", "/api/sync-events", Scope::Ingest, json!([event("pi"), event("pi")])),
        ("POST", "/api/keys", Scope::Admin, json!({"scope": "admin"})),
        ("PATCH", "/api/device/known", Scope::Operate, json!({"name": "x"})),
    ]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_still_being_sent_is_not_taken() {
    let server = locked().await;
    let (_, _, admin) = key(&server, key_request(Scope::Admin)).await;
    admin.report(&event("known")).await.data(201);
    for loss in Loss::ALL {
        for (method, path, scope, body) in uploads() {
            let (id, secret, client) = key(&server, loss.of(scope)).await;
            let mut connection = server.connect().await;
            let body = body.to_string();
            let (first, second) = body.split_at(body.len() / 2);
            let head = format!(
                "{method} {path} HTTP/1.1\r\nhost: pisync\r\ncontent-type: application/json\r\n\
                 authorization: Bearer {secret}\r\ncontent-length: {}\r\nexpect: 100-continue\r\n\r\n",
                body.len()
            );
            connection.write(head).await;
            // It has been let in.
            assert_eq!(connection.answer().await.status, 100);
            connection.write(first).await;
            loss.happen(&server, scope, id, &client).await;
            connection.write(second).await;
            let answer = connection.answer().await;
            let expected = if matches!(loss, Loss::Narrowed) { 403 } else { 401 };
            assert_eq!(answer.status, expected, "{loss:?} {method} {path}: {}", answer.body);
            // For those that expire at it.
            server.clock.set(at(0));
        }
    }
    assert_eq!(admin.get("/api/stats").await.data(200)["total_sync_events"], 1);
    assert_eq!(admin.get("/api/device/known").await.data(200)["name"], Value::Null);
    let made = admin.get("/api/keys").await.data(200)["pagination"]["total_keys"].take();
    assert_eq!(made, 1 + 4 * uploads().len() - 4);
    server.stop().await;
}
