//! The kinds of channels, one file each: what is stored of a channel, how a message looks there, how it gets there, and
//! what the answer means. The API makes a [`ChannelConfig`] from a request; the dispatcher renders and delivers with it.
//! Its secrets are in clear text, and nothing here shows them.

mod discord;
mod email;
mod fields;
mod ntfy;
mod outcome;
mod slack;
mod teams;
mod telegram;
mod webhook;

use std::{fmt, future::Future, time::Duration};

use axum::http::HeaderMap;
use pisync_core::{Timestamp, Violation, ViolationCode};
use reqwest::Url;
use serde_json::{Map, Value};

use self::fields::{Fields, Rule, is_masked, masked};
pub use self::{
    discord::DiscordChannel,
    email::EmailChannel,
    ntfy::NtfyChannel,
    outcome::LONGEST_WAIT,
    slack::SlackChannel,
    teams::TeamsChannel,
    telegram::TelegramChannel,
    webhook::{FORMER_SECRET_VALID, MAX_HEADERS, SigningSecret, WebhookChannel},
};
use super::{
    Hidden,
    message::{Message, Text},
    sender::Sender,
    targets, template,
};

/// The media type of most bodies.
const JSON: &str = "application/json";

/// The kinds of channels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ChannelKind {
    /// Signed JSON for programs.
    Webhook,
    /// Slack's incoming webhooks.
    Slack,
    /// Discord's webhooks.
    Discord,
    /// Microsoft Teams, by a workflow or an incoming webhook.
    Teams,
    /// A topic of ntfy.
    Ntfy,
    /// A chat with a bot of Telegram.
    Telegram,
    /// An e-mail address.
    Email,
}

impl ChannelKind {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::Webhook,
        Self::Slack,
        Self::Discord,
        Self::Teams,
        Self::Ntfy,
        Self::Telegram,
        Self::Email,
    ];

    /// The word that stands for it, in requests and in the database.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Webhook => "webhook",
            Self::Slack => "slack",
            Self::Discord => "discord",
            Self::Teams => "teams",
            Self::Ntfy => "ntfy",
            Self::Telegram => "telegram",
            Self::Email => "email",
        }
    }

    /// The one that a word stands for.
    #[must_use]
    pub fn from_word(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.as_str() == word)
    }

    /// How long to wait between two attempts at one channel. Each kind's file says why.
    #[must_use]
    pub fn spacing(self) -> Duration {
        match self {
            Self::Webhook => webhook::SPACING,
            Self::Slack => slack::SPACING,
            Self::Discord => discord::SPACING,
            Self::Teams => teams::SPACING,
            Self::Ntfy => ntfy::SPACING,
            Self::Telegram => telegram::SPACING,
            Self::Email => email::SPACING,
        }
    }
}

/// A message as a channel's service takes it. It is rendered once; every attempt sends the same bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rendered {
    /// The media type of both bodies.
    pub content_type: String,
    /// The message.
    pub body: Vec<u8>,
    /// What to send instead when the service refuses the message: without markup, and without a template's text. A
    /// webhook's receiver gets nothing else than what it was promised.
    pub plain: Option<Vec<u8>>,
}

/// One attempt.
#[derive(Debug, Clone, Copy)]
pub struct Attempt<'a> {
    /// The message's id, the same in every attempt.
    pub id: &'a str,
    /// [`Rendered::content_type`].
    pub content_type: &'a str,
    /// [`Rendered::body`] or [`Rendered::plain`].
    pub body: &'a [u8],
    /// Whether it is [`Rendered::plain`].
    pub is_plain: bool,
    /// The time.
    pub at: Timestamp,
}

/// How an attempt ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Delivery {
    /// The receiver has the message.
    Delivered {
        /// What it answered.
        status: u16,
    },
    /// It has not, or it cannot be told.
    Failed {
        /// What was answered, if anything was.
        status: Option<u16>,
        /// Why, in words for an administrator. They hold no secret.
        error: String,
        /// How long the receiver wants us to wait, at most [`LONGEST_WAIT`].
        retry_after: Option<Duration>,
        /// Whose fault it is.
        verdict: Verdict,
    },
}

/// Whose fault it is that an attempt failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The channel's: other messages would fail, too.
    Channel,
    /// The message's: the service refuses it as it is.
    Message,
    /// The receiver is gone for good, so that the channel is to be disabled.
    Disable,
}

