//! Compares what a server answers with what it must answer. It asks for everything that the API promises to be exact:
//! statistics and their windows, each device's figures, repeated failures, and the histories of a sample of devices.

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
};

use serde_json::{Map, Value, json};

use super::{
    SimulateError,
    differences::Differences,
    event::{Milliseconds, text},
    expected::{DeviceExpected, Expected, WINDOWS, acknowledged, window},
    model::{Figures, Stored},
    reader::Reader,
    sender::Shared,
};

/// How often it is tried anew when an hour ends in the middle.
const ATTEMPTS: usize = 3;

/// The failures from which on devices are asked for.
const THRESHOLD: u64 = 3;

/// What was compared.
#[derive(Debug, Default)]
pub struct Compared {
    /// Devices whose figures were compared.
    pub devices: u64,
    /// Devices whose entire history was compared.
    pub histories: u64,
    /// The rows of those.
    pub rows: u64,
    /// What was not compared, and why.
    pub notes: Vec<String>,
    /// What differs.
    pub differences: Differences,
}

/// One comparison, at one moment of the server's time.
struct Comparison<'a> {
    shared: &'a Shared,
    reader: &'a mut Reader,
    /// The statistics before the first event was sent; null when the server had no devices.
    before: &'a Value,
    expected: Expected,
    now: Milliseconds,
    found: Compared,
    /// Streaks are compared. A server that has deleted old events does not count in streaks what is dated before.
    with_streaks: bool,
}

/// Compares everything.
pub(super) async fn compare(
    shared: &Shared,
    reader: &mut Reader,
    before: &Value,
    sample: u32,
) -> Result<Compared, SimulateError> {
    for _ in 0..ATTEMPTS {
        let now = reader.now().await?;
        let expected = Expected::new(&shared.fleet, &shared.record, now);
        shared.done.store(0, std::sync::atomic::Ordering::Relaxed);
        let mut comparison = Comparison {
            shared,
            before,
            expected,
            now,
            found: Compared::default(),
            with_streaks: true,
            reader: &mut *reader,
        };
        comparison.histories(sample).await?;
        comparison.devices().await?;
        comparison.fleet().await?;
        comparison.repeated_failures().await?;
        let found = comparison.found;
        let end = reader.now().await?;
        if (0..WINDOWS.len()).all(|number| window(number, now) == window(number, end)) {
            return Ok(found);
        }
    }
    Err(SimulateError::Unanswered(
        "an hour ended each time in the middle of comparing; compare less with --sample".into(),
    ))
}

