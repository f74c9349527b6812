//! Webhooks for programs: JSON, signed as Standard Webhooks says. The receiver verifies the signature, and ignores a
//! message whose id it has seen. <https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md>

use std::{fmt, str::FromStr, time::Duration};

use axum::http::{HeaderMap, HeaderName, HeaderValue, header};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use hmac::{Hmac, KeyInit, Mac};
use pisync_core::{Timestamp, ViolationCode};
use reqwest::Url;
use serde::Serialize;
use serde_json::{Map, Value, json};
use sha2::Sha256;

use super::{
    Attempt, Channel, Delivery, JSON, Rendered,
    fields::{Fields, Rule},
    json_length, one, post, text_of, url,
};
use crate::{
    notify::{
        Hidden,
        message::{MAX_ITEMS, MAX_MEMBERS, Message, MessageItem},
        sender::Sender,
    },
    random::Randomness,
    store::StateCounts,
};

/// A receiver is a program of the user's own. Five messages a second burden none.
pub(super) const SPACING: Duration = Duration::from_millis(200);

/// The most bytes of a body. Standard Webhooks recommends less than 20 kB.
const LIMIT: usize = 20 << 10;

/// The most bytes of `data.text`, so that most of a body are incidents.
const TEXT: usize = 4 << 10;

/// What a body has beside its text and incidents, at most: a group's name has up to 255 characters of 4 bytes.
const ENVELOPE: usize = 1_500;

/// For how long the former secret signs, too, after a rotation.
pub const FORMER_SECRET_VALID: Duration = Duration::from_secs(24 * 60 * 60);

/// The most headers that a channel may add.
pub const MAX_HEADERS: usize = 10;

/// The most bytes of a header's value.
const MAX_HEADER: usize = 1_000;

/// Under this name the secret before the last rotation is stored. It is no field of the API.
pub(super) const FORMER: &str = "former_secret";

/// How a secret begins in text.
const PREFIX: &str = "whsec_";

/// Headers that are not the channel's to set: they say how the body is read or transferred, or to whom it goes.
const NOT_ALLOWED: [HeaderName; 11] = [
    header::CONNECTION,
    header::CONTENT_ENCODING,
    header::CONTENT_LENGTH,
    header::CONTENT_TYPE,
    header::EXPECT,
    header::HOST,
    header::TE,
    header::TRAILER,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
    header::USER_AGENT,
];

/// The key that signs messages: 24 to 64 bytes.
#[derive(Clone, PartialEq, Eq)]
pub struct SigningSecret(Vec<u8>);

impl SigningSecret {
    /// A new one.
    ///
    /// # Errors
    /// When there is no randomness.
    pub fn generate(random: &Randomness) -> Result<Self, String> {
        Ok(Self(random.bytes()?.to_vec()))
    }

    /// `whsec_` and the key in base64, as receivers take it.
    #[must_use]
    pub fn reveal(&self) -> String {
        format!("{PREFIX}{}", STANDARD.encode(&self.0))
    }

    /// The signature of a body that is sent under `id` at `seconds` since 1970.
    fn sign(&self, id: &str, seconds: i64, body: &[u8]) -> Option<String> {
        // A key of any length is accepted.
        let mut mac = Hmac::<Sha256>::new_from_slice(&self.0).ok()?;
        mac.update(format!("{id}.{seconds}.").as_bytes());
        mac.update(body);
        Some(format!("v1,{}", STANDARD.encode(mac.finalize().into_bytes())))
    }
}

impl FromStr for SigningSecret {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let key = text.strip_prefix(PREFIX).and_then(|key| STANDARD.decode(key).ok());
        let key = key.filter(|key| (24..=64).contains(&key.len()));
        key.map(Self).ok_or("must be whsec_ and 24 to 64 bytes in base64")
    }
}

impl fmt::Debug for SigningSecret {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("[hidden]")
    }
}

/// A program that is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WebhookChannel {
    url: Hidden<Url>,
    signing_secret: SigningSecret,
    /// The secret before the last rotation, and until when it signs, too.
    former_secret: Option<(SigningSecret, Timestamp)>,
    headers: Hidden<Vec<(HeaderName, HeaderValue)>>,
}

impl WebhookChannel {
    /// The present secret, which is answered once, when it was made.
    #[must_use]
    pub fn signing_secret(&self) -> &SigningSecret {
        &self.signing_secret
    }

