//! How channels are made and changed, for the API and the command line alike: their fields are read, and their secrets
//! encrypted on the way to the store and opened on the way back. Nothing here answers, logs or repeats a secret, except a
//! signing secret to whoever has just made it.

use std::time::Instant;

use pisync_core::{Timestamp, Violation, ViolationCode};
use serde_json::{Map, Value};

use super::{
    channels::{Attempt, ChannelConfig, ChannelKind, Delivery, SigningSecret},
    message::Message,
    secrets::{Opener, Secrets},
    sender::Sender,
    template,
};
use crate::{
    api::wire::fields::{Fields, text},
    store::{
        Actor, Channel, ChannelCreation, ChannelOutcome, ChannelUpdate, MOST_CHANNELS, NewChannel,
        NewConfig, Store, StoreError, UpdateReason,
    },
};

/// The longest name, in characters.
const MAX_NAME: usize = 100;

/// How long a signing secret is still used beside the one that has replaced it, in milliseconds.
const ROTATION: i64 = 24 * 60 * 60 * 1000;

/// The field that is answered once.
const SIGNING_SECRET: &str = "signing_secret";

/// The fields that may be repeated when they are wrong. Any other may be a secret, or a misspelt one.
const NO_SECRETS: [&str; 4] = ["name", "kind", "enabled", "default"];

/// How often a change is tried again when others change channels at the same time.
const ATTEMPTS: usize = 10;

/// How a channel is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChannelState {
    /// It works, as far as is known.
    Ok,
    /// What was last sent did not arrive.
    Failing,
    /// Somebody, or its service, has switched it off.
    Disabled,
    /// Its secrets cannot be opened.
    Locked,
}

impl ChannelState {
    /// The word that stands for it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Failing => "failing",
            Self::Disabled => "disabled",
            Self::Locked => "locked",
        }
    }
}

/// A channel, and what it is told if its secrets could be opened.
#[derive(Debug)]
pub struct ChannelView {
    /// The channel as it is stored.
    pub channel: Channel,
    /// What it is told; `None` when it is locked.
    pub config: Option<ChannelConfig>,
}

impl ChannelView {
    /// Opens what is stored.
    #[must_use]
    pub fn new(channel: Channel, opener: &Opener) -> Self {
        let open = || {
            let kind = ChannelKind::from_word(&channel.kind)?;
            let secrets = match &channel.secrets {
                Some(sealed) => opener.open(channel.id, sealed)?,
                None => b"{}".to_vec(),
            };
            ChannelConfig::from_stored(kind, &channel.config, &secrets)
        };
        Self { config: open(), channel }
    }

    /// How the channel is.
    #[must_use]
    pub fn state(&self) -> ChannelState {
        match self {
            Self { channel, .. } if !channel.is_enabled => ChannelState::Disabled,
            Self { config: None, .. } => ChannelState::Locked,
            Self { channel, .. } if channel.failing_since.is_some() => ChannelState::Failing,
            Self { .. } => ChannelState::Ok,
        }
    }

    /// What may be shown of what it is told.
    #[must_use]
    pub fn masked(&self) -> Map<String, Value> {
        match (&self.config, &self.channel.config) {
            (Some(config), _) => config.masked(),
            (None, Value::Object(public)) => public.clone(),
            (None, _) => Map::new(),
        }
    }
}

