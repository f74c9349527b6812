//! The phases of a simulation that send something: devices make themselves known, get their groups, deliver their history,
//! and report live. Each phase has connections of its own, and ends when everything is answered.

use std::{
    cmp::Reverse,
    collections::BinaryHeap,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until};

use super::{
    Load, Pace, Report, Sending, SimulateError, Stage,
    event::{MINUTE, Milliseconds},
    sender::{Parcel, Pool, Shared},
    timeline::{Delivery, Timeline},
};

/// Events of the history that are in memory at a time, roughly.
const BLOCK: usize = 100_000;

/// Live parcels that may wait for a connection. The rest waits to be made.
const LIVE_WAITING: usize = 100_000;

/// How often the progress is reported.
const REPORT_INTERVAL: Duration = Duration::from_millis(100);

/// Runs all phases that there are.
pub(super) async fn send(
    shared: &Arc<Shared>,
    sending: &Sending,
    report: Report<'_>,
) -> Result<Vec<(Stage, Load)>, SimulateError> {
    let plan = &shared.fleet.plan;
    let devices = u64::from(plan.devices);
    let events = shared.record.events() as u64 - devices;
    let mut phases = Vec::new();
    let done = || shared.done.load(Ordering::Relaxed);
    shared.done.store(0, Ordering::Relaxed);
    let load = reporting(known(shared, sending), || report(Stage::Devices, done(), devices)).await;
    phases.push((Stage::Devices, load?));
    if plan.groups > 0 && sending.sample.is_some() {
        shared.done.store(0, Ordering::Relaxed);
        let load =
            reporting(grouped(shared, sending), || report(Stage::Groups, done(), devices)).await;
        phases.push((Stage::Groups, load?));
    }
    shared.done.store(0, Ordering::Relaxed);
    if plan.history > 0 {
        // What comes live is a part of all events, so the bar may end early.
        let total = if plan.live > 0 {
            share(events, plan.history, plan.history + plan.live)
        } else {
            events
        };
        let load =
            reporting(history(shared, sending), || report(Stage::History, done(), total)).await;
        phases.push((Stage::History, load?));
    }
    if plan.live > 0 {
        shared.done.store(0, Ordering::Relaxed);
        let total = share(events, plan.live, plan.history + plan.live);
        let load = reporting(live(shared, sending), || report(Stage::Live, done(), total)).await;
        phases.push((Stage::Live, load?));
    }
    Ok(phases)
}

fn share(events: u64, part: Milliseconds, all: Milliseconds) -> u64 {
    let share = u128::from(events) * u128::from(part.unsigned_abs())
        / u128::from(all.unsigned_abs().max(1));
    u64::try_from(share).unwrap_or(events)
}

