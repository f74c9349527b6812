//! A sweep: it evaluates the devices whose kept state contradicts what is known, and makes incidents match. It keeps nothing
//! in memory, and does nothing but short transactions; when it ends in the middle, the next one does the rest. The server
//! runs one every 15 s, and a backtest one at each instant of its simulated time.

use std::sync::Arc;

use pisync_core::{Timestamp, health::Resolution};

use crate::store::{
    DEVICES_PER_STEP, FleetSettings, IncidentChange, IncidentEvent, Store, StoreError, WindowScope,
};

/// What a sweep has done.
#[derive(Debug, Default)]
pub struct Swept {
    /// How many devices were evaluated.
    pub evaluated: usize,
    /// How many of them are in another state than before.
    pub changes: usize,
    /// What became of incidents.
    pub events: Vec<IncidentEvent>,
    /// Whether it went through. If not, another server was at it.
    pub is_complete: bool,
}

impl Swept {
    /// Logs what people would want to know.
    pub(super) fn log(&self) {
        for event in &self.events {
            let (id, subject) = (event.id, &event.subject);
            let (scope, kind) = (event.scope.as_str(), event.kind.as_str());
            let (severity, since) = (event.severity.as_str(), event.since);
            match event.what {
                IncidentChange::Resolved => tracing::info!(
                    incident = id,
                    scope,
                    subject,
                    kind,
                    resolution = event.resolution.map(Resolution::as_str),
                    "incident resolved"
                ),
                IncidentChange::Opened | IncidentChange::Reopened | IncidentChange::Flapping => {
                    tracing::warn!(
                        incident = id,
                        scope,
                        subject,
                        kind,
                        severity,
                        %since,
                        devices = event.members,
                        "incident {}",
                        event.what.as_str()
                    );
                }
            }
        }
        if self.changes > 0 {
            tracing::debug!(
                evaluated = self.evaluated,
                changes = self.changes,
                "devices are in another state"
            );
        }
    }
}

/// Sweeps at `now`.
///
/// # Errors
/// Those of the store. What was done until then stays done.
pub async fn sweep(store: &dyn Store, now: Timestamp) -> Result<Swept, StoreError> {
    let mut swept = Swept::default();
    let settings = Arc::new(store.fleet_settings().await?);
    let contradicted = store.contradicted_devices(now).await?;
    if !evaluate(store, &contradicted, &settings, now, &mut swept).await?
        || !evaluate_changed(store, &settings, now, &mut swept).await?
        || !reconcile(store, &settings, now, &mut swept).await?
    {
        return Ok(swept);
    }
    let Some(events) = store.reconcile_channels(&settings, now).await? else { return Ok(swept) };
    swept.events.extend(events);
    store.add_reminders(&settings, now).await?;
    swept.is_complete = store.end_sweep(settings.version, now).await?;
    Ok(swept)
}

/// Evaluates devices; false when another server is sweeping.
async fn evaluate(
    store: &dyn Store,
    devices: &[String],
    settings: &Arc<FleetSettings>,
    now: Timestamp,
    swept: &mut Swept,
) -> Result<bool, StoreError> {
    for devices in devices.chunks(DEVICES_PER_STEP) {
        let Some(step) = store.evaluate_devices(devices, settings, now).await? else {
            return Ok(false);
        };
        swept.evaluated += step.devices;
        swept.changes += step.changes;
    }
    Ok(true)
}

/// Evaluates the devices whose settings have changed since the last sweep.
async fn evaluate_changed(
    store: &dyn Store,
    settings: &Arc<FleetSettings>,
    now: Timestamp,
    swept: &mut Swept,
) -> Result<bool, StoreError> {
    let mut scopes: Vec<WindowScope> = Vec::new();
    for change in store.changes_to_sweep().await? {
        // What came later is for the next sweep.
        if change.version <= settings.version && !scopes.contains(&change.scope) {
            scopes.push(change.scope);
        }
    }
    if scopes.contains(&WindowScope::Fleet) {
        scopes = vec![WindowScope::Fleet];
    }
    let (devices, scopes): (Vec<_>, Vec<_>) =
        scopes.into_iter().partition(|scope| matches!(scope, WindowScope::Device(_)));
    let devices: Vec<String> = devices.iter().map(|scope| scope.key().to_owned()).collect();
    if !evaluate(store, &devices, settings, now, swept).await? {
        return Ok(false);
    }
    for scope in scopes {
        let mut after: Option<String> = None;
        loop {
            let devices = store.devices_in(&scope, after.as_deref()).await?;
            if !evaluate(store, &devices, settings, now, swept).await? {
                return Ok(false);
            }
            if devices.len() < DEVICES_PER_STEP {
                break;
            }
            after = devices.last().cloned();
        }
    }
    Ok(true)
}

/// Makes incidents from what was found; false when another server is at it.
async fn reconcile(
    store: &dyn Store,
    settings: &Arc<FleetSettings>,
    now: Timestamp,
    swept: &mut Swept,
) -> Result<bool, StoreError> {
    let Some(events) = store.reconcile_fleet(settings, now).await? else { return Ok(false) };
    swept.events.extend(events);
    for group in store.groups_to_reconcile(now).await? {
        loop {
            let Some(step) = store.reconcile_group(&group, settings, now).await? else {
                return Ok(false);
            };
            swept.events.extend(step.events);
            if !step.has_more {
                break;
            }
        }
    }
    Ok(true)
}