/// Why something was not done to a channel.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// Fields are wrong.
    #[error("fields are wrong")]
    Fields(Vec<Violation>),
    /// There is no such channel.
    #[error("Channel not found")]
    Unknown,
    /// Another channel has the name.
    #[error("There is another channel with this name")]
    NameTaken,
    /// There are enough.
    #[error("There are {MOST_CHANNELS} channels already; delete some first")]
    TooMany,
    /// Only webhooks are signed.
    #[error("Channel has no signing secret: only webhooks have one")]
    NotSigned,
    /// Its secrets cannot be opened.
    #[error("Channel is locked: its secrets were stored under another key; send all of them anew")]
    Locked,
    /// There is no key under which secrets could be stored.
    #[error("Secrets cannot be stored: set SECRETS_KEY, and start the server again")]
    NoKey,
    /// Secrets cannot be encrypted, and why: it may name files.
    #[error("{0}")]
    NotSealed(String),
    /// Others have changed channels all the time.
    #[error("Channels were changed meanwhile; try again")]
    Stale,
    /// The system gives no random bytes.
    #[error("{0}")]
    Randomness(String),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// All channels, by id.
///
/// # Errors
/// When the store fails.
pub async fn channels<S: Store + ?Sized>(
    store: &S,
    secrets: &Secrets,
) -> Result<Vec<ChannelView>, StoreError> {
    let channels = store.channels().await?.channels;
    let opener = secrets.opener();
    Ok(channels.into_iter().map(|channel| ChannelView::new(channel, &opener)).collect())
}

/// One channel.
///
/// # Errors
/// [`ChannelError::Unknown`], or when the store fails.
pub async fn channel<S: Store + ?Sized>(
    store: &S,
    secrets: &Secrets,
    id: i64,
) -> Result<ChannelView, ChannelError> {
    let channels = channels(store, secrets).await?;
    channels.into_iter().find(|view| view.channel.id == id).ok_or(ChannelError::Unknown)
}

/// A channel that is to be made.
#[derive(Debug)]
pub struct ChannelRequest {
    name: String,
    config: ChannelConfig,
    is_enabled: bool,
    is_default: Option<bool>,
    template: Option<String>,
    /// The secret that a webhook signs with.
    signing_secret: Option<Shown>,
}

/// A secret that is shown once. `Debug` does not.
struct Shown(String);

impl std::fmt::Debug for Shown {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("[hidden]")
    }
}

/// The fields that all kinds have, as far as they are there.
struct Common {
    name: Option<String>,
    kind: Option<ChannelKind>,
    is_enabled: Option<bool>,
    is_default: Option<bool>,
    template: Option<Option<String>>,
    /// All others.
    rest: Map<String, Value>,
    violations: Vec<Violation>,
}

impl Common {
    /// Reads them. Those that `is_whole` needs must be there.
    fn read(mut fields: Fields, is_whole: bool) -> Self {
        let kind_of = |text: &str| {
            ChannelKind::from_word(text).ok_or_else(|| {
                format!("must be one of [{}]", ChannelKind::ALL.map(ChannelKind::as_str).join(", "))
            })
        };
        let (name, kind) = if is_whole {
            (fields.required("name", text(MAX_NAME)), fields.required("kind", kind_of))
        } else {
            let name = given(&mut fields, "name", text(MAX_NAME));
            (name, given(&mut fields, "kind", kind_of))
        };
        let is_enabled = boolean(&mut fields, "enabled");
        let is_default = boolean(&mut fields, "default");
        let template = fields.nullable("template", |text| Ok::<_, String>(text.to_owned()));
        let rest = fields.take_rest();
        let mut violations = fields.into_violations();
        if let Some(Some(text)) = &template {
            violations.extend(template::check(text).err());
        }
        Self { name, kind, is_enabled, is_default, template, rest, violations }
    }

    /// Reads the other fields, by the kind of the channel. Fails with everything that is wrong.
    fn config(
        &mut self,
        kind: Option<ChannelKind>,
        fields: &Map<String, Value>,
        present: Option<&ChannelConfig>,
    ) -> Result<ChannelConfig, ChannelError> {
        let mut violations = std::mem::take(&mut self.violations);
        // Of a kind that nobody knows, no field can be judged.
        let config = kind.and_then(|kind| match ChannelConfig::read(kind, fields, present) {
            Ok(config) => Some(config),
            Err(more) => {
                violations.extend(more);
                None
            }
        });
        match config {
            Some(config) if violations.is_empty() => Ok(config),
            // Foreign SQL has made it something that nobody can set.
            None if violations.is_empty() => Err(ChannelError::Locked),
            _ => Err(wrong(violations)),
        }
    }
}

