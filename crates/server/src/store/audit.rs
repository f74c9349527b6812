//! The audit log: who changed what, and when. The API reads it. Each line is written in the transaction of the change
//! that it describes; no line may ever be changed or removed.

use std::collections::BTreeSet;

use async_trait::async_trait;
use pisync_core::{DeviceId, GroupName, Timestamp};
use serde_json::{Value, json};

use super::{
    ChannelUpdate, DeviceChange, LevelChange, NewAcknowledgement, NewChannel, NewKey, NewWindow,
    RosterOutcome, Route, StoreError, incidents::details_of,
};

/// The audit log. Lines are added by the methods that change something.
#[async_trait]
pub trait AuditLog: Send + Sync {
    /// The newest lines, or those before the line `before`.
    async fn audit(&self, before: Option<i64>, limit: u32) -> Result<Vec<AuditEntry>, StoreError>;

    /// The number of lines. They are counted up to `most`, because the log only grows.
    async fn audit_length(&self, most: u32) -> Result<u64, StoreError>;
}

/// One line of the audit log.
#[derive(Debug)]
pub struct AuditEntry {
    /// The line's id; it grows with time.
    pub id: i64,
    /// When it was done.
    pub at: Timestamp,
    /// How the actor was admitted; [`super::Via::as_str`].
    pub via: String,
    /// The actor's key.
    pub key_id: Option<i64>,
    /// The address from which the actor came.
    pub address: Option<String>,
    /// What was done, for instance `device.delete`.
    pub action: String,
    /// What was changed, for instance a device's id.
    pub subject: String,
    /// Details, as a JSON object.
    pub details: Value,
}

/// The content of a line; the actor is added to it.
pub(super) struct NewAuditEntry {
    pub(super) action: &'static str,
    pub(super) subject: String,
    pub(super) details: String,
}

impl NewAuditEntry {
    fn new(action: &'static str, subject: impl Into<String>, details: &Value) -> Self {
        Self { action, subject: subject.into(), details: details.to_string() }
    }

    pub(super) fn key_created(id: i64, key: &NewKey) -> Self {
        Self::new("key.create", id.to_string(), &key.details())
    }

    pub(super) fn key_revoked(id: i64) -> Self {
        Self::new("key.revoke", id.to_string(), &json!({}))
    }

    pub(super) fn device_updated(device_id: &DeviceId, change: &DeviceChange) -> Self {
        Self::new("device.update", device_id.as_str(), &change.details())
    }

    pub(super) fn device_created(device_id: &DeviceId, change: &DeviceChange) -> Self {
        Self::new("device.create", device_id.as_str(), &change.details())
    }

    pub(super) fn roster_put(outcome: &RosterOutcome) -> Self {
        let RosterOutcome { created, updated, unchanged, not_listed } = outcome;
        let details = json!({
            "created": created,
            "updated": updated,
            "unchanged": unchanged,
            "not_listed": not_listed,
        });
        Self::new("roster.put", "", &details)
    }

    pub(super) fn group_updated(name: &GroupName, change: &LevelChange) -> Self {
        Self::new("group.update", name.as_str(), &change.details())
    }

    pub(super) fn group_deleted(name: &GroupName, devices: u64) -> Self {
        Self::new("group.delete", name.as_str(), &json!({ "devices": devices }))
    }

    pub(super) fn fleet_updated(change: &LevelChange) -> Self {
        Self::new("fleet.update", "", &change.details())
    }

    pub(super) fn window_created(id: i64, window: &NewWindow) -> Self {
        Self::new("window.create", id.to_string(), &window.details())
    }

    pub(super) fn window_replaced(id: i64, window: &NewWindow) -> Self {
        Self::new("window.update", id.to_string(), &window.details())
    }

    pub(super) fn window_deleted(id: i64, name: &str) -> Self {
        Self::new("window.delete", id.to_string(), &json!({ "name": name }))
    }

    pub(super) fn channel_created(id: i64, channel: &NewChannel, is_default: bool) -> Self {
        Self::new("channel.create", id.to_string(), &channel.details(is_default))
    }

    pub(super) fn channel_updated(id: i64, update: &ChannelUpdate) -> Self {
        Self::new(update.action(), id.to_string(), &update.details())
    }

    pub(super) fn channel_deleted(id: i64, name: &str, waiting: u64) -> Self {
        let details = json!({ "name": name, "dropped_notifications": waiting });
        Self::new("channel.delete", id.to_string(), &details)
    }

    pub(super) fn routes_replaced(routes: &[Route]) -> Self {
        // All of them may be as long as thousands of other lines.
        let channels: BTreeSet<_> = routes.iter().flat_map(|route| &route.channels).collect();
        let details = json!({ "routes": routes.len(), "channels": channels });
        Self::new("routes.put", "", &details)
    }

    pub(super) fn secrets_resealed(channels: u64) -> Self {
        Self::new("secrets.rekey", "", &json!({ "channels": channels }))
    }

    /// An incident was acknowledged; `None`: that was withdrawn.
    pub(super) fn acknowledged(id: i64, acknowledgement: Option<&NewAcknowledgement>) -> Self {
        let details = acknowledgement.map_or_else(|| json!({}), |given| details_of(Some(given)));
        let action =
            if acknowledgement.is_some() { "incident.acknowledge" } else { "incident.withdraw" };
        Self::new(action, id.to_string(), &details)
    }

    /// A message that was given up is sent again.
    pub(super) fn notification_retried(id: i64) -> Self {
        Self::new("notification.retry", id.to_string(), &json!({}))
    }

    pub(super) fn device_deleted(device_id: &DeviceId, events: u64) -> Self {
        Self::new("device.delete", device_id.as_str(), &json!({ "deleted_events": events }))
    }
}

/// The details as they are stored. Foreign SQL may have written text that is no JSON.
pub(super) fn stored_details(text: String) -> Value {
    serde_json::from_str(&text).unwrap_or(Value::String(text))
}
