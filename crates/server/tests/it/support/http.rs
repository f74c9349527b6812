//! Requests as clients send them, and the answers taken apart. A raw connection stands beside the
//! well-behaved client, for what that one would never send.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use pisync_core::{Timestamp, ViolationCode};
use reqwest::{Method, RequestBuilder, header::HeaderMap};
use rustls::{ClientConfig, RootCertStore, crypto::ring};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

use super::events::at;

/// No answer may take longer, however loaded the machine is: a server that hangs fails the test.
const PATIENCE: Duration = Duration::from_secs(30);

/// What makes clients that speak HTTP. Left to itself, reqwest would look for the process's cryptography, of which there is
/// none: the program names its own wherever it needs some.
pub(crate) fn client_builder() -> reqwest::ClientBuilder {
    let tls = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(RootCertStore::empty())
        .with_no_client_auth();
    reqwest::Client::builder().tls_backend_preconfigured(tls)
}

/// A well-behaved client of one server.
#[derive(Clone)]
pub(crate) struct Client {
    address: SocketAddr,
    client: reqwest::Client,
    /// Sent with every request.
    key: Option<String>,
}

impl Client {
    pub(crate) fn new(address: SocketAddr) -> Self {
        let client = client_builder()
            .timeout(PATIENCE)
            // What the server does of its own accord is to be seen.
            .redirect(reqwest::redirect::Policy::none())
            .no_gzip()
            .no_brotli()
            .no_proxy()
            .build()
            .unwrap();
        Self { address, client, key: None }
    }

    /// The same client, with a key.
    pub(crate) fn with_key(&self, key: &str) -> Self {
        Self { key: Some(key.to_owned()), ..self.clone() }
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// The address of `path` on the server. Nothing in it is encoded or otherwise put right.
    pub(crate) fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    /// A request to be completed and given to [`send`].
    pub(crate) fn request(&self, method: Method, path: &str) -> RequestBuilder {
        let request = self.client.request(method, self.url(path));
        match &self.key {
            Some(key) => request.bearer_auth(key),
            None => request,
        }
    }

    pub(crate) async fn get(&self, path: &str) -> Answer {
        send(self.request(Method::GET, path)).await
    }

    pub(crate) async fn post(&self, path: &str, body: &Value) -> Answer {
        send(self.request(Method::POST, path).json(body)).await
    }

    pub(crate) async fn patch(&self, path: &str, body: &Value) -> Answer {
        send(self.request(Method::PATCH, path).json(body)).await
    }

    pub(crate) async fn put(&self, path: &str, body: &Value) -> Answer {
        send(self.request(Method::PUT, path).json(body)).await
    }

    pub(crate) async fn delete(&self, path: &str) -> Answer {
        send(self.request(Method::DELETE, path)).await
    }

    /// Reports a sync, with a body that need not be JSON.
    pub(crate) async fn report_text(&self, body: impl Into<reqwest::Body>) -> Answer {
        let request = self.request(Method::POST, "/api/sync-event");
        send(request.header("content-type", "application/json").body(body)).await
    }

    /// Reports a sync, whatever comes of it.
    pub(crate) async fn report(&self, event: &Value) -> Answer {
        self.post("/api/sync-event", event).await
    }

    /// Reports a sync that the server must take, and gives the event as it was stored.
    pub(crate) async fn store(&self, event: &Value) -> Value {
        self.report(event).await.data(201)
    }

    /// A connection of which every byte is the test's own.
    pub(crate) async fn connect(&self) -> RawConnection {
        RawConnection(TcpStream::connect(self.address).await.unwrap())
    }
}

/// Sends a request and takes in the whole answer.
pub(crate) async fn send(request: RequestBuilder) -> Answer {
    try_send(request).await.unwrap_or_else(|error| panic!("no answer: {error:?}"))
}

/// The same where there may be no answer.
pub(crate) async fn try_send(request: RequestBuilder) -> Result<Answer, reqwest::Error> {
    let response = request.send().await?;
    let (status, headers) = (response.status().as_u16(), response.headers().clone());
    Ok(Answer { status, headers, body: response.bytes().await? })
}

/// What came back.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}

impl Answer {
    pub(crate) fn text(&self) -> &str {
        std::str::from_utf8(&self.body).unwrap()
    }

