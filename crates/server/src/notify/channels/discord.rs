//! Discord's webhooks. <https://discord.com/developers/docs/resources/webhook#execute-webhook>

use std::time::Duration;

use axum::http::HeaderMap;
use reqwest::Url;
use serde_json::{Map, Value, json};

use super::{
    Attempt, Channel, Delivery, JSON, Rendered, fields::Fields, json_bytes, one, post, text_of,
    url, utf16_length,
};
use crate::notify::{Hidden, message::Message, sender::Sender};

/// A webhook may be used 30 times a minute. It is no published number: answers tell what is left.
/// <https://discord.com/developers/docs/topics/rate-limits>
pub(super) const SPACING: Duration = Duration::from_secs(2);

/// The most characters of `content`. <https://discord.com/developers/docs/resources/webhook#execute-webhook>
const LIMIT: usize = 2_000;

/// `SUPPRESS_EMBEDS`: the link is not shown as a picture of its page.
/// <https://discord.com/developers/docs/resources/message#message-object-message-flags>
const FLAGS: u64 = 1 << 2;

/// A channel in Discord.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiscordChannel {
    url: Hidden<Url>,
}

impl Channel for DiscordChannel {
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
            text.subject = format!("**{}**", text.subject);
        }
        let plain = message.text().map(Self::escape).fit(LIMIT, utf16_length);
        // No name of a device and no template can ping anybody.
        let mentions = json!({ "parse": [] });
        let body = json!({
            "content": text.fit(LIMIT, utf16_length), "allowed_mentions": mentions, "flags": FLAGS,
        });
        Rendered {
            content_type: JSON.to_owned(),
            body: json_bytes(&body),
            plain: Some(json_bytes(&json!({ "content": plain, "allowed_mentions": mentions }))),
        }
    }

    /// A backslash makes text of the marks of Discord's Markdown; a dash is one at a line's beginning.
    fn escape(text: &str) -> String {
        let mut escaped = String::with_capacity(text.len());
        for (at, letter) in text.char_indices() {
            if "\\*_~`|>#[]()<:@".contains(letter) || at == 0 && "-+".contains(letter) {
                escaped.push('\\');
            }
            escaped.push(letter);
        }
        escaped
    }

    async fn deliver(
        &self,
        attempt: &Attempt<'_>,
        sender: &Sender,
        secrets: &[String],
    ) -> Delivery {
        // Otherwise Discord answers before it has stored the message, and without saying that it could not.
        let mut url = self.url.reveal().clone();
        if !url.query_pairs().any(|(name, _)| name == "wait") {
            url.query_pairs_mut().append_pair("wait", "true");
        }
        post(&url, HeaderMap::new(), attempt.body.to_vec(), attempt, sender, secrets).await
    }
}
