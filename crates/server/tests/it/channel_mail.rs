//! E-mail, taken by a real SMTP server: encryption, signing in, what the server replies, and how the mail looks there.

use std::{
    path::Path,
    process::Stdio,
    time::{Duration, Instant},
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use pisync::notify::{
    channels::{ChannelConfig, ChannelKind, Delivery, Verdict},
    message::{Message, MessageEvent},
    sender::{Sender, SenderSettings},
    smtp::SmtpSettings,
};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt, BufReader, Lines},
    process::{Child, ChildStdout, Command},
    time::timeout,
};

use crate::channels::{
    Certificate, LONG, certificate, channel, deliver, failure, incident, message, send,
};

/// Where `scripts/test` installs aiosmtpd.
const PYTHON: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../target/aiosmtpd/bin/python");

/// A real SMTP server.
struct MailServer {
    certificate: Certificate,
    port: u16,
    lines: Lines<BufReader<ChildStdout>>,
    _process: Child,
}

impl MailServer {
    async fn start(arguments: &[&str]) -> Self {
        assert!(Path::new(PYTHON).exists(), "no aiosmtpd here: run ./scripts/test");
        let certificate = certificate();
        std::fs::write(
            certificate.folder.path().join("server.py"),
            include_str!("../smtp/server.py"),
        )
        .unwrap();
        let mut process = Command::new(PYTHON)
            .arg("server.py")
            .args(arguments)
            .current_dir(certificate.folder.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(process.stdout.take().unwrap()).lines();
        let port =
            timeout(LONG, lines.next_line()).await.unwrap().unwrap().expect("no SMTP server");
        Self { certificate, port: port.parse().unwrap(), lines, _process: process }
    }

    /// A sender to it. `url` has `PORT` for the port.
    fn sender(&self, url: &str) -> Sender {
        let url = url.replace("PORT", &self.port.to_string());
        let smtp = SmtpSettings::parse(&url, Some("PiSync <pisync@fleet.example>")).unwrap();
        Sender::new(SenderSettings {
            smtp: Some(smtp),
            roots: Some(vec![self.certificate.der.clone()]),
            attempt_timeout: Duration::from_secs(3),
            ..SenderSettings::default()
        })
        .unwrap()
    }

    /// The next message that it was given.
    async fn message(&mut self) -> Value {
        let line = timeout(LONG, self.lines.next_line()).await.unwrap().unwrap().unwrap();
        serde_json::from_str(&line).unwrap()
    }
}

const STARTTLS: &str = "smtp://pisync:s3cret%2Fp%40ss@localhost:PORT?tls=required";

fn mailbox() -> ChannelConfig {
    channel(ChannelKind::Email, &json!({"to": "ada@example.com"}))
}

#[tokio::test]
async fn mail_is_handed_to_a_real_server() {
    for (arguments, url, is_encrypted) in [
        (&["--tls", "starttls"], STARTTLS, true),
        (&["--tls", "implicit"], "smtps://pisync:s3cret%2Fp%40ss@localhost:PORT", true),
        (&["--tls", "none"], "smtp://localhost:PORT?tls=none", false),
    ] {
        let mut server = MailServer::start(arguments).await;
        let sender = server.sender(url);
        let name = "Schule-ä: „17“ 😀";
        let message = Message { items: vec![incident(MessageEvent::Opened, name)], ..message() };
        let rendered = mailbox().render(&message, None);
        for _ in 0..2 {
            assert_eq!(
                deliver(&mailbox(), &rendered, &sender).await,
                Delivery::Delivered { status: 250 }
            );
        }
        let (first, second) = (server.message().await, server.message().await);
        // Once more is the same mail, by its id and by every byte.
        assert_eq!(first["raw"], second["raw"]);
        assert_eq!(
            (&first["from"], &first["to"]),
            (&json!("pisync@fleet.example"), &json!(["ada@example.com"]))
        );
        assert_eq!(first["is_encrypted"], is_encrypted, "{arguments:?}");
        assert_eq!(first["user"], if is_encrypted { json!("pisync") } else { Value::Null });
        assert_eq!((&first["hello"], &first["defects"]), (&json!("fleet.example"), &json!([])));
        let subject = format!("{name}: 199 of 200 devices silent, last heard 09:00 UTC");
        let expected = [
            ("from", "PiSync <pisync@fleet.example>"),
            ("to", "ada@example.com"),
            ("subject", &subject),
            ("message-id", "<msg_1@fleet.example>"),
            ("references", "<incident-812@fleet.example>"),
            ("auto-submitted", "auto-generated"),
            ("mime-version", "1.0"),
            ("date", "Mon, 02 Mar 2026 10:31:00 +0000"),
        ];
        for (header, value) in expected {
            assert_eq!(first["headers"][header], value);
        }
        let text = first["text"].as_str().unwrap().replace("\r\n", "\n");
        assert_eq!(
            text.trim_end(),
            format!(
                "{subject}\nSeverity critical, since 2026-03-02 10:30 UTC.\nDevices: pi-001 and 198 more\n\
                 https://fleet.example/incidents/812"
            )
        );
        let raw = STANDARD.decode(first["raw"].as_str().unwrap()).unwrap();
        assert!(raw.is_ascii() && !String::from_utf8_lossy(&raw).contains("s3cret"));
    }
}

#[tokio::test]
async fn what_an_smtp_server_says_is_understood() {
    for (reply, rcpt, status, verdict) in [
        ("552 5.3.4 Message too big", "250 OK", 552, Verdict::Message),
        ("554 5.7.1 Spam", "250 OK", 554, Verdict::Message),
        ("451 4.3.0 Try again later", "250 OK", 451, Verdict::Channel),
        ("250 OK", "550 5.1.1 No such user", 550, Verdict::Channel),
        ("250 OK", "450 4.2.1 Greylisted", 450, Verdict::Channel),
    ] {
        let server = MailServer::start(&["--reply", reply, "--reply-rcpt", rcpt]).await;
        let (told, error, retry_after, whose) =
            failure(send(&mailbox(), &server.sender(STARTTLS)).await);
        assert_eq!((told, whose, retry_after), (Some(status), verdict, None), "{error}");
        assert!(error.starts_with("SMTP: ") && error.contains(&status.to_string()), "{error}");
    }
}

#[tokio::test]
async fn a_password_goes_to_the_right_server_or_nowhere() {
    let mut server = MailServer::start(&[]).await;
    let wrong = server.sender("smtp://pisync:s3cret-wrong@localhost:PORT");
    let (status, error, _, verdict) = failure(send(&mailbox(), &wrong).await);
    assert_eq!((status, verdict), (Some(535), Verdict::Channel), "{error}");
    // Without signing in, it takes nothing.
    let nobody = server.sender("smtp://localhost:PORT");
    let (status, error, _, verdict) = failure(send(&mailbox(), &nobody).await);
    assert_eq!((status, verdict), (Some(530), Verdict::Channel), "{error}");
    // Somebody else's certificate, and the wrong name.
    for (certificate, host) in
        [(certificate().der, "localhost"), (server.certificate.der.clone(), "127.0.0.1")]
    {
        let url = STARTTLS.replace("localhost:PORT", &format!("{host}:{}", server.port));
        let smtp = SmtpSettings::parse(&url, Some("pisync@fleet.example")).unwrap();
        let sender = Sender::new(SenderSettings {
            smtp: Some(smtp),
            roots: Some(vec![certificate]),
            ..SenderSettings::default()
        })
        .unwrap();
        let (status, error, _, verdict) = failure(send(&mailbox(), &sender).await);
        assert_eq!((status, verdict), (None, Verdict::Channel), "{error}");
        assert!(error.contains("certificate"), "{error}");
    }
    // A server that does not offer STARTTLS, or from which somebody has taken the offer away.
    let plain = MailServer::start(&["--tls", "none"]).await;
    let (status, error, _, verdict) = failure(send(&mailbox(), &plain.sender(STARTTLS)).await);
    assert_eq!((status, verdict), (None, Verdict::Channel));
    assert!(error.contains("STARTTLS is not supported"), "{error}");
    // It still works for whoever does it right.
    let right = server.sender(STARTTLS);
    assert_eq!(send(&mailbox(), &right).await, Delivery::Delivered { status: 250 });
    assert_eq!(server.message().await["user"], "pisync");
}

#[tokio::test]
async fn a_slow_smtp_server_is_not_waited_for() {
    let server = MailServer::start(&["--stall", "data"]).await;
    let started = Instant::now();
    let (status, error, _, verdict) = failure(send(&mailbox(), &server.sender(STARTTLS)).await);
    assert_eq!((status, verdict), (None, Verdict::Channel));
    assert_eq!(error, "the SMTP server did not take the message within 3 s");
    assert!(started.elapsed() < LONG);
    // Once it has taken the message, its farewell does not count.
    let mut server = MailServer::start(&["--stall", "quit"]).await;
    assert_eq!(
        send(&mailbox(), &server.sender(STARTTLS)).await,
        Delivery::Delivered { status: 250 }
    );
    assert_eq!(server.message().await["to"], json!(["ada@example.com"]));
}

#[tokio::test]
async fn mail_without_a_server_says_what_is_missing() {
    let sender = Sender::new(SenderSettings::default()).unwrap();
    assert!(!sender.has_smtp());
    let (status, error, _, verdict) = failure(send(&mailbox(), &sender).await);
    assert_eq!((status, verdict), (None, Verdict::Channel));
    assert_eq!(error, "there is no server for e-mail; set SMTP_URL and SMTP_FROM");
}