    pub(super) fn rotated(&self, secret: SigningSecret, until: Timestamp) -> Self {
        let former_secret = Some((self.signing_secret.clone(), until));
        Self { signing_secret: secret, former_secret, ..self.clone() }
    }

    /// A change that leaves the secret as it is keeps the former one, too.
    pub(super) fn keep_former(&mut self, present: &Self) {
        if self.signing_secret == present.signing_secret {
            self.former_secret.clone_from(&present.former_secret);
        }
    }

    pub(super) fn stored_former(&self) -> Map<String, Value> {
        self.former_secret.as_ref().map_or_else(Map::new, |(secret, until)| {
            one(FORMER, json!({ "secret": secret.reveal(), "until": until }))
        })
    }

    pub(super) fn set_former(&mut self, stored: &Value) -> Option<()> {
        let secret = stored["secret"].as_str()?.parse().ok()?;
        let until = Timestamp::parse_iso8601(stored["until"].as_str()?)?;
        self.former_secret = Some((secret, until));
        Some(())
    }

    /// The headers of an attempt. The signature is of the time at which it is made, so that nobody can repeat it later.
    fn signed(&self, attempt: &Attempt<'_>) -> Option<HeaderMap> {
        let mut headers: HeaderMap = self.headers.reveal().iter().cloned().collect();
        let seconds = attempt.at.as_millisecond().div_euclid(1000);
        let former = self.former_secret.as_ref().filter(|(_, until)| attempt.at < *until);
        let secrets = std::iter::once(&self.signing_secret).chain(former.map(|(secret, _)| secret));
        let signatures: Option<Vec<String>> =
            secrets.map(|secret| secret.sign(attempt.id, seconds, attempt.body)).collect();
        let own = [
            ("webhook-id", attempt.id.to_owned()),
            ("webhook-timestamp", seconds.to_string()),
            ("webhook-signature", signatures?.join(" ")),
        ];
        for (name, value) in own {
            headers.insert(HeaderName::from_static(name), HeaderValue::from_str(&value).ok()?);
        }
        Some(headers)
    }
}

impl Channel for WebhookChannel {
    fn read(fields: &mut Fields) -> Option<Self> {
        let url = url(fields);
        let signing_secret = fields.required("signing_secret", |text| {
            text.parse().map_err(|words: &str| (ViolationCode::Format, words.to_owned()))
        });
        let headers = match fields.take("headers").filter(|headers| !headers.is_null()) {
            None => Some(Vec::new()),
            Some(headers) => read_headers(&headers)
                .map_err(|(code, words)| fields.refuse("headers", code, &words, None))
                .ok(),
        };
        Some(Self {
            url: url?,
            signing_secret: signing_secret?,
            former_secret: None,
            headers: Hidden::new(headers?),
        })
    }

    fn public(&self) -> Map<String, Value> {
        Map::new()
    }

    fn secrets(&self) -> Map<String, Value> {
        let headers: Map<String, Value> = self
            .headers
            .reveal()
            .iter()
            .map(|(name, value)| (name.to_string(), value.to_str().unwrap_or_default().into()))
            .collect();
        let mut secrets = one("url", self.url.reveal().as_str());
        secrets.insert("signing_secret".to_owned(), self.signing_secret.reveal().into());
        secrets.insert("headers".to_owned(), headers.into());
        secrets
    }

    fn target(&self) -> Option<(&'static str, &Url)> {
        Some(("url", self.url.reveal()))
    }

    /// A template makes `data.text`. The rest is what programs rely on.
    fn render(&self, message: &Message, template: Option<String>) -> Rendered {
        let text = text_of(message, template, Self::escape).fit(TEXT, json_length);
        let room = LIMIT.saturating_sub(json_length(&text) + ENVELOPE);
        let payload = Payload {
            r#type: message.kind.event_type(),
            timestamp: message.at,
            data: Data {
                group: message.group.as_deref(),
                incidents: incidents(message, room),
                incidents_total: message.items_total,
                devices: message.states.map(devices),
                text: &text,
            },
        };
        Rendered { content_type: JSON.to_owned(), body: bytes(&payload), plain: None }
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
        let Some(headers) = self.signed(attempt) else {
            return Delivery::unanswered("the message's id can be no header".to_owned());
        };
        let body = attempt.body.to_vec();
        post(self.url.reveal(), headers, body, attempt, sender, secrets).await
    }
}

