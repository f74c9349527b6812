//! Channels against servers that behave as the services do, and against those that do not behave. Signatures are verified by
//! another implementation of Standard Webhooks. `channel_mail` has the tests of e-mail.

use std::{
    future::Future,
    io,
    net::IpAddr,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use ipnet::IpNet;
use pisync::{
    notify::{
        channels::{
            Attempt, ChannelConfig, ChannelKind, Delivery, Rendered, SigningSecret, Verdict,
        },
        message::{Message, MessageEvent, MessageItem, MessageKind},
        sender::{ProxyUrl, Sender, SenderSettings},
        targets::Targets,
    },
    random::Randomness,
};
use pisync_core::Timestamp;
use reqwest::Url;
use rustls::{
    ServerConfig,
    crypto::ring,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
};
use serde_json::{Map, Value, json};
use standardwebhooks::Webhook;
use tempfile::TempDir;

use crate::support::receiver::{Receiver, Reply, now};

/// How long the senders of these tests wait for an answer that never comes.
const SHORT: Duration = Duration::from_millis(600);

/// What is longer than any test that waits for nothing.
pub(crate) const LONG: Duration = Duration::from_secs(20);

fn at(text: &str) -> Timestamp {
    Timestamp::parse_iso8601(text).unwrap()
}

pub(crate) fn incident(event: MessageEvent, subject: &str) -> MessageItem {
    MessageItem {
        event,
        id: 812,
        scope: "group".into(),
        subject: subject.into(),
        kind: "silent".into(),
        severity: "critical".into(),
        since: at("2026-03-02T10:30:00Z"),
        resolution: None,
        lasted_seconds: None,
        affected: 199,
        judged: 200,
        last_heard: Some(at("2026-03-02T09:00:10Z")),
        members: vec!["pi-001".into()],
        members_total: 199,
    }
}

pub(crate) fn message() -> Message {
    Message {
        kind: MessageKind::Incidents,
        at: at("2026-03-02T10:31:00Z"),
        group: Some("school-17".into()),
        items: vec![incident(MessageEvent::Opened, "school-17")],
        items_total: 1,
        states: None,
        base_url: Some("https://fleet.example".into()),
    }
}

/// The line that is in every message for people.
const LINE: &str = "school-17: 199 of 200 devices silent, last heard 09:00 UTC";

fn object(value: &Value) -> Map<String, Value> {
    value.as_object().unwrap().clone()
}

pub(crate) fn channel(kind: ChannelKind, fields: &Value) -> ChannelConfig {
    ChannelConfig::read(kind, &object(fields), None).unwrap()
}

/// A channel of each kind that speaks HTTP, at a receiver.
fn http_channel(kind: ChannelKind, receiver: &Receiver) -> ChannelConfig {
    let url = receiver.url("/services/T0000/s3cretpath0123");
    let fields = match kind {
        ChannelKind::Webhook => json!({
            "url": url, "signing_secret": SECRET, "headers": {"x-token": "s3cret-header-0123"},
        }),
        ChannelKind::Slack | ChannelKind::Discord | ChannelKind::Teams => json!({"url": url}),
        ChannelKind::Ntfy => {
            json!({"server": receiver.url("/"), "topic": "s3cret_topic", "token": "tk_s3cret0123456"})
        }
        ChannelKind::Telegram => {
            json!({"bot_token": "123456:s3crettelegramtoken", "chat_id": "-100123", "thread_id": 7})
        }
        ChannelKind::Email => panic!("mail is not sent by HTTP"),
    };
    channel(kind, &fields)
}

const HTTP_KINDS: [ChannelKind; 6] = [
    ChannelKind::Webhook,
    ChannelKind::Slack,
    ChannelKind::Discord,
    ChannelKind::Teams,
    ChannelKind::Ntfy,
    ChannelKind::Telegram,
];

const SECRET: &str = "whsec_czNjcmV0LXNpZ25pbmcta2V5LTAxMjM0NTY3";

fn here() -> Vec<IpNet> {
    vec!["127.0.0.0/8".parse().unwrap(), "::1/128".parse().unwrap()]
}

fn settings() -> SenderSettings {
    SenderSettings { allowed: here(), ..SenderSettings::default() }
}

/// A sender that reaches this machine, and for which `receiver` stands for Telegram.
fn sender_to(receiver: &Receiver) -> Sender {
    let telegram = Url::parse(&receiver.url("/")).unwrap();
    Sender::new(SenderSettings { telegram: Some(telegram), ..settings() }).unwrap()
}

fn impatient_to(receiver: &Receiver) -> Sender {
    let telegram = Some(Url::parse(&receiver.url("/")).unwrap());
    Sender::new(SenderSettings { telegram, attempt_timeout: SHORT, ..settings() }).unwrap()
}

/// Delivers what was rendered.
pub(crate) async fn deliver(
    channel: &ChannelConfig,
    rendered: &Rendered,
    sender: &Sender,
) -> Delivery {
    let attempt = Attempt {
        id: "msg_1",
        content_type: &rendered.content_type,
        body: &rendered.body,
        is_plain: false,
        at: now(),
    };
    let delivery = channel.deliver(&attempt, sender).await;
    let shown = format!("{delivery:?}");
    assert!(!shown.contains("s3cret"), "{shown}");
    delivery
}

pub(crate) async fn send(channel: &ChannelConfig, sender: &Sender) -> Delivery {
    deliver(channel, &channel.render(&message(), None), sender).await
}

/// The parts of a failure: status, error, seconds to wait, verdict.
pub(crate) fn failure(delivery: Delivery) -> (Option<u16>, String, Option<f64>, Verdict) {
    match delivery {
        Delivery::Failed { status, error, retry_after, verdict } => {
            (status, error, retry_after.map(|wait| wait.as_secs_f64()), verdict)
        }
        Delivery::Delivered { status } => panic!("it was delivered: {status}"),
    }
}

#[tokio::test]
async fn each_service_gets_what_it_understands() {
    for kind in HTTP_KINDS {
        let receiver = Receiver::start(|_| Reply::status("200 OK")).await;
        let delivery = send(&http_channel(kind, &receiver), &sender_to(&receiver)).await;
        assert_eq!(delivery, Delivery::Delivered { status: 200 }, "{kind:?}");
        let received = receiver.only();
        let line = match kind {
            ChannelKind::Discord => "POST /services/T0000/s3cretpath0123?wait=true",
            ChannelKind::Ntfy => "POST /",
            ChannelKind::Telegram => "POST /bot123456:s3crettelegramtoken/sendMessage",
            _ => "POST /services/T0000/s3cretpath0123",
        };
        assert_eq!(received.line, line);
        assert_eq!(received.header("content-type"), "application/json");
        assert_eq!(received.header("user-agent"), concat!("pisync/", env!("CARGO_PKG_VERSION")));
        for header in ["cookie", "referer", "accept-encoding"] {
            assert!(!received.headers.contains_key(header), "{kind:?}: {header}");
        }
        let body = received.json();
        let text = match kind {
            ChannelKind::Webhook => &body["data"]["text"],
            ChannelKind::Discord => &body["content"],
            ChannelKind::Teams => {
                &body["attachments"][0]["content"]["body"][0]["inlines"][0]["text"]
            }
            ChannelKind::Ntfy => &body["title"],
            _ => &body["text"],
        };
        let text = text.as_str().unwrap().replace('\\', "");
        assert!(text.contains(LINE), "{kind:?}: {body}");
        match kind {
            ChannelKind::Ntfy => {
                assert_eq!(
                    (&body["topic"], &body["priority"]),
                    (&json!("s3cret_topic"), &json!(5))
                );
                assert_eq!(received.header("authorization"), "Bearer tk_s3cret0123456");
            }
            ChannelKind::Telegram => {
                assert_eq!(
                    (&body["chat_id"], &body["message_thread_id"]),
                    (&json!("-100123"), &json!(7))
                );
            }
            ChannelKind::Webhook => assert_eq!(received.header("x-token"), "s3cret-header-0123"),
            _ => {}
        }
    }
}

#[tokio::test]
async fn a_service_that_is_asked_too_often_says_how_long_to_wait() {
    type Limited = (ChannelKind, &'static str, &'static str, f64);
    let cases: [Limited; 5] = [
        (ChannelKind::Webhook, "retry-after: 120\r\n", "", 120.0),
        (ChannelKind::Slack, "retry-after: 30\r\n", "rate_limited", 30.0),
        (
            ChannelKind::Discord,
            "content-type: application/json\r\n",
            r#"{"message": "You are being rate limited.", "retry_after": 64.57, "global": false}"#,
            64.57,
        ),
        (
            ChannelKind::Telegram,
            "",
            r#"{"ok":false,"error_code":429,"description":"Too Many Requests: retry after 8","parameters":{"retry_after":8}}"#,
            8.0,
        ),
        (ChannelKind::Ntfy, "retry-after: 86400\r\n", r#"{"code":42901,"http":429}"#, 3600.0),
    ];
    for (kind, headers, body, seconds) in cases {
        let receiver =
            Receiver::start(move |_| Reply::Answer("429 Too Many Requests", headers, body.into()))
                .await;
        let delivery = send(&http_channel(kind, &receiver), &sender_to(&receiver)).await;
        let (status, error, retry_after, verdict) = failure(delivery);
        assert_eq!(
            (status, retry_after, verdict),
            (Some(429), Some(seconds), Verdict::Channel),
            "{kind:?}"
        );
        assert!(error.starts_with("it answers 429 Too Many Requests"), "{error}");
    }
}

/// Services that do not understand what is in a message get it without.
#[tokio::test]
async fn a_message_that_is_refused_for_its_markup_goes_out_plain() {
    for kind in HTTP_KINDS {
        let receiver = Receiver::start(move |request| {
            let body = request.json();
            let is_refused = match kind {
                ChannelKind::Webhook => true,
                ChannelKind::Slack => body["mrkdwn"] != false,
                ChannelKind::Discord => body["content"].as_str().unwrap().contains("**"),
                ChannelKind::Teams => body["attachments"][0]["content"]["version"] != "1.0",
                ChannelKind::Ntfy => body.get("priority").is_some(),
                ChannelKind::Telegram => body.get("message_thread_id").is_some(),
                ChannelKind::Email => unreachable!(),
            };
            if is_refused {
                Reply::says("400 Bad Request", "invalid_payload")
            } else {
                Reply::status("204 No Content")
            }
        })
        .await;
        let channel = http_channel(kind, &receiver);
        let sender = sender_to(&receiver);
        let rendered = channel.render(&message(), Some("*{{ text }}* **bold**"));
        let (status, error, _, verdict) = failure(deliver(&channel, &rendered, &sender).await);
        assert_eq!((status, verdict), (Some(400), Verdict::Message), "{kind:?}");
        assert_eq!(error, "it answers 400 Bad Request: invalid_payload");
        let Some(plain) = rendered.plain else {
            assert_eq!(kind, ChannelKind::Webhook);
            continue;
        };
        let attempt = Attempt {
            id: "msg_1",
            content_type: &rendered.content_type,
            body: &plain,
            is_plain: true,
            at: now(),
        };
        assert_eq!(
            channel.deliver(&attempt, &sender).await,
            Delivery::Delivered { status: 204 },
            "{kind:?}"
        );
        let received = receiver.received().pop().unwrap();
        let text = String::from_utf8(received.body).unwrap().replace("\\\\", "");
        assert!(text.contains(LINE), "{kind:?}: {text}");
    }
}

#[tokio::test]
async fn a_service_in_trouble_is_the_channels_failure() {
    for (line, expected, verdict) in [
        (
            "500 Internal Server Error",
            "it answers 500 Internal Server Error: oops",
            Verdict::Channel,
        ),
        ("502 Bad Gateway", "it answers 502 Bad Gateway: oops", Verdict::Channel),
        ("503 Service Unavailable", "it answers 503 Service Unavailable: oops", Verdict::Channel),
        ("401 Unauthorized", "it answers 401 Unauthorized: oops", Verdict::Channel),
        ("404 Not Found", "it answers 404 Not Found: oops", Verdict::Channel),
        ("410 Gone", "it answers 410 Gone: oops", Verdict::Disable),
        ("413 Payload Too Large", "it answers 413 Payload Too Large: oops", Verdict::Message),
    ] {
        let receiver = Receiver::start(move |_| Reply::says(line, "oops")).await;
        for kind in HTTP_KINDS {
            let delivery = send(&http_channel(kind, &receiver), &sender_to(&receiver)).await;
            let (status, error, _, told) = failure(delivery);
            assert_eq!(
                (status.unwrap(), error.as_str()),
                (line[..3].parse().unwrap(), expected),
                "{kind:?}"
            );
            assert_eq!(told, verdict, "{kind:?} {line}");
        }
    }
}

#[tokio::test]
async fn an_answer_that_repeats_what_it_was_asked_gives_no_secret_away() {
    for kind in HTTP_KINDS {
        let receiver = Receiver::start(|request| {
            let headers: Vec<&str> =
                ["authorization", "x-token"].iter().map(|name| request.header(name)).collect();
            let body = String::from_utf8_lossy(&request.body);
            let topic = body.split("\"topic\":\"").nth(1).unwrap_or_default();
            Reply::says("404 Not Found", format!("Cannot {} {headers:?} {topic}", request.line))
        })
        .await;
        let delivery = send(&http_channel(kind, &receiver), &sender_to(&receiver)).await;
        let (_, error, _, _) = failure(delivery);
        assert!(error.starts_with("it answers 404 Not Found: Cannot POST"), "{kind:?}: {error}");
        assert!(error.contains("[hidden]"), "{kind:?}: {error}");
    }
}

#[tokio::test]
async fn a_receiver_that_does_not_answer_is_not_waited_for() {
    for (reply, words) in [
        (Reply::Stall, "no answer within 0.6 s"),
        (Reply::Close, "the connection ended without an answer"),
        (Reply::Garbage, "the connection ended without an answer"),
        (Reply::Cut("HTTP/1.1 20"), "the connection ended without an answer"),
        (Reply::Cut("HTTP/1.1 204 No Content\r\nx-"), "the connection ended without an answer"),
        (Reply::Drip("HTTP/1.1 204 No Content\r\nx-slow: "), "no answer within 0.6 s"),
    ] {
        let receiver = Receiver::start(move |_| reply.clone()).await;
        for kind in HTTP_KINDS {
            let started = Instant::now();
            let delivery = send(&http_channel(kind, &receiver), &impatient_to(&receiver)).await;
            let (status, error, _, verdict) = failure(delivery);
            assert_eq!((status, verdict), (None, Verdict::Channel), "{kind:?}");
            assert!(error.starts_with(words), "{kind:?}: {error}");
            assert!(started.elapsed() < LONG);
        }
        assert_eq!(receiver.received().len(), HTTP_KINDS.len());
    }
    // Nobody listens.
    let receiver = Receiver::start(|_| Reply::Stall).await;
    let free = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/s3cret", free.local_addr().unwrap());
    drop(free);
    let delivery =
        send(&channel(ChannelKind::Slack, &json!({"url": url})), &sender_to(&receiver)).await;
    let (_, error, _, verdict) = failure(delivery);
    assert!(error.starts_with("cannot connect: "), "{error}");
    assert_eq!(verdict, Verdict::Channel);
}

/// The status is what counts, also when the body never ends or never comes.
#[tokio::test]
async fn only_the_beginning_of_an_answer_is_read() {
    for (reply, is_delivered) in [
        (Reply::Endless("500 Internal Server Error"), false),
        (Reply::Endless("200 OK"), true),
        (Reply::StallWithin("500 Internal Server Error"), false),
        (Reply::StallWithin("200 OK"), true),
        (Reply::Drip("HTTP/1.1 500 Internal Server Error\r\ncontent-length: 1000\r\n\r\n"), false),
        (Reply::Drip("HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n"), true),
        (
            Reply::Cut("HTTP/1.1 500 Internal Server Error\r\ncontent-length: 1000\r\n\r\nbeg"),
            false,
        ),
        (Reply::Cut("HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\nbeg"), true),
        (Reply::says("500 Internal Server Error", "ä".repeat(1_000_000)), false),
    ] {
        let receiver = Receiver::start({
            let reply = reply.clone();
            move |_| reply.clone()
        })
        .await;
        for kind in HTTP_KINDS {
            let started = Instant::now();
            let delivery = send(&http_channel(kind, &receiver), &impatient_to(&receiver)).await;
            assert!(started.elapsed() < LONG);
            if is_delivered {
                assert_eq!(delivery, Delivery::Delivered { status: 200 }, "{kind:?}");
            } else {
                let (status, error, _, _) = failure(delivery);
                assert_eq!(status, Some(500));
                assert!(error.len() < 300, "{error}");
            }
        }
    }
}

#[tokio::test]
async fn no_redirect_is_followed() {
    let elsewhere = Arc::new(Receiver::start(|_| Reply::status("200 OK")).await);
    for line in [
        "301 Moved Permanently",
        "302 Found",
        "303 See Other",
        "307 Temporary Redirect",
        "308 Permanent Redirect",
    ] {
        let location: &'static str = format!("location: {}\r\n", elsewhere.url("/s3cret")).leak();
        let receiver = Receiver::start(move |_| Reply::Answer(line, location, String::new())).await;
        for kind in HTTP_KINDS {
            let delivery = send(&http_channel(kind, &receiver), &sender_to(&receiver)).await;
            let (_, error, _, verdict) = failure(delivery);
            assert_eq!(
                error,
                format!("it answers {line}, a redirect: set the address that it leads to")
            );
            assert_eq!(verdict, Verdict::Channel);
        }
    }
    assert!(elsewhere.received().is_empty());
}

/// An incoming webhook of Teams answers 200 when Teams itself refused the message.
#[tokio::test]
async fn teams_says_in_words_that_a_message_was_refused() {
    for (code, verdict) in
        [(413, Verdict::Message), (429, Verdict::Channel), (400, Verdict::Message)]
    {
        let receiver = Receiver::start(move |_| {
            let words = format!(
                "Webhook message delivery failed with error: Microsoft Teams endpoint returned HTTP error {code} with ContextId x"
            );
            Reply::says("200 OK", words)
        })
        .await;
        let delivery =
            send(&http_channel(ChannelKind::Teams, &receiver), &sender_to(&receiver)).await;
        let (status, error, _, told) = failure(delivery);
        assert_eq!((status, told), (Some(200), verdict));
        assert!(error.contains(&code.to_string()), "{error}");
    }
    let receiver = Receiver::start(|_| Reply::says("200 OK", "1")).await;
    let delivery = send(&http_channel(ChannelKind::Teams, &receiver), &sender_to(&receiver)).await;
    assert_eq!(delivery, Delivery::Delivered { status: 200 });
}

#[tokio::test]
async fn signatures_are_those_of_standard_webhooks() {
    let receiver = Receiver::start(|_| Reply::status("204 No Content")).await;
    let sender = sender_to(&receiver);
    let former = http_channel(ChannelKind::Webhook, &receiver);
    let secret = SigningSecret::generate(&Randomness::system()).unwrap();
    let new_key = secret.reveal();
    let until = now().saturating_add_milliseconds(60_000);
    let rotating = former.rotated(secret, until).unwrap();
    let rendered = former.render(&message(), None);
    let verify = |secret: &str, number: usize, body: &[u8]| {
        let received = &receiver.received()[number];
        Webhook::new(secret).unwrap().verify(body, &received.headers).is_ok()
    };
    let attempt = Attempt {
        id: "msg_2KWPBgLlAfxdpx2AI54pPJ85f4W",
        content_type: &rendered.content_type,
        body: &rendered.body,
        is_plain: false,
        at: now(),
    };
    former.deliver(&attempt, &sender).await;
    assert!(verify(SECRET, 0, &rendered.body));
    assert!(!verify(SECRET, 0, &[&rendered.body[..], b" "].concat()));
    assert!(!verify(&new_key, 0, &rendered.body));
    // While the secret is rotated, either verifies; then the new one alone.
    rotating.deliver(&attempt, &sender).await;
    assert!(verify(SECRET, 1, &rendered.body) && verify(&new_key, 1, &rendered.body));
    rotating.deliver(&Attempt { at: until, ..attempt }, &sender).await;
    assert!(!verify(SECRET, 2, &rendered.body) && verify(&new_key, 2, &rendered.body));
    // Another attempt is the same message, signed for its own time.
    let received = receiver.received();
    assert!(received.iter().all(|received| received.body == rendered.body));
    assert!(received.iter().all(|received| received.header("webhook-id") == attempt.id));
    assert_ne!(received[1].header("webhook-timestamp"), received[2].header("webhook-timestamp"));
    assert_eq!(
        received[2].header("webhook-timestamp"),
        (until.as_millisecond() / 1000).to_string()
    );
}

type Looking = Pin<Box<dyn Future<Output = io::Result<Vec<IpAddr>>> + Send>>;

/// A resolver that gives other addresses each time, as an attacker's does, and how often it was asked.
fn changing(
    answers: &'static [&'static [&'static str]],
) -> (Arc<AtomicUsize>, impl Fn(String) -> Looking) {
    let asked = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&asked);
    let lookup = move |_: String| -> Looking {
        let number = counter.fetch_add(1, Ordering::SeqCst);
        let addresses = answers[number.min(answers.len() - 1)];
        Box::pin(
            async move { Ok(addresses.iter().map(|address| address.parse().unwrap()).collect()) },
        )
    };
    (asked, lookup)
}

#[tokio::test]
async fn the_address_that_was_checked_is_the_one_that_is_used() {
    let receiver = Receiver::start(|_| Reply::status("200 OK")).await;
    let port = receiver.address.port();
    let url = format!("http://hook.test:{port}/x");
    let slack = channel(ChannelKind::Slack, &json!({"url": url}));
    let allowed: Vec<IpNet> = vec!["127.0.0.1/32".parse().unwrap()];
    // First it leads to what may be reached, then not.
    let (asked, lookup) = changing(&[
        &["127.0.0.1"],
        &["127.0.0.2"],
        &["127.0.0.1", "127.0.0.2"],
        &["::ffff:127.0.0.2"],
    ]);
    let targets = Targets::with_lookup(&allowed, lookup);
    let sender =
        Sender::new(SenderSettings { targets: Some(targets), ..SenderSettings::default() })
            .unwrap();
    assert_eq!(send(&slack, &sender).await, Delivery::Delivered { status: 200 });
    assert_eq!(asked.load(Ordering::SeqCst), 1);
    assert_eq!(receiver.only().header("host"), format!("hook.test:{port}"));
    for number in 2..5 {
        let (status, error, _, verdict) = failure(send(&slack, &sender).await);
        assert_eq!((status, verdict), (None, Verdict::Channel));
        assert_eq!(
            error,
            "the URL leads to 127.0.0.2, a loopback address; allow it with NOTIFY_ALLOW=127.0.0.0/8"
        );
        // Connecting asked once, and nothing asked again.
        assert_eq!(asked.load(Ordering::SeqCst), number);
    }
    assert_eq!(receiver.received().len(), 1);
}

#[tokio::test]
async fn nothing_private_is_reached_unless_it_is_allowed() {
    let receiver = Receiver::start(|_| Reply::status("200 OK")).await;
    let port = receiver.address.port();
    let sender = Sender::new(SenderSettings::default()).unwrap();
    for host in
        ["127.0.0.1", "localhost", "127.1", "0x7f.1", "2130706433", "[::ffff:127.0.0.1]", "0.0.0.0"]
    {
        let slack =
            channel(ChannelKind::Slack, &json!({"url": format!("http://{host}:{port}/s3cret")}));
        let (_, error, _, _) = failure(send(&slack, &sender).await);
        assert!(error.starts_with("the URL leads to "), "{host}: {error}");
        assert!(error.contains("allow it with NOTIFY_ALLOW="), "{host}: {error}");
        let violation = slack.check_target(&sender).await.unwrap_err();
        assert!(violation.message.starts_with("\"url\" leads to "), "{host}: {violation:?}");
    }
    assert!(receiver.received().is_empty());
    let allowing = Sender::new(settings()).unwrap();
    for host in ["127.0.0.1", "localhost", "127.1"] {
        let slack =
            channel(ChannelKind::Slack, &json!({"url": format!("http://{host}:{port}/s3cret")}));
        assert_eq!(slack.check_target(&allowing).await, Ok(()));
        assert_eq!(send(&slack, &allowing).await, Delivery::Delivered { status: 200 }, "{host}");
    }
}

#[tokio::test]
async fn a_proxy_is_given_names_and_no_private_address() {
    let proxy = Receiver::start(|_| Reply::status("200 OK")).await;
    let (asked, lookup) = changing(&[&["127.0.0.1"]]);
    let sender = Sender::new(SenderSettings {
        proxy: Some(ProxyUrl::parse(&format!("http://user:s3cret@{}", proxy.address)).unwrap()),
        targets: Some(Targets::with_lookup(&[], lookup)),
        ..SenderSettings::default()
    })
    .unwrap();
    let slack = channel(ChannelKind::Slack, &json!({"url": "http://hook.test/x"}));
    assert_eq!(slack.check_target(&sender).await, Ok(()));
    assert_eq!(send(&slack, &sender).await, Delivery::Delivered { status: 200 });
    let received = proxy.only();
    assert_eq!(received.line, "POST http://hook.test/x");
    assert_eq!(
        received.header("proxy-authorization"),
        format!("Basic {}", STANDARD.encode("user:s3cret"))
    );
    assert_eq!(asked.load(Ordering::SeqCst), 0);
    // HTTPS asks the proxy for a tunnel.
    let refusing = Receiver::start(|_| Reply::status("403 Forbidden")).await;
    let tunnel = Sender::new(SenderSettings {
        proxy: Some(ProxyUrl::parse(&format!("http://{}", refusing.address)).unwrap()),
        ..SenderSettings::default()
    })
    .unwrap();
    let slack = channel(ChannelKind::Slack, &json!({"url": "https://hook.test/x"}));
    let (status, _, _, verdict) = failure(send(&slack, &tunnel).await);
    assert_eq!((status, verdict), (None, Verdict::Channel));
    assert_eq!(refusing.only().line, "CONNECT hook.test:443");
    // A literal address is checked here.
    let slack = channel(ChannelKind::Slack, &json!({"url": "http://10.0.0.5/x"}));
    let (_, error, _, _) = failure(send(&slack, &sender).await);
    assert!(error.contains("10.0.0.5, a private address"), "{error}");
    assert!(slack.check_target(&sender).await.is_err());
    assert_eq!(proxy.received().len(), 1);
}

/// A certificate for localhost and its key, in files.
pub(crate) struct Certificate {
    pub(crate) folder: TempDir,
    pub(crate) der: CertificateDer<'static>,
    key: String,
}

pub(crate) fn certificate() -> Certificate {
    let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let key = made.signing_key.serialize_pem();
    std::fs::write(folder.path().join("cert.pem"), made.cert.pem()).unwrap();
    std::fs::write(folder.path().join("key.pem"), &key).unwrap();
    Certificate { folder, der: made.cert.der().clone(), key }
}

#[tokio::test]
async fn a_receiver_must_prove_who_it_is() {
    let own = certificate();
    let tls = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(
            vec![own.der.clone()],
            PrivateKeyDer::from_pem_slice(own.key.as_bytes()).unwrap(),
        )
        .unwrap();
    let receiver = Receiver::start_with(Some(tls), |_| Reply::status("200 OK")).await;
    let port = receiver.address.port();
    let to = |host: &str| {
        channel(ChannelKind::Slack, &json!({"url": format!("https://{host}:{port}/s3cret")}))
    };
    let trusting =
        Sender::new(SenderSettings { roots: Some(vec![own.der.clone()]), ..settings() }).unwrap();
    assert_eq!(send(&to("localhost"), &trusting).await, Delivery::Delivered { status: 200 });
    let (_, error, _, _) = failure(send(&to("127.0.0.1"), &trusting).await);
    assert!(error.starts_with("cannot connect: invalid peer certificate"), "{error}");
    for roots in [None, Some(Vec::new()), Some(vec![certificate().der])] {
        let other = Sender::new(SenderSettings { roots, ..settings() }).unwrap();
        let (_, error, _, verdict) = failure(send(&to("localhost"), &other).await);
        assert!(error.starts_with("cannot connect: invalid peer certificate"), "{error}");
        assert_eq!(verdict, Verdict::Channel);
    }
    assert_eq!(receiver.received().len(), 1);
}