    /// A header that is there exactly once.
    #[track_caller]
    pub(crate) fn header(&self, name: &str) -> &str {
        let values: Vec<_> = self.headers.get_all(name).iter().collect();
        assert_eq!(values.len(), 1, "{name} in {:?}", self.headers);
        values[0].to_str().unwrap()
    }

    /// The whole body of a JSON answer with this status.
    #[track_caller]
    pub(crate) fn json(&self, status: u16) -> Value {
        assert_eq!(self.status, status, "{}", self.text());
        assert_eq!(self.header("content-type"), "application/json");
        serde_json::from_slice(&self.body).unwrap()
    }

    /// The `data` of a successful answer with this status.
    #[track_caller]
    pub(crate) fn data(&self, status: u16) -> Value {
        let mut body = self.json(status);
        assert_eq!(keys(&body), ["data", "message", "success"]);
        assert_eq!(body["success"], true);
        body["data"].take()
    }

    /// The message of an error answer with this status and without details.
    #[track_caller]
    pub(crate) fn error(&self, status: u16) -> String {
        let body = self.json(status);
        assert_eq!(keys(&body), ["code", "error", "success"], "{body}");
        assert_eq!(body["success"], false);
        let codes = codes_of(status);
        assert!(codes.iter().any(|code| body["code"] == *code), "{body} is none of {codes:?}");
        body["error"].as_str().unwrap().to_owned()
    }

    /// The code of an error answer with this status.
    #[track_caller]
    pub(crate) fn code(&self, status: u16) -> String {
        self.json(status)["code"].as_str().expect("a code").to_owned()
    }

    /// The details of an answer to wrong fields, without their codes.
    #[track_caller]
    pub(crate) fn details(&self) -> Value {
        let mut details = self.coded_details();
        for detail in details.as_array_mut().unwrap() {
            detail.as_object_mut().unwrap().remove("code");
        }
        details
    }

    /// The details of an answer to wrong fields.
    #[track_caller]
    pub(crate) fn coded_details(&self) -> Value {
        let mut body = self.json(400);
        assert_eq!(keys(&body), ["code", "details", "error", "success"], "{body}");
        assert_eq!(body["success"], false);
        assert_eq!(body["error"], "Validation failed");
        assert_eq!(body["code"], "validation_failed");
        for detail in body["details"].as_array().unwrap() {
            let code = detail["code"].as_str().expect("a code");
            assert!(ViolationCode::ALL.iter().any(|known| known.as_str() == code), "{detail}");
        }
        body["details"].take()
    }

    /// Each wrong field with the code of what is wrong with it.
    #[track_caller]
    pub(crate) fn wrong_fields(&self) -> Vec<(String, String)> {
        let details = self.coded_details();
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        let pair = |detail: &Value| (text(&detail["field"]), text(&detail["code"]));
        details.as_array().unwrap().iter().map(pair).collect()
    }

    /// The messages in the details, one for each wrong field.
    #[track_caller]
    pub(crate) fn complaints(&self) -> Vec<String> {
        let details = self.details();
        let message = |detail: &Value| detail["message"].as_str().unwrap().to_owned();
        details.as_array().unwrap().iter().map(message).collect()
    }
}

/// The codes that errors of a status have.
fn codes_of(status: u16) -> &'static [&'static str] {
    match status {
        400 => &["malformed_json", "unreadable_body"],
        401 => &["key_required", "key_malformed", "key_unknown", "key_revoked", "key_expired"],
        403 => &["scope_missing", "other_device"],
        404 => &["not_found"],
        405 => &["method_not_allowed"],
        408 => &["body_timeout"],
        409 => &["conflict"],
        413 => &["too_large"],
        415 => &["unsupported_media_type"],
        429 => &["rate_limited"],
        500 => &["internal"],
        503 => &["overloaded", "too_slow", "database_away", "not_replicated", "clock_not_set"],
        _ => &[],
    }
}

