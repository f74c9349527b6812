//! The replay of a fleet's past: what a store has kept happens once more, on another store, under what is set now. [`History`]
//! is its input, and the incidents and messages that come of it are its answer. The server's own sweeps run over it, see
//! `course`.

use std::sync::Arc;

use pisync_core::{
    GroupName, Timestamp,
    health::{Pause, Policy},
};

use super::{
    BacktestError, History,
    course::{Course, ticks},
    receivers::{SentMessage, create_receivers},
};
use crate::store::{
    Actor, Batch, DeviceChange, FleetWindow, Incident, IncidentQuery, LevelChange, LevelSettings,
    MOST_ROSTER_ROWS, NewWindow, PauseChange, PolicyUpdate, RosterRow, Store, Via,
};

/// Settings are taken to have been as they are for this long before the beginning, in milliseconds: 400 days, more than the
/// longest interval that can be expected. Otherwise waiting would begin anew with the replay.
const SET_BEFORE: i64 = 400 * 24 * 60 * 60 * 1000;

/// The most reports that are written at a time.
const WRITTEN_AT_ONCE: usize = 1_000;

/// The most incidents that are read at a time.
const INCIDENTS_AT_ONCE: u32 = 1_000;

/// What came of a history.
#[derive(Debug)]
pub struct Replayed {
    /// The incidents, in the order in which they opened.
    pub incidents: Vec<Incident>,
    /// What people would have been told, in the order in which it would have been sent.
    pub messages: Vec<SentMessage>,
}

/// Replays a history on an empty store, and answers what came of it. `policy` takes the place of the fleet's. Those of groups
/// and devices stay as they are. Calls `watch` with the time that it has come to, and the number of reports so far.
///
/// # Errors
/// See [`BacktestError`].
pub async fn replay(
    history: &History,
    policy: Option<&Policy>,
    store: &Arc<dyn Store>,
    mut watch: impl FnMut(Timestamp, u64),
) -> Result<Replayed, BacktestError> {
    let mut course = Course::new(history.from, store)?;
    create_receivers(&**store, &history.channels, &history.routes, history.from).await?;
    course.read_routes().await?;
    let mut happenings = happenings(history, policy).into_iter().peekable();
    while let Some((at, happening)) = happenings.next_if(|(at, _)| *at < history.from) {
        happening.happen(at, &mut course).await?;
    }
    let mut next = 0;
    while next < history.earlier_count() {
        let end = history.earlier_count().min(next + WRITTEN_AT_ONCE);
        write(history, next..end, history.from, &mut course).await?;
        next = end;
    }
    // This server has lived until now, or is away.
    if course.is_up() {
        store.pass_over(history.from).await?;
    }
    for now in ticks(history.from, history.until) {
        while let Some((at, happening)) = happenings.next_if(|(at, _)| *at <= now) {
            happening.happen(at, &mut course).await?;
        }
        loop {
            let mut end = next;
            while end - next < WRITTEN_AT_ONCE && history.received(end).is_some_and(|at| at <= now)
            {
                end += 1;
            }
            if end == next {
                break;
            }
            write(history, next..end, now, &mut course).await?;
            next = end;
        }
        course.tick(now).await?;
        watch(now, (next - history.earlier_count()) as u64);
    }
    let incidents = all_incidents(&**store).await?;
    Ok(Replayed { incidents, messages: course.messages })
}

/// Stores reports, each as of the time at which it was received.
async fn write(
    history: &History,
    positions: std::ops::Range<usize>,
    now: Timestamp,
    course: &mut Course,
) -> Result<(), BacktestError> {
    let received_at = positions.clone().filter_map(|position| history.received(position)).collect();
    let events = positions.map(|position| history.event(position)).collect::<Result<_, _>>()?;
    let batch = Batch { received_at, ..Batch::new(now, events) };
    course.writer.write(&Arc::new(batch)).await?;
    course.note_news();
    Ok(())
}

/// Something that happened besides reports.
enum Happening {
    /// Devices became known, or something is said about them from now on.
    Devices(Vec<RosterRow>),
    /// Something is set for a group.
    Group(GroupName, LevelChange),
    /// Something is set for the fleet.
    Fleet(LevelChange),
    /// There is a window.
    Window(NewWindow),
    /// From now on nobody could be heard.
    OutageBegins,
    /// Somebody was there again.
    OutageEnds,
}

impl Happening {
    async fn happen(self, at: Timestamp, course: &mut Course) -> Result<(), BacktestError> {
        let by = Actor { via: Via::CommandLine, address: None, at };
        let store = Arc::clone(&course.store);
        course.note_news();
        match self {
            Self::Devices(rows) => {
                store.put_roster(&rows, false, &by).await?;
            }
            Self::Group(name, change) => {
                store.update_group(&name, &change, true, &by).await?;
            }
            Self::Fleet(change) => store.update_fleet(&change, &by).await?,
            Self::Window(window) => {
                store.create_window(&window, &by).await?;
            }
            Self::OutageBegins => course.go_away(at).await?,
            Self::OutageEnds => course.come_back(at).await?,
        }
        Ok(())
    }
}