impl Delivery {
    /// A failure without an answer.
    fn unanswered(error: String) -> Self {
        Self::Failed { status: None, error, retry_after: None, verdict: Verdict::Channel }
    }
}

/// What each kind of channel can do.
trait Channel: Sized {
    /// Reads the fields of a request or of the store.
    fn read(fields: &mut Fields) -> Option<Self>;

    /// The fields that may be shown.
    fn public(&self) -> Map<String, Value>;

    /// The secret fields, in clear text.
    fn secrets(&self) -> Map<String, Value>;

    /// The URL that is posted to, with the field in which it stands; `None` when no field holds one.
    fn target(&self) -> Option<(&'static str, &Url)>;

    /// The message as the service takes it. `template` is the text that the channel's template made of it.
    fn render(&self, message: &Message, template: Option<String>) -> Rendered;

    /// How values in a template are written, so that they are text and no markup.
    fn escape(text: &str) -> String;

    /// Makes an attempt.
    fn deliver(
        &self,
        attempt: &Attempt<'_>,
        sender: &Sender,
        secrets: &[String],
    ) -> impl Future<Output = Delivery> + Send;
}

/// What a channel is, with its secrets in clear text. Its [`fmt::Debug`] hides them.
#[derive(Clone, PartialEq, Eq)]
pub enum ChannelConfig {
    /// Signed JSON for programs.
    Webhook(WebhookChannel),
    /// Slack.
    Slack(SlackChannel),
    /// Discord.
    Discord(DiscordChannel),
    /// Microsoft Teams.
    Teams(TeamsChannel),
    /// ntfy.
    Ntfy(NtfyChannel),
    /// Telegram.
    Telegram(TelegramChannel),
    /// E-mail.
    Email(EmailChannel),
}

/// Calls the same function of whichever kind it is.
macro_rules! each {
    ($config:expr, $channel:ident => $call:expr) => {
        match $config {
            ChannelConfig::Webhook($channel) => $call,
            ChannelConfig::Slack($channel) => $call,
            ChannelConfig::Discord($channel) => $call,
            ChannelConfig::Teams($channel) => $call,
            ChannelConfig::Ntfy($channel) => $call,
            ChannelConfig::Telegram($channel) => $call,
            ChannelConfig::Email($channel) => $call,
        }
    };
}

impl ChannelConfig {
    /// Reads the fields of a request: those of the kind, without `name`, `kind`, `enabled`, `default` and `template`. Secret
    /// fields that are left out are those of `present`, if that is of the same kind. Null takes an optional one away.
    ///
    /// A new webhook needs a `signing_secret`: the caller makes one ([`SigningSecret::generate`]) if the request has none.
    ///
    /// # Errors
    /// What is wrong with which fields.
    pub fn read(
        kind: ChannelKind,
        fields: &Map<String, Value>,
        present: Option<&Self>,
    ) -> Result<Self, Vec<Violation>> {
        let present = present.filter(|present| present.kind() == kind);
        let mut fields = fields.clone();
        let mut violations = Vec::new();
        for field in secret_fields(kind) {
            if fields.get(*field).is_some_and(is_masked) {
                let rule = "is masked; leave it out to keep it";
                violations.push(Violation::of(*field, ViolationCode::Format, rule, None));
                fields.remove(*field);
            }
        }
        for (field, kept) in present.map(Self::secrets).unwrap_or_default() {
            fields.entry(field).or_insert(kept);
        }
        match Self::read_all(kind, fields) {
            Ok(mut read) if violations.is_empty() => {
                if let (Self::Webhook(read), Some(Self::Webhook(present))) = (&mut read, present) {
                    read.keep_former(present);
                }
                Ok(read)
            }
            Ok(_) => Err(violations),
            Err(others) => {
                // A masked field is wrong already, and not missing besides.
                let masked = violations.len();
                for other in others {
                    if violations[..masked].iter().all(|known| known.field != other.field) {
                        violations.push(other);
                    }
                }
                Err(violations)
            }
        }
    }

    /// Reads a change: every field that is left out stays, secret or not.
    ///
    /// # Errors
    /// What is wrong with which fields.
    pub fn patch(&self, fields: &Map<String, Value>) -> Result<Self, Vec<Violation>> {
        let mut all = each!(self, channel => channel.public());
        all.extend(fields.clone());
        Self::read(self.kind(), &all, Some(self))
    }