/// The names of an object's fields, in order.
#[track_caller]
pub(crate) fn keys(object: &Value) -> Vec<&str> {
    let mut keys: Vec<_> =
        object.as_object().expect("an object").keys().map(String::as_str).collect();
    keys.sort_unstable();
    keys
}

/// One field of each item of a list.
#[track_caller]
pub(crate) fn column(list: &Value, field: &str) -> Vec<Value> {
    list.as_array().expect("a list").iter().map(|item| item[field].clone()).collect()
}

/// A successful sync of one file, with nothing optional.
pub(crate) fn success(device: &str, timestamp: Timestamp) -> Value {
    json!({
        "device_id": device, "timestamp": timestamp, "total_files_synced": 1, "total_errors": 0,
    })
}

/// A sync that met one error.
pub(crate) fn failure(device: &str, timestamp: Timestamp) -> Value {
    with(success(device, timestamp), &json!({"total_files_synced": 0, "total_errors": 1}))
}

/// A successful sync a minute ago.
pub(crate) fn event(device: &str) -> Value {
    success(device, at(-60))
}

/// An object with other fields added to it or put in the place of its own.
pub(crate) fn with(mut object: Value, fields: &Value) -> Value {
    for (name, value) in fields.as_object().unwrap() {
        object[name] = value.clone();
    }
    object
}

/// Bytes to and from a server.
pub(crate) struct RawConnection(TcpStream);

impl RawConnection {
    pub(crate) async fn write(&mut self, bytes: impl AsRef<[u8]>) {
        self.0.write_all(bytes.as_ref()).await.unwrap();
    }

    /// Sends nothing more, as a client does that has hung up half of the line.
    pub(crate) async fn finish_writing(&mut self) {
        self.0.shutdown().await.unwrap();
    }

    /// One answer, which says its length.
    pub(crate) async fn answer(&mut self) -> RawAnswer {
        let mut received = Vec::new();
        let head = loop {
            if let Some(end) = find(&received, b"\r\n\r\n") {
                break end + 4;
            }
            let byte = self
                .byte()
                .await
                .unwrap_or_else(|| panic!("closed after {:?}", String::from_utf8_lossy(&received)));
            received.push(byte);
        };
        let head = String::from_utf8(received[..head].to_vec()).unwrap().to_ascii_lowercase();
        let length = head
            .lines()
            .find_map(|line| line.strip_prefix("content-length: "))
            .map_or(0, |length| length.parse().unwrap());
        let mut body = vec![0; length];
        in_time(self.0.read_exact(&mut body)).await.unwrap();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        RawAnswer { status, head, body: String::from_utf8(body).unwrap() }
    }

    /// One answer, if it begins within this time.
    pub(crate) async fn answer_within(&mut self, time: Duration) -> Option<RawAnswer> {
        match timeout(time, self.0.peek(&mut [0])).await {
            Ok(_) => Some(self.answer().await),
            Err(_) => None,
        }
    }

    /// Everything until the server closes the connection, or breaks it.
    pub(crate) async fn rest(&mut self) -> String {
        let mut received = Vec::new();
        while let Some(byte) = self.byte().await {
            received.push(byte);
        }
        String::from_utf8(received).unwrap()
    }

    /// The next byte; none when there is nothing more to come.
    async fn byte(&mut self) -> Option<u8> {
        in_time(self.0.read_u8()).await.ok()
    }
}

/// An answer as it came over the wire.
#[derive(Debug)]
pub(crate) struct RawAnswer {
    pub(crate) status: u16,
    /// In lower case.
    pub(crate) head: String,
    pub(crate) body: String,
}

async fn in_time<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.expect("the server neither answers nor hangs up")
}

fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    haystack.windows(needle.len()).position(|window| window == needle)
}