/// The body.
#[derive(Serialize)]
struct Payload<'a> {
    r#type: &'static str,
    timestamp: Timestamp,
    data: Data<'a>,
}

#[derive(Serialize)]
struct Data<'a> {
    group: Option<&'a str>,
    incidents: Vec<Incident<'a>>,
    incidents_total: u64,
    /// Devices by their state.
    #[serde(skip_serializing_if = "Option::is_none")]
    devices: Option<Map<String, Value>>,
    text: &'a str,
}

/// How many devices are in which state, by the names of the states.
fn devices(states: StateCounts) -> Map<String, Value> {
    states.each().map(|(state, count)| (state.as_str().to_owned(), count.into())).collect()
}

#[derive(Serialize)]
struct Incident<'a> {
    event: &'static str,
    id: i64,
    scope: &'a str,
    subject: &'a str,
    kind: &'a str,
    severity: &'a str,
    since: Timestamp,
    #[serde(skip_serializing_if = "Option::is_none")]
    resolution: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    lasted_seconds: Option<i64>,
    text: String,
    members: &'a [String],
    members_total: i64,
    #[serde(skip_serializing_if = "Option::is_none")]
    url: Option<String>,
}

impl<'a> Incident<'a> {
    /// Without members.
    fn of(item: &'a MessageItem, message: &Message) -> Self {
        Self {
            event: item.event.as_str(),
            id: item.id,
            scope: &item.scope,
            subject: &item.subject,
            kind: &item.kind,
            severity: &item.severity,
            since: item.since,
            resolution: item.resolution.as_deref(),
            lasted_seconds: item.lasted_seconds,
            text: item.text(message.at),
            members: &[],
            members_total: item.members_total,
            url: message.base().map(|base| item.url(base)),
        }
    }
}

/// As many incidents as fit in so many bytes. What they leave is shared out among them for members.
fn incidents(message: &Message, mut room: usize) -> Vec<Incident<'_>> {
    let mut incidents = Vec::new();
    let items = message.items.iter().take(MAX_ITEMS);
    for item in items.clone() {
        let incident = Incident::of(item, message);
        let length = bytes(&incident).len() + 1;
        if length > room {
            break;
        }
        room -= length;
        incidents.push(incident);
    }
    let share = room / incidents.len().max(1);
    for (incident, item) in incidents.iter_mut().zip(items) {
        let mut length = 0;
        let fitting = item.members.iter().take(MAX_MEMBERS).take_while(|member| {
            length += json_length(member) + 3;
            length <= share
        });
        incident.members = &item.members[..fitting.count()];
    }
    incidents
}

/// Numbers and texts can always be written as JSON.
fn bytes(value: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(value).unwrap_or_default()
}

fn read_headers(headers: &Value) -> Result<Vec<(HeaderName, HeaderValue)>, Rule> {
    let Value::Object(fields) = headers else {
        return Err((ViolationCode::Type, "must be an object of texts".to_owned()));
    };
    if fields.len() > MAX_HEADERS {
        return Err((ViolationCode::Length, format!("must have at most {MAX_HEADERS} headers")));
    }
    let mut headers: Vec<(HeaderName, HeaderValue)> = Vec::new();
    for (name, value) in fields {
        let wrong = |words: &str| (ViolationCode::Format, words.to_owned());
        let name =
            HeaderName::from_str(name).map_err(|_| wrong("holds a name that no header has"))?;
        let is_ours = NOT_ALLOWED.contains(&name)
            || name.as_str().starts_with("webhook-")
            || name.as_str().starts_with("proxy-");
        if is_ours {
            return Err(wrong(&format!("must not hold {name}, which is set by PiSync")));
        }
        if headers.iter().any(|(known, _)| *known == name) {
            return Err((ViolationCode::Conflict, format!("holds {name} twice")));
        }
        let Value::String(text) = value else {
            return Err((ViolationCode::Type, "must be an object of texts".to_owned()));
        };
        let is_plain = text.bytes().all(|byte| byte == b' ' || byte.is_ascii_graphic());
        if text.trim().len() != text.len()
            || text.is_empty()
            || text.len() > MAX_HEADER
            || !is_plain
        {
            return Err(wrong("must hold values of 1 to 1000 visible characters"));
        }
        let mut value = HeaderValue::from_str(text)
            .map_err(|_| wrong("holds a value that no header can have"))?;
        value.set_sensitive(true);
        headers.push((name, value));
    }
    Ok(headers)
}