    fn read_all(kind: ChannelKind, fields: Map<String, Value>) -> Result<Self, Vec<Violation>> {
        fn of<C: Channel>(
            fields: Map<String, Value>,
            make: fn(C) -> ChannelConfig,
        ) -> Result<ChannelConfig, Vec<Violation>> {
            let mut fields = Fields::of_secrets(fields);
            let read = C::read(&mut fields).map(make);
            let violations = fields.into_violations();
            match read {
                Some(read) if violations.is_empty() => Ok(read),
                _ => Err(violations),
            }
        }
        match kind {
            ChannelKind::Webhook => of(fields, Self::Webhook),
            ChannelKind::Slack => of(fields, Self::Slack),
            ChannelKind::Discord => of(fields, Self::Discord),
            ChannelKind::Teams => of(fields, Self::Teams),
            ChannelKind::Ntfy => of(fields, Self::Ntfy),
            ChannelKind::Telegram => of(fields, Self::Telegram),
            ChannelKind::Email => of(fields, Self::Email),
        }
    }

    /// Which kind it is.
    #[must_use]
    pub fn kind(&self) -> ChannelKind {
        match self {
            Self::Webhook(_) => ChannelKind::Webhook,
            Self::Slack(_) => ChannelKind::Slack,
            Self::Discord(_) => ChannelKind::Discord,
            Self::Teams(_) => ChannelKind::Teams,
            Self::Ntfy(_) => ChannelKind::Ntfy,
            Self::Telegram(_) => ChannelKind::Telegram,
            Self::Email(_) => ChannelKind::Email,
        }
    }

    fn secrets(&self) -> Map<String, Value> {
        each!(self, channel => channel.secrets())
    }

    /// Its fields as they are answered. Of a secret only the end is shown, such as `…x7Qa`.
    #[must_use]
    pub fn masked(&self) -> Map<String, Value> {
        let mut fields = each!(self, channel => channel.public());
        fields.extend(self.secrets().iter().map(|(field, value)| (field.clone(), masked(value))));
        fields
    }

    /// Its fields as they are stored: what is public, and the secrets as JSON that must be encrypted.
    #[must_use]
    pub fn stored(&self) -> (Value, Vec<u8>) {
        let mut secrets = self.secrets();
        if let Self::Webhook(channel) = self {
            secrets.extend(channel.stored_former());
        }
        let public = each!(self, channel => channel.public());
        (Value::Object(public), Value::Object(secrets).to_string().into_bytes())
    }

    /// Reads what [`Self::stored`] gave; `None` when it is something else.
    #[must_use]
    pub fn from_stored(kind: ChannelKind, public: &Value, secrets: &[u8]) -> Option<Self> {
        let secrets: Map<String, Value> = serde_json::from_slice(secrets).ok()?;
        let mut fields = public.as_object()?.clone();
        fields.extend(secrets);
        let former = fields.remove(webhook::FORMER);
        let mut read = Self::read_all(kind, fields).ok()?;
        if let (Self::Webhook(channel), Some(former)) = (&mut read, former) {
            channel.set_former(&former)?;
        }
        Some(read)
    }

    /// The same channel with another signing secret. The present one signs, too, until `until`. `None` for kinds that
    /// sign nothing.
    #[must_use]
    pub fn rotated(&self, secret: SigningSecret, until: Timestamp) -> Option<Self> {
        match self {
            Self::Webhook(channel) => Some(Self::Webhook(channel.rotated(secret, until))),
            _ => None,
        }
    }

    /// Checks that the channel can be reached, before it is stored.
    ///
    /// # Errors
    /// When its URL leads to an address that may not be reached, or when there is no server for e-mail.
    pub async fn check_target(&self, sender: &Sender) -> Result<(), Violation> {
        if self.kind() == ChannelKind::Email && !sender.has_smtp() {
            let rule = "cannot be email: there is no server for it; set SMTP_URL and SMTP_FROM";
            return Err(Violation::of("kind", ViolationCode::Conflict, rule, None));
        }
        let Some((field, url)) = each!(self, channel => channel.target()) else { return Ok(()) };
        sender.check(url).await.map_err(|refusal| {
            Violation::of(field, ViolationCode::Conflict, &refusal.to_string(), None)
        })
    }

    /// The message as the channel's service takes it. Where the template fails, the built-in text stands.
    #[must_use]
    pub fn render(&self, message: &Message, template: Option<&str>) -> Rendered {
        fn of<C: Channel>(channel: &C, message: &Message, template: Option<&str>) -> Rendered {
            let text = template.and_then(|template| template::render(template, message, C::escape));
            channel.render(message, text)
        }
        each!(self, channel => of(channel, message, template))
    }