/// A text that may be absent, but not null.
fn given<T, E: Into<crate::api::wire::fields::Rule>>(
    fields: &mut Fields,
    field: &'static str,
    read: impl FnOnce(&str) -> Result<T, E>,
) -> Option<T> {
    match fields.nullable(field, read)? {
        Some(value) => Some(value),
        None => {
            fields.refuse(field, ViolationCode::Type, "must be a string", Some(Value::Null));
            None
        }
    }
}

fn boolean(fields: &mut Fields, field: &'static str) -> Option<bool> {
    match fields.take(field)? {
        Value::Bool(value) => Some(value),
        value => {
            fields.refuse(field, ViolationCode::Type, "must be a boolean", Some(value));
            None
        }
    }
}

/// What is wrong, without what may be secrets.
fn wrong(mut violations: Vec<Violation>) -> ChannelError {
    for violation in &mut violations {
        if !NO_SECRETS.contains(&&*violation.field) {
            violation.value = None;
        }
    }
    ChannelError::Fields(violations)
}

/// What the store keeps of what a channel is told.
fn new_config(config: &ChannelConfig, secrets: &Secrets) -> Result<NewConfig, ChannelError> {
    let (public, own) = config.stored();
    // An e-mail channel has none, and needs no key.
    let has_secrets = own.as_slice() != b"{}";
    if has_secrets && !secrets.has_key() {
        return Err(ChannelError::NoKey);
    }
    Ok(NewConfig { public, secrets: has_secrets.then(|| secrets.seal(own)) })
}

/// Reads a channel that is to be made. A webhook without a signing secret gets one.
///
/// # Errors
/// [`ChannelError::Fields`] with every wrong field, or [`ChannelError::Randomness`].
pub(crate) fn read_new(fields: Fields, secrets: &Secrets) -> Result<ChannelRequest, ChannelError> {
    let mut common = Common::read(fields, true);
    let mut rest = std::mem::take(&mut common.rest);
    let mut signing_secret = None;
    if common.kind == Some(ChannelKind::Webhook) {
        if rest.get(SIGNING_SECRET).is_none_or(Value::is_null) {
            let made = secrets.new_signing_secret().map_err(ChannelError::Randomness)?;
            rest.insert(SIGNING_SECRET.to_owned(), made.into());
        }
        signing_secret =
            rest.get(SIGNING_SECRET).and_then(Value::as_str).map(|text| Shown(text.to_owned()));
    }
    let config = common.config(common.kind, &rest, None)?;
    let name = common.name.ok_or_else(|| ChannelError::Fields(Vec::new()))?;
    Ok(ChannelRequest {
        name,
        config,
        is_enabled: common.is_enabled.unwrap_or(true),
        is_default: common.is_default,
        template: common.template.flatten(),
        signing_secret,
    })
}

/// Makes a channel. Answers its id and, of a webhook, the secret that it signs with.
///
/// # Errors
/// See [`ChannelError`].
pub async fn create<S: Store + ?Sized>(
    store: &S,
    secrets: &Secrets,
    request: ChannelRequest,
    by: &Actor,
) -> Result<(i64, Option<String>), ChannelError> {
    let channel = NewChannel {
        name: request.name,
        kind: request.config.kind().as_str().to_owned(),
        config: new_config(&request.config, secrets)?,
        is_enabled: request.is_enabled,
        is_default: request.is_default,
        template: request.template,
    };
    match store.create_channel(&channel, by).await? {
        ChannelCreation::Created(id) => {
            tracing::info!(id, kind = channel.kind, "channel made");
            Ok((id, request.signing_secret.map(|Shown(secret)| secret)))
        }
        ChannelCreation::NameTaken => Err(ChannelError::NameTaken),
        ChannelCreation::TooMany => Err(ChannelError::TooMany),
        ChannelCreation::NotSealed(why) => Err(ChannelError::NotSealed(why)),
    }
}

