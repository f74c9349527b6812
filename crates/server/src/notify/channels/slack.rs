//! Slack's incoming webhooks. <https://docs.slack.dev/messaging/sending-messages-using-incoming-webhooks>

use std::time::Duration;

use axum::http::HeaderMap;
use reqwest::Url;
use serde_json::{Map, Value, json};

use super::{
    Attempt, Channel, Delivery, JSON, Rendered, fields::Fields, json_bytes, one, post, text_of, url,
};
use crate::notify::{Hidden, message::Message, sender::Sender};

/// One message per second and channel; short bursts are allowed.
/// <https://docs.slack.dev/apis/web-api/rate-limits#posting_messages>
pub(super) const SPACING: Duration = Duration::from_secs(1);

/// A longer text may be split into several messages; beyond 40,000 characters it is truncated. 4,000 is what Slack
/// recommends. <https://api.slack.com/changelog/2018-04-truncating-really-long-messages>
const LIMIT: usize = 4_000;

/// A channel in Slack.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SlackChannel {
    url: Hidden<Url>,
}

impl Channel for SlackChannel {
    fn read(fields: &mut Fields) -> Option<Self> {
        url(fields).map(|url| Self { url })
    }

    fn public(&self) -> Map<String, Value> {
        Map::new()
    }

    fn secrets(&self) -> Map<String, Value> {
        one("url", self.url.reveal().as_str())
    }

    fn target(&self) -> Option<(&'static str, &Url)> {
        Some(("url", self.url.reveal()))
    }

    fn render(&self, message: &Message, template: Option<String>) -> Rendered {
        let is_built_in = template.is_none();
        let mut text = text_of(message, template, Self::escape);
        if is_built_in {
            text.subject = format!("*{}*", text.subject);
        }
        let characters = |text: &str| text.chars().count();
        let plain = message.text().map(Self::escape).fit(LIMIT, characters);
        Rendered {
            content_type: JSON.to_owned(),
            body: json_bytes(
                &json!({ "text": text.fit(LIMIT, characters), "unfurl_links": false }),
            ),
            plain: Some(json_bytes(&json!({ "text": plain, "mrkdwn": false }))),
        }
    }

    /// Three characters begin mentions and links, and only these are escaped.
    /// <https://docs.slack.dev/messaging/formatting-message-text#escaping>
    fn escape(text: &str) -> String {
        text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
    }

    async fn deliver(
        &self,
        attempt: &Attempt<'_>,
        sender: &Sender,
        secrets: &[String],
    ) -> Delivery {
        let body = attempt.body.to_vec();
        post(self.url.reveal(), HeaderMap::new(), body, attempt, sender, secrets).await
    }
}