    /// Makes an attempt. It ends within the sender's time.
    pub async fn deliver(&self, attempt: &Attempt<'_>, sender: &Sender) -> Delivery {
        let secrets = self.redactable();
        each!(self, channel => channel.deliver(attempt, sender, &secrets).await)
    }

    /// Texts that must not appear in what is kept of a receiver's answer: the secrets, and the parts of secret URLs.
    fn redactable(&self) -> Vec<String> {
        /// Shorter parts, such as `v2`, are no secrets.
        const LEAST: usize = 6;
        let mut texts = Vec::new();
        let mut values: Vec<Value> = self.secrets().into_iter().map(|(_, value)| value).collect();
        while let Some(value) = values.pop() {
            match value {
                Value::String(secret) => {
                    if let Ok(url) = Url::parse(&secret) {
                        let path = url[url::Position::BeforePath..].to_owned();
                        let decoded = percent_encoding::percent_decode_str(&path)
                            .decode_utf8_lossy()
                            .into_owned();
                        let parts = [&path, &decoded].map(|path| {
                            let parts = path.split(['/', '?', '&', '=', '#']);
                            parts
                                .filter(|part| part.len() >= LEAST)
                                .map(str::to_owned)
                                .collect::<Vec<_>>()
                        });
                        texts.extend(parts.into_iter().flatten());
                        texts.extend([path, decoded]);
                    }
                    // A value of a header may begin with its scheme (`Bearer`), and a signing secret with `whsec_`.
                    let pieces = secret.split([' ', '_']).filter(|piece| piece.len() >= LEAST);
                    texts.extend(pieces.map(str::to_owned));
                    texts.push(secret);
                }
                Value::Object(fields) => values.extend(fields.into_iter().map(|(_, value)| value)),
                _ => {}
            }
        }
        texts
    }
}

impl fmt::Debug for ChannelConfig {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let public = each!(self, channel => channel.public());
        formatter.debug_tuple(self.kind().as_str()).field(&Value::Object(public)).finish()
    }
}

/// The fields of a kind that are never shown.
fn secret_fields(kind: ChannelKind) -> &'static [&'static str] {
    match kind {
        ChannelKind::Webhook => &["url", "signing_secret", "headers"],
        ChannelKind::Slack | ChannelKind::Discord | ChannelKind::Teams => &["url"],
        ChannelKind::Ntfy => &["topic", "token"],
        ChannelKind::Telegram => &["bot_token"],
        ChannelKind::Email => &[],
    }
}

/// Reads the field `url`.
fn url(fields: &mut Fields) -> Option<Hidden<Url>> {
    fields.required("url", read_url).map(Hidden::new)
}

fn read_url(text: &str) -> Result<Url, Rule> {
    targets::read_url(text).map_err(|words| (ViolationCode::Format, words.to_owned()))
}

/// An object with one secret text.
fn one(field: &str, value: impl Into<Value>) -> Map<String, Value> {
    Map::from_iter([(field.to_owned(), value.into())])
}

/// A text for people: what the template made, or what is built in.
fn text_of(message: &Message, template: Option<String>, escape: fn(&str) -> String) -> Text {
    let text = message.text();
    match template {
        // What the template itself writes is meant as it stands, and its values are escaped already.
        Some(made) => Text::of_template(&made, text.link),
        None => text.map(escape),
    }
}

/// Posts a message and judges the answer.
async fn post(
    url: &Url,
    headers: HeaderMap,
    body: Vec<u8>,
    attempt: &Attempt<'_>,
    sender: &Sender,
    secrets: &[String],
) -> Delivery {
    match sender.post(url, attempt.content_type, headers, body).await {
        Ok(answer) => outcome::judge(&answer, secrets, attempt.at),
        Err(error) => Delivery::unanswered(super::redact(&error, secrets)),
    }
}

/// The bytes of a JSON value.
fn json_bytes(value: &Value) -> Vec<u8> {
    value.to_string().into_bytes()
}

/// How many bytes a text takes in JSON, without its quotation marks.
fn json_length(text: &str) -> usize {
    Value::from(text).to_string().len() - 2
}

/// How many units of UTF-16 a text has. Services of which it is not known count letters so, or fewer.
fn utf16_length(text: &str) -> usize {
    text.encode_utf16().count()
}

#[cfg(test)]
mod tests;