/// How the fields of a request change a channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Change {
    /// `PATCH`: those that are left out stay.
    Merge,
    /// `PUT`: they are all that is said about it. Secrets that are left out stay.
    Replace,
}

/// Changes a channel by the fields of a request.
///
/// # Errors
/// See [`ChannelError`].
pub(crate) async fn update<S: Store + ?Sized>(
    store: &S,
    secrets: &Secrets,
    id: i64,
    fields: &Map<String, Value>,
    change: Change,
    by: &Actor,
) -> Result<(), ChannelError> {
    edit(store, secrets, id, by, |view| updated(view, fields, change, secrets)).await
}

/// What a request says of a channel: the common fields, and where and how it sends if that is set anew.
fn merged(
    view: &ChannelView,
    fields: &Map<String, Value>,
    change: Change,
) -> Result<(Common, Option<ChannelConfig>), ChannelError> {
    let ChannelView { channel, config: present } = view;
    let is_whole = change == Change::Replace;
    let mut common = Common::read(Fields::new(fields.clone()), is_whole);
    let kind = ChannelKind::from_word(&channel.kind);
    if common.kind.is_some() && common.kind != kind {
        // Messages that wait are written for its service.
        let rule = format!("must stay {}; make another channel for another kind", channel.kind);
        let sent = fields.get("kind").cloned();
        common.violations.push(Violation::of("kind", ViolationCode::Conflict, &rule, sent));
    }
    let mut rest = std::mem::take(&mut common.rest);
    let config = if is_whole || !rest.is_empty() {
        if let (false, Value::Object(public)) = (is_whole, &channel.config) {
            for (field, value) in public {
                rest.entry(field).or_insert_with(|| value.clone());
            }
        }
        Some(common.config(kind, &rest, present.as_ref())?)
    } else if common.violations.is_empty() {
        None
    } else {
        return Err(wrong(common.violations));
    };
    Ok((common, config))
}

/// Checks that a changed channel can be reached.
///
/// # Errors
/// See [`ChannelError`].
pub(crate) async fn check_changed<S: Store + ?Sized>(
    store: &S,
    secrets: &Secrets,
    sender: &Sender,
    id: i64,
    fields: &Map<String, Value>,
    change: Change,
) -> Result<(), ChannelError> {
    let view = channel(store, secrets, id).await?;
    match merged(&view, fields, change)?.1 {
        Some(config) => check_target(&config, sender).await,
        None => Ok(()),
    }
}

/// Checks that a channel can be reached.
///
/// # Errors
/// [`ChannelError::Fields`], see [`ChannelConfig::check_target`].
async fn check_target(config: &ChannelConfig, sender: &Sender) -> Result<(), ChannelError> {
    config.check_target(sender).await.map_err(|violation| wrong(vec![violation]))
}

/// Sends a test message at once, past what waits. Answers how that went, and how long it took in milliseconds.
///
/// # Errors
/// [`ChannelError::Locked`].
pub(crate) async fn send_test(
    view: &ChannelView,
    sender: &Sender,
    base_url: Option<&str>,
    now: Timestamp,
) -> Result<(Delivery, u64), ChannelError> {
    let config = view.config.as_ref().ok_or(ChannelError::Locked)?;
    let message = Message::test(now, base_url.map(str::to_owned));
    let rendered = config.render(&message, view.channel.template.as_deref());
    let attempt = Attempt {
        id: &format!("test_{:x}_{}", now.as_millisecond(), view.channel.id),
        content_type: &rendered.content_type,
        body: &rendered.body,
        is_plain: false,
        at: now,
    };
    let started = Instant::now();
    let delivery = config.deliver(&attempt, sender).await;
    Ok((delivery, u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX)))
}

