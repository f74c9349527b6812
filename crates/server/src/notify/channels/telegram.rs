//! A bot of Telegram that writes into a chat. <https://core.telegram.org/bots/api#sendmessage>

use std::time::Duration;

use axum::http::HeaderMap;
use pisync_core::ViolationCode;
use reqwest::Url;
use serde_json::{Map, Value, json};

use super::{
    Attempt, Channel, Delivery, JSON, Rendered,
    fields::{Fields, Rule, wrong_form},
    json_bytes, one, post, text_of, utf16_length,
};
use crate::notify::{Hidden, message::Message, sender::Sender};

/// A bot may send 20 messages a minute to one group.
/// <https://core.telegram.org/bots/faq#my-bot-is-hitting-limits-how-do-i-avoid-this>
pub(super) const SPACING: Duration = Duration::from_secs(3);

/// The most characters of `text`. <https://core.telegram.org/bots/api#sendmessage>
const LIMIT: usize = 4_096;

/// A chat in Telegram.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TelegramChannel {
    bot_token: Hidden<String>,
    chat_id: String,
    thread_id: Option<i64>,
}

impl TelegramChannel {
    fn read_thread(fields: &mut Fields) -> Option<i64> {
        let thread = fields.take("thread_id").filter(|thread| !thread.is_null())?;
        let read = thread.as_i64().filter(|thread| *thread > 0);
        if read.is_none() {
            fields.refuse("thread_id", ViolationCode::Type, "must be a positive number", None);
        }
        read
    }

    /// The body with the chat, which may have been put right since the message was rendered.
    fn addressed(&self, attempt: &Attempt<'_>) -> Option<Vec<u8>> {
        let mut body: Map<String, Value> = serde_json::from_slice(attempt.body).ok()?;
        body.insert("chat_id".to_owned(), self.chat_id.as_str().into());
        // A thread that was deleted is a reason for a refusal. Without it the message reaches the chat.
        if let Some(thread) = self.thread_id.filter(|_| !attempt.is_plain) {
            body.insert("message_thread_id".to_owned(), thread.into());
        }
        Some(json_bytes(&Value::Object(body)))
    }
}

impl Channel for TelegramChannel {
    fn read(fields: &mut Fields) -> Option<Self> {
        let bot_token = fields.required("bot_token", read_token);
        let chat_id = read_chat(fields);
        let thread_id = Self::read_thread(fields);
        Some(Self { bot_token: Hidden::new(bot_token?), chat_id: chat_id?, thread_id })
    }

    fn public(&self) -> Map<String, Value> {
        let mut fields = one("chat_id", self.chat_id.as_str());
        fields.insert("thread_id".to_owned(), self.thread_id.into());
        fields
    }

    fn secrets(&self) -> Map<String, Value> {
        one("bot_token", self.bot_token.reveal().as_str())
    }

    fn target(&self) -> Option<(&'static str, &Url)> {
        None
    }

    /// Without `parse_mode`: a text has no markup, so that nothing must be escaped and nothing can be refused for it.
    fn render(&self, message: &Message, template: Option<String>) -> Rendered {
        let text = text_of(message, template, Self::escape).fit(LIMIT, utf16_length);
        let plain = message.text().fit(LIMIT, utf16_length);
        Rendered {
            content_type: JSON.to_owned(),
            body: json_bytes(
                &json!({ "text": text, "link_preview_options": { "is_disabled": true } }),
            ),
            plain: Some(json_bytes(&json!({ "text": plain }))),
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
        let Some(body) = self.addressed(attempt) else {
            return Delivery::unanswered("the stored message is no JSON object".to_owned());
        };
        let mut url = sender.telegram().clone();
        // A token holds a colon, before which a relative URL would begin with a scheme.
        let Ok(mut path) = url.path_segments_mut() else {
            return Delivery::unanswered("Telegram's URL has no path".to_owned());
        };
        path.pop_if_empty().push(&format!("bot{}", self.bot_token.reveal())).push("sendMessage");
        drop(path);
        post(&url, HeaderMap::new(), body, attempt, sender, secrets).await
    }
}

/// A bot's token is its number and a random text. <https://core.telegram.org/bots/api#authorizing-your-bot>
fn read_token(text: &str) -> Result<String, Rule> {
    let is_random = |text: &str| {
        let is_letter = |letter: char| letter.is_ascii_alphanumeric() || "-_".contains(letter);
        (8..=200).contains(&text.len()) && text.chars().all(is_letter)
    };
    match text.split_once(':') {
        Some((number, rest)) if is_number(number) && is_random(rest) => Ok(text.to_owned()),
        _ => wrong_form("must be the token of a bot, such as 123456:ABC-DEF1234ghIkl"),
    }
}

/// People write the number of a chat as a number, too.
fn read_chat(fields: &mut Fields) -> Option<String> {
    let read = |text: &str| {
        let is_name = |name: &str| {
            let is_letter = |letter: char| letter.is_ascii_alphanumeric() || letter == '_';
            (1..=64).contains(&name.len()) && name.chars().all(is_letter)
        };
        let is_chat = match text.strip_prefix('@') {
            Some(name) => is_name(name),
            None => is_number(text.strip_prefix('-').unwrap_or(text)),
        };
        if is_chat {
            Ok(text.to_owned())
        } else {
            wrong_form(
                "must be a chat's number, such as -1001234567890, or a channel's name, such as @pisync",
            )
        }
    };
    fields.number_as_text("chat_id");
    fields.required("chat_id", read)
}

fn is_number(text: &str) -> bool {
    (1..=20).contains(&text.len()) && text.bytes().all(|digit| digit.is_ascii_digit())
}