impl Comparison<'_> {
    fn is_alone(&self) -> bool {
        self.before.is_null()
    }

    fn done(&self, count: u64) {
        self.shared.done.fetch_add(count, std::sync::atomic::Ordering::Relaxed);
    }

    /// The devices whose histories are compared, spread over the fleet.
    fn sample(&self, size: u32) -> BTreeSet<u32> {
        let devices = u64::from(self.shared.fleet.plan.devices);
        let size = u64::from(size).min(devices);
        let spread =
            (0..size).map(|number| u32::try_from(number * devices / size).unwrap_or(u32::MAX));
        spread.collect()
    }

    async fn histories(&mut self, size: u32) -> Result<(), SimulateError> {
        for device in self.sample(size) {
            let Some(expected) = self.expected.devices[device as usize] else { continue };
            let device_id = self.shared.fleet.device_id(device);
            let fleet = Arc::clone(&self.shared.fleet);
            let mut events: Vec<_> = acknowledged(&fleet, &self.shared.record, device).collect();
            let path = format!("/api/device/{device_id}");
            let detail = self.reader.data(&path).await?;
            let first = self.reader.data(&format!("{path}/sync-history?limit=1")).await?;
            if let Some(since) = first["raw_since"].as_str() {
                if self.with_streaks {
                    self.found.notes.push(format!(
                        "the server keeps no events from before {since}, so streaks and histories are not compared"
                    ));
                }
                self.with_streaks = false;
            }
            let figures = expected.figures.shown(self.with_streaks);
            self.found.differences.compare(
                &format!("{device_id}, history"),
                &first["stats"],
                &figures,
            );
            self.jobs(&device_id, &detail, &events);
            if self.with_streaks {
                events.sort_unstable_by_key(|(_, stored)| {
                    std::cmp::Reverse((stored.date, stored.id))
                });
                let rows = events.iter().map(|(event, stored)| {
                    event.shown(&self.shared.fleet, device, stored.id, stored.date)
                });
                let rows = rows.collect();
                self.rows(&device_id, rows).await?;
            }
            self.found.histories += 1;
            self.done(1);
        }
        Ok(())
    }

    /// The figures of each job, which come sorted by name.
    fn jobs(&mut self, device_id: &str, detail: &Value, events: &[(super::event::Event, Stored)]) {
        let mut jobs: Vec<_> = (0..self.shared.fleet.plan.jobs)
            .filter_map(|job| {
                let of_job =
                    events.iter().map(|(_, stored)| *stored).filter(|event| event.job == job);
                let of_job: Vec<_> = of_job.collect();
                let name = self.shared.fleet.job(job);
                (!of_job.is_empty()).then(|| (name, Figures::of(&of_job)))
            })
            .collect();
        jobs.sort_unstable_by_key(|(name, _)| *name);
        let told = detail["jobs"].as_array().map(Vec::as_slice).unwrap_or_default();
        let place = format!("{device_id}, jobs");
        let names: Vec<_> = jobs.iter().map(|(name, _)| json!(name)).collect();
        let told_names: Vec<_> = told.iter().map(|job| job["job"].clone()).collect();
        if told_names != names {
            self.found.differences.push(place, "names", json!(told_names), json!(names));
            return;
        }
        for ((name, figures), told) in jobs.iter().zip(told) {
            let place = format!("{device_id}, job {}", name.unwrap_or("without a name"));
            self.found.differences.compare(&place, told, &figures.shown(self.with_streaks));
        }
    }

    /// The entire history, newest first.
    async fn rows(
        &mut self,
        device_id: &str,
        expected: Vec<Map<String, Value>>,
    ) -> Result<(), SimulateError> {
        let id = |row: &Value| row.as_i64().unwrap_or_default();
        let positions: HashMap<i64, usize> =
            expected.iter().map(|row| id(&row["id"])).zip(0..).collect();
        let mut seen = vec![false; expected.len()];
        let mut found = Differences::default();
        let place = format!("{device_id}, history");
        let (mut told, mut next) = (0, 0);
        let compare = |row: &Value| {
            told += 1;
            let Some(&position) = positions.get(&id(&row["id"])) else {
                found.push(place.clone(), "a row that nobody sent", row.clone(), Value::Null);
                return;
            };
            let name = expected[position]["event_id"].as_str().unwrap_or_default();
            let place = format!("{device_id}, {name}");
            if std::mem::replace(&mut seen[position], true) {
                found.push(place.clone(), "in the history", json!("twice"), json!("once"));
            } else if position < next {
                found.push(place.clone(), "in the history", json!("too late"), json!("in order"));
            }
            next = position;
            found.compare(&place, row, &expected[position]);
        };
        let path = format!("/api/device/{device_id}/sync-history?offset=0");
        let last = self.reader.pages(&path, "sync_history", compare).await?;
        for (row, _) in expected.iter().zip(&seen).filter(|(_, is_seen)| !**is_seen) {
            let name = row["event_id"].as_str().unwrap_or_default();
            let row = Value::Object(row.clone());
            found.push(format!("{device_id}, {name}"), "in the history", Value::Null, row);
        }
        let total = pairs(&[("total_events", json!(expected.len()))]);
        found.compare(&place, &last["pagination"], &total);
        self.found.rows += told as u64;
        self.found.differences.append(found);
        Ok(())
    }

    /// Every device's figures and group, as the list of devices shows them.
    async fn devices(&mut self) -> Result<(), SimulateError> {
        let fleet = Arc::clone(&self.shared.fleet);
        let mut seen = vec![false; self.expected.devices.len()];
        let mut found = Differences::default();
        let with_streaks = self.with_streaks;
        let devices = &self.expected.devices;
        let done = &self.shared.done;
        let mut compared = 0;
        let compare = |row: &Value| {
            let device_id = row["device_id"].as_str().unwrap_or_default();
            let Some(number) = fleet.number_of(device_id) else { return };
            let index = number as usize;
            if std::mem::replace(&mut seen[index], true) {
                found.push(
                    device_id.to_owned(),
                    "in the list of devices",
                    json!("twice"),
                    json!("once"),
                );
            }
            match &devices[index] {
                Some(DeviceExpected { figures, .. }) => {
                    let mut expected = figures.shown(with_streaks);
                    expected.insert("group".to_owned(), json!(fleet.group(number)));
                    found.compare(device_id, row, &expected);
                }
                None => found.push(
                    device_id.to_owned(),
                    "in the list of devices",
                    json!(true),
                    json!(false),
                ),
            }
            compared += 1;
            done.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        };
        // Beside others the search finds the fleet's own; alone, nothing needs to be searched.
        let search = if self.before.is_null() { "" } else { &format!("&q={}", fleet.prefix) };
        let path = format!("/api/devices?sort=device_id{search}");
        self.reader.pages(&path, "devices", compare).await?;
        for (number, _) in self.expected.known().filter(|(number, _)| !seen[*number as usize]) {
            found.push(
                fleet.device_id(number),
                "in the list of devices",
                json!(false),
                json!(true),
            );
        }
        self.found.devices = compared;
        self.found.differences.append(found);
        Ok(())
    }

    /// `/api/stats`, of all time and of each window.
    async fn fleet(&mut self) -> Result<(), SimulateError> {
        let known = self.expected.known().count() as u64;
        let told = self.reader.data("/api/stats").await?;
        let mut expected = self.expected.all.of_fleet(self.before);
        let before = self.before["total_devices"].as_u64().unwrap_or_default();
        expected.insert("total_devices".to_owned(), json!(known + before));
        if self.is_alone() {
            // It began less than a day ago: see `run`.
            expected.insert("active_devices_24h".to_owned(), json!(known));
        }
        self.found.differences.compare("statistics", &told, &expected);
        if !self.is_alone() {
            self.found.notes.push(
                "the server has other devices, so means, windows and recent devices of the fleet are not compared".into(),
            );
            return Ok(());
        }
        self.recent(&told);
        for (number, (name, ..)) in WINDOWS.iter().enumerate() {
            let told = self.reader.data(&format!("/api/stats?window={name}")).await?;
            let mut expected = self.expected.windows[number].of_fleet(&Value::Null);
            expected.insert("window_start".to_owned(), json!(text(window(number, self.now).0)));
            expected.insert("total_devices".to_owned(), json!(known));
            self.found.differences.compare(&format!("statistics of {name}"), &told, &expected);
        }
        Ok(())
    }

    /// The ten devices with the latest syncs.
    fn recent(&mut self, told: &Value) {
        let mut latest: Vec<_> = self.expected.known().collect();
        latest.sort_unstable_by_key(|(number, device)| {
            (std::cmp::Reverse(device.figures.last), *number)
        });
        let told = told["recent_devices"].as_array().map(Vec::as_slice).unwrap_or_default();
        let fleet = &self.shared.fleet;
        let expected: Vec<_> =
            latest.iter().take(10).map(|(number, _)| json!(fleet.device_id(*number))).collect();
        let ids: Vec<_> = told.iter().map(|row| row["device_id"].clone()).collect();
        if ids != expected {
            self.found.differences.push(
                "statistics".into(),
                "recent_devices",
                json!(ids),
                json!(expected),
            );
            return;
        }
        const FIELDS: [&str; 6] = [
            "total_syncs",
            "total_files_synced",
            "total_errors",
            "failed_syncs",
            "last_sync",
            "last_failed_sync",
        ];
        for ((number, device), row) in latest.iter().zip(told) {
            let mut figures = device.figures.shown(false);
            figures.retain(|name, _| FIELDS.contains(&name.as_str()));
            let place = format!("statistics, {}", fleet.device_id(*number));
            self.found.differences.compare(&place, row, &figures);
        }
    }

    /// Devices that fail again and again: of all time, within each window, and by their streaks.
    async fn repeated_failures(&mut self) -> Result<(), SimulateError> {
        self.failing("all time", "", |device| device.figures.sums.failed, None).await?;
        for (number, (name, ..)) in WINDOWS.iter().enumerate() {
            let query = format!("&window={name}");
            self.failing(name, &query, |device| device.failures[number], Some(number)).await?;
        }
        if self.with_streaks {
            self.failing("in a row", "&consecutive=true", |device| device.figures.streak, None)
                .await?;
        }
        Ok(())
    }

    async fn failing(
        &mut self,
        name: &str,
        query: &str,
        measure: impl Fn(&DeviceExpected) -> u64,
        window: Option<usize>,
    ) -> Result<(), SimulateError> {
        let fleet = Arc::clone(&self.shared.fleet);
        let mut expected: Vec<_> =
            self.expected.known().filter(|(_, device)| measure(device) >= THRESHOLD).collect();
        let place = format!("repeated failures ({name})");
        let mut told = Vec::new();
        let path = format!("/api/devices/repeated-failures?threshold={THRESHOLD}{query}");
        let keep = |row: &Value| {
            let device = row["device_id"].as_str().and_then(|device_id| fleet.number_of(device_id));
            told.extend(device.map(|device| (device, row.clone())));
        };
        let last = self.reader.pages(&path, "devices", keep).await?;
        let found = &mut self.found.differences;
        if self.before.is_null() && last["total_devices"].is_u64() {
            found.compare(&place, &last, &pairs(&[("total_devices", json!(expected.len()))]));
        }
        expected.sort_unstable_by_key(|(number, device)| {
            (std::cmp::Reverse((measure(device), device.figures.last_failure)), *number)
        });
        let order: Vec<_> = expected.iter().map(|(number, _)| *number).collect();
        let told_order: Vec<_> = told.iter().map(|(number, _)| *number).collect();
        let (mut sorted, mut told_sorted) = (order.clone(), told_order.clone());
        sorted.sort_unstable();
        told_sorted.sort_unstable();
        if sorted != told_sorted {
            let sorted: BTreeSet<_> = sorted.into_iter().collect();
            let told_sorted: BTreeSet<_> = told_sorted.into_iter().collect();
            for (number, is_told) in sorted
                .difference(&told_sorted)
                .map(|number| (*number, false))
                .chain(told_sorted.difference(&sorted).map(|number| (*number, true)))
            {
                found.push(
                    place.clone(),
                    &fleet.device_id(number),
                    json!(is_told),
                    json!(!is_told),
                );
            }
        } else if order != told_order {
            let first = order.iter().zip(&told_order).find(|(order, told)| order != told);
            if let Some((order, told)) = first {
                let (order, told) = (fleet.device_id(*order), fleet.device_id(*told));
                found.push(place.clone(), "the order", json!(told), json!(order));
            }
        }
        for (number, row) in &told {
            let Some(device) = &self.expected.devices[*number as usize] else { continue };
            let figures = device.figures.shown(self.with_streaks);
            let failures =
                window.map_or(device.figures.sums.failed, |window| device.failures[window]);
            let mut expected = pairs(&[
                ("total_failed_syncs", json!(failures)),
                ("last_success", figures["last_success"].clone()),
                ("last_failed_sync", figures["last_failed_sync"].clone()),
            ]);
            expected.extend(
                figures
                    .get("consecutive_failures")
                    .map(|streak| ("consecutive_failures".to_owned(), streak.clone())),
            );
            found.compare(&format!("{place}, {}", fleet.device_id(*number)), row, &expected);
        }
        Ok(())
    }
}

fn pairs(fields: &[(&str, Value)]) -> Map<String, Value> {
    fields.iter().map(|(name, value)| ((*name).to_owned(), value.clone())).collect()
}