impl ChannelRequest {
    /// Checks that the channel can be reached.
    ///
    /// # Errors
    /// [`ChannelError::Fields`], see [`ChannelConfig::check_target`].
    pub(crate) async fn check_target(&self, sender: &Sender) -> Result<(), ChannelError> {
        check_target(&self.config, sender).await
    }
}

/// What a request makes of a channel.
fn updated(
    view: &ChannelView,
    fields: &Map<String, Value>,
    change: Change,
    secrets: &Secrets,
) -> Result<ChannelUpdate, ChannelError> {
    let channel = &view.channel;
    let is_whole = change == Change::Replace;
    let (common, config) = merged(view, fields, change)?;
    let is_enabled = common.is_enabled.unwrap_or(is_whole || channel.is_enabled);
    let is_repair = config.is_some() || is_enabled && !channel.is_enabled;
    let template =
        common.template.unwrap_or_else(|| if is_whole { None } else { channel.template.clone() });
    Ok(ChannelUpdate {
        name: common.name.unwrap_or_else(|| channel.name.clone()),
        config: config.map(|config| new_config(&config, secrets)).transpose()?,
        is_enabled,
        is_default: common.is_default.unwrap_or(!is_whole && channel.is_default),
        template,
        reason: if is_repair { UpdateReason::Repair } else { UpdateReason::Setting },
    })
}

/// Gives a webhook a new signing secret, and answers it. The one before is used beside it for a day.
///
/// # Errors
/// See [`ChannelError`].
pub async fn rotate<S: Store + ?Sized>(
    store: &S,
    secrets: &Secrets,
    id: i64,
    by: &Actor,
) -> Result<String, ChannelError> {
    let made = secrets.new_signing_secret().map_err(ChannelError::Randomness)?;
    let until = by.at.saturating_add_milliseconds(ROTATION);
    edit(store, secrets, id, by, |view| {
        if view.channel.kind != ChannelKind::Webhook.as_str() {
            return Err(ChannelError::NotSigned);
        }
        let config = view.config.as_ref().ok_or(ChannelError::Locked)?;
        let secret = made.parse::<SigningSecret>();
        let secret = secret.map_err(|rule| ChannelError::Randomness(rule.to_owned()))?;
        let config = config.rotated(secret, until).ok_or(ChannelError::NotSigned)?;
        Ok(ChannelUpdate {
            name: view.channel.name.clone(),
            config: Some(new_config(&config, secrets)?),
            is_enabled: view.channel.is_enabled,
            is_default: view.channel.is_default,
            template: view.channel.template.clone(),
            reason: UpdateReason::Rotation,
        })
    })
    .await?;
    tracing::info!(id, "signing secret of a channel replaced");
    Ok(made)
}

/// Changes a channel to what `make` makes of it, again when others have changed channels in between.
async fn edit<S: Store + ?Sized>(
    store: &S,
    secrets: &Secrets,
    id: i64,
    by: &Actor,
    make: impl Fn(&ChannelView) -> Result<ChannelUpdate, ChannelError>,
) -> Result<(), ChannelError> {
    for _ in 0..ATTEMPTS {
        let list = store.channels().await?;
        let found = list.channels.into_iter().find(|channel| channel.id == id);
        let view = ChannelView::new(found.ok_or(ChannelError::Unknown)?, &secrets.opener());
        let update = make(&view)?;
        match store.update_channel(id, list.version, &update, by).await? {
            ChannelOutcome::Changed => return Ok(()),
            ChannelOutcome::Stale => {}
            ChannelOutcome::Unknown => return Err(ChannelError::Unknown),
            ChannelOutcome::NameTaken => return Err(ChannelError::NameTaken),
            ChannelOutcome::NotSealed(why) => return Err(ChannelError::NotSealed(why)),
        }
    }
    Err(ChannelError::Stale)
}
