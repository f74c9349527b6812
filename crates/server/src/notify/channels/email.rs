//! E-mail to one address: lettre gives up at the first recipient that a server refuses, so that one wrong address would
//! keep a message from the others.

use std::time::{Duration, SystemTime};

use lettre::{
    Address,
    message::{
        Mailbox, Mailboxes, SinglePart,
        header::{
            self, ContentType, Date, Header, HeaderName, HeaderValue, Headers, MIME_VERSION_1_0,
            MessageId, References, Subject,
        },
    },
};
use reqwest::Url;
use serde_json::{Map, Value};

use super::{
    Attempt, Channel, Delivery, Rendered, Verdict,
    fields::{Fields, wrong_form},
    one, text_of,
};
use crate::notify::{
    message::{Message, Text},
    redact,
    sender::Sender,
    smtp::{SmtpError, is_ascii},
};

/// A provider that is asked more often may take us for somebody who sends advertising.
pub(super) const SPACING: Duration = Duration::from_secs(1);

/// The most bytes of a text. Every server must take messages of 64 KiB with headers and encoding (RFC 5321, 4.5.3.1.7).
/// Base64 makes a third more of it, quoted-printable up to three times as much.
const LIMIT: usize = 16 << 10;

/// The most characters of a subject. A line should have 78, and many clients show less (RFC 5322, 2.1.1).
const SUBJECT: usize = 150;

/// The most incidents by which one mail is put into threads.
const MAX_REFERENCES: usize = 20;

/// What the stored body is: a message without the lines that only the sender's settings give.
const CONTENT_TYPE: &str = "message/rfc822";

/// An address for mail.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EmailChannel {
    to: Address,
}

impl EmailChannel {
    /// The headers that depend on who sends, before those that were rendered.
    fn addressed(&self, from: &Mailbox, attempt: &Attempt<'_>) -> Vec<u8> {
        let mut headers = Headers::new();
        headers.set(header::From::from(Mailboxes::from(from.clone())));
        headers.set(header::To::from(Mailboxes::from(Mailbox::from(self.to.clone()))));
        headers.set(MessageId::from(format!("<{}@{}>", attempt.id, from.email.domain())));
        let mut mail = headers.to_string().into_bytes();
        mail.extend_from_slice(attempt.body);
        mail
    }
}

impl Channel for EmailChannel {
    fn read(fields: &mut Fields) -> Option<Self> {
        let to = fields.required("to", |text| match text.parse::<Address>() {
            Ok(address) if text.len() <= 254 && is_ascii(&address) => Ok(address),
            _ => wrong_form("must be one e-mail address, such as ada@example.com"),
        });
        to.map(|to| Self { to })
    }

    fn public(&self) -> Map<String, Value> {
        let to: &str = self.to.as_ref();
        one("to", to)
    }

    fn secrets(&self) -> Map<String, Value> {
        Map::new()
    }

    fn target(&self) -> Option<(&'static str, &Url)> {
        None
    }

    fn render(&self, message: &Message, template: Option<String>) -> Rendered {
        let built_in = message.text();
        let subject: String = built_in.subject.chars().take(SUBJECT).collect();
        // In a header this begins an encoded word (RFC 2047), which the name of a device must not be.
        let subject = subject.replace("=?", "= ?");
        let text = text_of(message, template, Self::escape);
        Rendered {
            content_type: CONTENT_TYPE.to_owned(),
            body: mail(message, &subject, &text),
            plain: Some(mail(message, &subject, &built_in)),
        }
    }

    fn escape(text: &str) -> String {
        text.to_owned()
    }

    async fn deliver(
        &self,
        attempt: &Attempt<'_>,
        sender: &Sender,
        secrets: &[String],
    ) -> Delivery {
        let Some(smtp) = sender.smtp() else {
            return Delivery::unanswered(
                "there is no server for e-mail; set SMTP_URL and SMTP_FROM".to_owned(),
            );
        };
        let mail = self.addressed(smtp.from(), attempt);
        match smtp.send(&self.to, &mail).await {
            Ok(()) => Delivery::Delivered { status: 250 },
            Err(SmtpError { words, code }) => Delivery::Failed {
                status: code,
                error: redact(&words, secrets),
                retry_after: None,
                // Too large, or refused for what is in it (RFC 5321, 4.2.2). Everything else is about addresses, signing
                // in, or the server.
                verdict: match code {
                    Some(552 | 554) => Verdict::Message,
                    _ => Verdict::Channel,
                },
            },
        }
    }
}

/// A message from its date on.
fn mail(message: &Message, subject: &str, text: &Text) -> Vec<u8> {
    // The parts of an id must be words with dots; a host in a URL is that, and an IPv6 address is not.
    let host = message.base().and_then(|base| Url::parse(base).ok());
    let host = host.as_ref().and_then(Url::domain).unwrap_or("pisync.invalid");
    let references: Vec<String> = message
        .items
        .iter()
        .take(MAX_REFERENCES)
        .map(|item| format!("<incident-{}@{host}>", item.id))
        .collect();
    let mut part = SinglePart::builder()
        .header(Date::new(SystemTime::from(message.at.to_jiff())))
        .header(Subject::from(subject.to_owned()))
        .header(AutoSubmitted)
        .header(MIME_VERSION_1_0)
        .header(ContentType::TEXT_PLAIN);
    if !references.is_empty() {
        // Nobody has sent a mail of these ids. Clients put mails that refer to the same id into one thread.
        part = part.header(References::from(references.join(" ")));
    }
    part.body(text.fit(LIMIT, str::len).replace('\n', "\r\n")).formatted()
}

/// Keeps answering machines from answering. RFC 3834, 5.
#[derive(Clone)]
struct AutoSubmitted;

impl Header for AutoSubmitted {
    fn name() -> HeaderName {
        HeaderName::new_from_ascii_str("Auto-Submitted")
    }

    fn parse(_: &str) -> Result<Self, Box<dyn std::error::Error + Send + Sync>> {
        Ok(Self)
    }

    fn display(&self) -> HeaderValue {
        HeaderValue::new(Self::name(), "auto-generated".to_owned())
    }
}