/// All that happened besides reports, in the order of time.
fn happenings(history: &History, policy: Option<&Policy>) -> Vec<(Timestamp, Happening)> {
    let settings = &history.settings;
    let before = history.from.saturating_add_milliseconds(-SET_BEFORE);
    let mut all = Vec::new();
    let fleet = LevelSettings {
        policy: policy.unwrap_or(&settings.fleet.policy).clone(),
        ..settings.fleet.clone()
    };
    for (at, change) in level_changes(&fleet, before, history.until) {
        all.push((at, Happening::Fleet(change)));
    }
    for (name, level) in &settings.groups {
        // Foreign SQL may have made a name that no group can have.
        let Ok(name) = GroupName::new(name) else { continue };
        for (at, change) in level_changes(level, before, history.until) {
            all.push((at, Happening::Group(name.clone(), change)));
        }
    }
    all.extend(settings.windows.iter().map(|window| (before, Happening::Window(new(window)))));
    let mut rows = device_changes(history, before);
    rows.sort_by_key(|(at, _)| *at);
    for same in rows.chunk_by(|(left, _), (right, _)| left == right) {
        let at = same[0].0;
        for rows in same.chunks(MOST_ROSTER_ROWS) {
            let rows = rows.iter().map(|(_, row)| row.clone()).collect();
            all.push((at, Happening::Devices(rows)));
        }
    }
    let mut last_end = Timestamp::MIN;
    for outage in &settings.outages {
        let (from, until) = (outage.from.max(last_end), outage.until.min(history.until));
        if from < until {
            all.push((from, Happening::OutageBegins));
            all.push((until, Happening::OutageEnds));
            last_end = until;
        }
    }
    // The sort keeps the order of equal times: what is set for all comes before its devices.
    all.sort_by_key(|(at, _)| *at);
    all
}

/// What is said about devices, and when; of one time, no device is named twice. A device has always been in the group in which
/// it is now.
fn device_changes(history: &History, before: Timestamp) -> Vec<(Timestamp, RosterRow)> {
    let mut rows = Vec::new();
    for device in &history.devices {
        let settings = &device.settings;
        let is_new = device.registered_at >= history.from;
        let known = if is_new { device.registered_at } else { before };
        let expected_from = settings.expected_from.filter(|_| !settings.is_excused);
        let pause = pause_change(settings.level.pause, known, history.until);
        let mut times = vec![known];
        times.extend(expected_from.filter(|from| (known..history.until).contains(from)));
        times.extend(pause.map(|(at, _)| at));
        times.sort_unstable();
        times.dedup();
        for at in times {
            let mut change = DeviceChange {
                pause: pause.filter(|(begin, _)| *begin == at).map(|(_, pause)| pause),
                // A roster expects whoever it names, unless it says otherwise.
                expected: Some(match () {
                    () if settings.is_excused => Some(false),
                    () if expected_from.is_some_and(|from| from <= at) => Some(true),
                    () => None,
                }),
                ..DeviceChange::default()
            };
            if at == known {
                let policy = &settings.level.policy;
                change.group = Some(device.group.clone());
                change.tags = Some(settings.tags.clone());
                change.policy = (!policy.is_empty()).then(|| PolicyUpdate::Replace(policy.clone()));
            }
            rows.push((at, RosterRow { device_id: device.device_id.clone(), change }));
        }
    }
    rows
}

/// The changes by which a level becomes what it is.
fn level_changes(
    level: &LevelSettings,
    before: Timestamp,
    until: Timestamp,
) -> Vec<(Timestamp, LevelChange)> {
    let policy = PolicyUpdate::Replace(level.policy.clone());
    let mut changes =
        vec![(before, LevelChange { policy: Some(policy), ..LevelChange::default() })];
    if let Some((at, pause)) = pause_change(level.pause, before, until) {
        changes.push((at, LevelChange { pause: Some(pause), ..LevelChange::default() }));
    }
    changes
}

/// The change by which a pause began, unless it came after the end.
fn pause_change(
    pause: Option<Pause>,
    earliest: Timestamp,
    until: Timestamp,
) -> Option<(Timestamp, PauseChange)> {
    let pause = pause?;
    let at = pause.from.max(earliest);
    (at < until).then_some((at, PauseChange::Until(pause.until)))
}

fn new(window: &FleetWindow) -> NewWindow {
    let FleetWindow { id: _, name, scope, effect, timezone, times } = window.clone();
    NewWindow { name, scope, effect, timezone, times }
}

/// All incidents, in the order in which they opened.
async fn all_incidents(store: &dyn Store) -> Result<Vec<Incident>, BacktestError> {
    let mut all = Vec::new();
    for is_resolved in [false, true] {
        let mut query = IncidentQuery {
            is_resolved,
            kind: None,
            scope: None,
            group: None,
            device_id: None,
            since: None,
            limit: INCIDENTS_AT_ONCE,
            after: None,
        };
        loop {
            let page = store.incidents(&query).await?;
            all.extend(page.incidents);
            match page.next {
                Some(next) => query.after = Some(next),
                None => break,
            }
        }
    }
    all.sort_by_key(|incident| (incident.opened_at, incident.id));
    Ok(all)
}