/// Works, and says again and again how far it is.
pub(super) async fn reporting<T>(work: impl Future<Output = T>, mut report: impl FnMut()) -> T {
    let mut work = std::pin::pin!(work);
    let mut ticks = interval(REPORT_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    loop {
        tokio::select! {
            result = &mut work => {
                report();
                return result;
            }
            _ = ticks.tick() => report(),
        }
    }
}

/// Each device reports once.
async fn known(shared: &Arc<Shared>, sending: &Sending) -> Result<Load, SimulateError> {
    let mut pool = Pool::start(shared, sending.connections, sending.connections);
    let mut batch = Vec::with_capacity(sending.batch);
    for device in 0..shared.fleet.plan.devices {
        batch.extend(Delivery::first(&shared.fleet, device));
        if batch.len() >= sending.batch {
            pool.send(Parcel::Batch(std::mem::take(&mut batch)), None).await?;
        }
    }
    if !batch.is_empty() {
        pool.send(Parcel::Batch(batch), None).await?;
    }
    pool.finish().await
}

/// Each device is put into its group.
async fn grouped(shared: &Arc<Shared>, sending: &Sending) -> Result<Load, SimulateError> {
    let mut pool = Pool::start(shared, sending.connections, sending.connections);
    for device in 0..shared.fleet.plan.devices {
        pool.send(Parcel::Group(device), None).await?;
    }
    pool.finish().await
}

/// Some devices at a time deliver all of their history, in the order of sending.
async fn history(shared: &Arc<Shared>, sending: &Sending) -> Result<Load, SimulateError> {
    let (fleet, plan) = (&shared.fleet, &shared.fleet.plan);
    let mut pool = Pool::start(shared, sending.connections, sending.connections);
    let per_device = shared.record.events() / plan.devices as usize + 1;
    let devices: Vec<u32> = (0..plan.devices).collect();
    for block in devices.chunks((BLOCK / per_device).max(1)) {
        let mut sent = Vec::new();
        for device in block {
            let mut timeline = Timeline::new(fleet, *device);
            while let Some(due) = timeline.next_due() {
                if plan.live > 0 && due >= plan.until {
                    break;
                }
                sent.extend(timeline.next().map(|delivery| (due, delivery)));
            }
            // Making a long history takes a while.
            tokio::task::yield_now().await;
        }
        sent.sort_by_key(|(due, _)| *due);
        let mut batch = Vec::with_capacity(sending.batch);
        for (_, sent) in sent {
            // The answer to a batch does not tell the date that the server gave.
            if sent.event.date().is_none() {
                pool.send(Parcel::Single(Box::new(sent)), None).await?;
                continue;
            }
            batch.push(sent);
            if batch.len() >= sending.batch {
                pool.send(Parcel::Batch(std::mem::take(&mut batch)), None).await?;
            }
        }
        if !batch.is_empty() {
            pool.send(Parcel::Batch(batch), None).await?;
        }
    }
    pool.finish().await
}

/// All devices report at the same time, each event by itself. What waited while a device was offline comes in a batch.
async fn live(shared: &Arc<Shared>, sending: &Sending) -> Result<Load, SimulateError> {
    let (fleet, plan) = (&shared.fleet, &shared.fleet.plan);
    let (mut timelines, mut next) = (Vec::new(), BinaryHeap::new());
    for device in 0..plan.devices {
        let mut timeline = Timeline::new(fleet, device);
        // Without a history, everything is live.
        if plan.history > 0 {
            timeline.skip_to(plan.until);
        }
        next.extend(timeline.next_due().map(|due| Reverse((due, device))));
        timelines.push(timeline);
        if device % 1_000 == 0 {
            tokio::task::yield_now().await;
        }
    }
    let mut pool = Pool::start(shared, sending.connections, LIVE_WAITING);
    let began = Instant::now();
    let mut sent = 0_u64;
    while let Some(Reverse((due, device))) = next.pop() {
        let timeline = &mut timelines[device as usize];
        let Some(first) = timeline.next() else { continue };
        let mut parcel = vec![first];
        while parcel[0].event.is_late
            && parcel[0].event.date().is_some()
            && parcel.len() < sending.batch
        {
            let follows = timeline.next_due().is_some_and(|next| next <= due + MINUTE)
                && timeline.is_next_late();
            let Some(late) = follows.then(|| timeline.next()).flatten() else { break };
            if late.event.date().is_none() {
                pool.send(Parcel::Single(Box::new(late)), None).await?;
            } else {
                parcel.push(late);
            }
        }
        next.extend(timeline.next_due().map(|due| Reverse((due, device))));
        let at = began + wait(sending.pace, due - plan.until, sent);
        sent += parcel.len() as u64;
        sleep_until(at).await;
        let parcel = match parcel.len() {
            1 => parcel.pop().map(|only| Parcel::Single(Box::new(only))),
            _ => Some(Parcel::Batch(parcel)),
        };
        if let Some(parcel) = parcel {
            pool.send(parcel, Some(at)).await?;
        }
    }
    if let Pace::Speed(_) = sending.pace {
        // Nothing may be due at the end; it lasts as long as it was said to.
        sleep_until(began + wait(sending.pace, plan.live, sent)).await;
    }
    pool.finish().await
}

/// How long after the beginning an event is sent that is due so late, and before which so many are sent.
#[expect(clippy::cast_precision_loss, reason = "a span of time has 40 bits")]
fn wait(pace: Pace, due: Milliseconds, sent: u64) -> Duration {
    let seconds = match pace {
        Pace::Speed(speed) => due.max(0) as f64 / 1_000.0 / speed,
        Pace::Rate(rate) => sent as f64 / rate,
    };
    Duration::try_from_secs_f64(seconds).unwrap_or_default()
}
