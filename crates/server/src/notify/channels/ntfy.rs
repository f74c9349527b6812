//! ntfy, published as JSON. <https://docs.ntfy.sh/publish/#publish-as-json>

use std::time::Duration;

use axum::http::{HeaderMap, HeaderValue, header};
use pisync_core::ViolationCode;
use reqwest::Url;
use serde_json::{Map, Value, json};

use super::{
    Attempt, Channel, Delivery, JSON, Rendered,
    fields::{Fields, Rule, wrong_form},
    json_bytes, json_length, one, post, read_url, text_of,
};
use crate::notify::{
    Hidden,
    message::{Message, MessageKind, Text, Urgency},
    sender::Sender,
};

/// A visitor of ntfy.sh may make a request every 5 s, after a burst of 60.
/// <https://docs.ntfy.sh/publish/#limitations>
pub(super) const SPACING: Duration = Duration::from_secs(5);

/// The most bytes of a message: a longer one becomes an attachment. All of the JSON may have twice as many.
/// <https://docs.ntfy.sh/publish/#limitations>
const LIMIT: usize = 4_096;

/// The most characters of a title. ntfy has no limit of its own; phones show less.
const TITLE: usize = 250;

/// A topic of an ntfy server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NtfyChannel {
    server: Url,
    topic: Hidden<String>,
    token: Option<Hidden<String>>,
}

impl Channel for NtfyChannel {
    fn read(fields: &mut Fields) -> Option<Self> {
        let server = fields.required("server", |text| {
            let server = read_url(text)?;
            if server.query().is_some() {
                return wrong_form("must hold no ?");
            }
            Ok(server)
        });
        let topic = fields.required("topic", read_topic);
        let token = fields.optional("token", read_token);
        Some(Self { server: server?, topic: Hidden::new(topic?), token: token.map(Hidden::new) })
    }

    fn public(&self) -> Map<String, Value> {
        one("server", self.server.as_str())
    }

    fn secrets(&self) -> Map<String, Value> {
        let mut secrets = one("topic", self.topic.reveal().as_str());
        if let Some(token) = &self.token {
            secrets.insert("token".to_owned(), token.reveal().as_str().into());
        }
        secrets
    }

    fn target(&self) -> Option<(&'static str, &Url)> {
        Some(("server", &self.server))
    }

    /// Without the topic: it is a secret, and what is rendered is stored as it is.
    fn render(&self, message: &Message, template: Option<String>) -> Rendered {
        let built_in = message.text();
        let title: String = built_in.subject.chars().take(TITLE).collect();
        // A tap leads to the link, so that the text can do without.
        let text = Text { link: None, ..text_of(message, template.clone(), Self::escape) };
        let has_more = !built_in.lines.is_empty();
        let text = match template {
            None if has_more => text.fit_body(LIMIT, json_length),
            _ => text.fit(LIMIT, json_length),
        };
        let mut whole = json!({
            "title": title, "message": text, "priority": priority(message), "tags": [tag(message)],
        });
        if let Some(link) = &built_in.link {
            whole["click"] = link.as_str().into();
        }
        Rendered {
            content_type: JSON.to_owned(),
            body: json_bytes(&whole),
            plain: Some(json_bytes(&json!({ "message": built_in.fit(LIMIT, json_length) }))),
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
        let Ok(mut body) = serde_json::from_slice::<Map<String, Value>>(attempt.body) else {
            return Delivery::unanswered("the stored message is no JSON object".to_owned());
        };
        body.insert("topic".to_owned(), self.topic.reveal().as_str().into());
        let mut headers = HeaderMap::new();
        if let Some(token) = &self.token
            && let Ok(mut value) = HeaderValue::from_str(&format!("Bearer {}", token.reveal()))
        {
            value.set_sensitive(true);
            headers.insert(header::AUTHORIZATION, value);
        }
        let body = json_bytes(&Value::Object(body));
        post(&self.server, headers, body, attempt, sender, secrets).await
    }
}

/// From 1, which nobody notices, to 5, which wakes people. <https://docs.ntfy.sh/publish/#message-priority>
fn priority(message: &Message) -> u8 {
    match (message.kind, message.severity()) {
        (MessageKind::Incidents, Some(Urgency::Critical)) => 5,
        (MessageKind::Incidents, Some(Urgency::Warning)) => 4,
        _ => 3,
    }
}

/// A tag that phones show as a picture. <https://docs.ntfy.sh/emojis/>
fn tag(message: &Message) -> &'static str {
    match (message.kind, message.severity()) {
        (MessageKind::Test, _) => "wave",
        (_, Some(Urgency::Critical)) => "rotating_light",
        (_, Some(Urgency::Warning | Urgency::Info)) => "warning",
        (_, None) => "white_check_mark",
    }
}

/// What a server takes for a topic: `topicRegex` in <https://github.com/binwiederhier/ntfy>, `server/server.go`.
fn read_topic(text: &str) -> Result<String, Rule> {
    let is_letter = |letter: char| letter.is_ascii_alphanumeric() || "-_".contains(letter);
    if (1..=64).contains(&text.len()) && text.chars().all(is_letter) {
        return Ok(text.to_owned());
    }
    wrong_form("must have 1 to 64 letters, digits, dashes and underscores")
}

fn read_token(text: &str) -> Result<String, Rule> {
    if text.is_empty() || text.len() > 200 {
        return Err((ViolationCode::Length, "must have 1 to 200 characters".to_owned()));
    }
    if text.bytes().all(|letter| letter.is_ascii_graphic()) {
        return Ok(text.to_owned());
    }
    wrong_form("must be an access token, such as tk_AgQdq7mVBoFD37zQVN29RhuMzNIz2")
}
