//! States of devices and jobs in SQLite. The sweep calls it through `HealthStore`. A step reads what is known, evaluates it
//! and writes the result in one transaction of the writer, short enough that ingest does not notice.

use std::sync::Arc;

use async_trait::async_trait;
use pisync_core::{Timestamp, health::Outcome};
use rusqlite::{
    Connection, OptionalExtension, Row, Transaction, TransactionBehavior, named_params, params,
};

use super::{
    apply::apply_journal,
    connection::Cost,
    fleet_settings::{LEVEL_COLUMNS, fleet_settings, level},
    rows::{optional_time, time},
    store::SqliteStore,
    write_connection::WriteConnection,
};
use crate::store::{
    DeviceSettings, FleetSettings, FleetWindow, StoreError, WindowScope,
    device_states::{urgency, urgency_of_health},
    health::{
        Beat, CHANGES_KEPT, DELETED_AT_ONCE, DEVICES_PER_STEP, DeviceRow, Evaluated, Evaluations,
        Examination, HEALTH_COLUMNS, HealthRow, HealthStore, INCIDENTS_KEPT, JobFigureRow,
        JobHealthRow, JobRow, LARGEST_LAG, LastSigns, OUTCOMES_READ, Outage, RunRow,
        SettingsChange, StateChange, evaluate, examine, outage, state_counts,
    },
    verify::DAY_MILLISECONDS,
};

#[async_trait]
impl HealthStore for SqliteStore {
    async fn contradicted_devices(&self, now: Timestamp) -> Result<Vec<String>, StoreError> {
        self.read_events(Cost::Long, move |connection| contradicted_devices(connection, now)).await
    }

    async fn changes_to_sweep(&self) -> Result<Vec<SettingsChange>, StoreError> {
        self.read(changes_to_sweep).await
    }

    async fn devices_in(
        &self,
        scope: &WindowScope,
        after: Option<&str>,
    ) -> Result<Vec<String>, StoreError> {
        let (scope, after) = (scope.clone(), after.map(str::to_owned));
        self.read(move |connection| devices_in(connection, &scope, after.as_deref())).await
    }

    async fn evaluate_devices(
        &self,
        devices: &[String],
        settings: &Arc<FleetSettings>,
        now: Timestamp,
    ) -> Result<Option<Evaluations>, StoreError> {
        let (devices, settings) = (devices.to_vec(), Arc::clone(settings));
        self.writer
            .call(move |connection| evaluate_devices(connection, &devices, &settings, now))
            .await
    }

    async fn end_sweep(&self, version: i64, now: Timestamp) -> Result<bool, StoreError> {
        self.writer.call(move |connection| end_sweep(connection, version, now)).await
    }

    async fn follow_clock(&self, swept_at: Timestamp, now: Timestamp) -> Result<bool, StoreError> {
        const FOLLOW: &str = "update fleet_state set swept_at = ?2 where swept_at = ?1";
        let values = [swept_at.as_millisecond(), now.as_millisecond()];
        let followed =
            self.writer.call(move |writer| writer.connection.execute(FOLLOW, values)).await?;
        Ok(followed > 0)
    }

    async fn drop_old_changes(&self, now: Timestamp) -> Result<bool, StoreError> {
        const CHANGES: &str = "
            delete from state_changes
             where id in (select id from state_changes where at < ?1 order by at limit ?2)
        ";
        const INCIDENTS: &str = "
            delete from incidents
             where id in (select id from incidents where resolved_at < ?1 order by resolved_at limit ?2)
        ";
        let now = now.as_millisecond();
        self.writer
            .call(move |writer| {
                let limit = DELETED_AT_ONCE;
                let transaction = writer.connection.transaction()?;
                let changes = transaction.execute(CHANGES, [now - CHANGES_KEPT, limit])?;
                let incidents = transaction.execute(INCIDENTS, [now - INCIDENTS_KEPT, limit])?;
                transaction.commit()?;
                Ok(i64::try_from(changes.max(incidents)) == Ok(limit))
            })
            .await
    }

    async fn beat(&self, beat: &Beat) -> Result<Option<Outage>, StoreError> {
        let beat = beat.clone();
        self.writer.call(move |connection| note_beat(connection, &beat)).await
    }

    async fn note_stop(&self, now: Timestamp) -> Result<(), StoreError> {
        const STOP: &str = "update fleet_state set stopped_at = ?1";
        self.writer
            .call(move |writer| writer.connection.execute(STOP, [now.as_millisecond()]).map(|_| ()))
            .await
    }

    async fn next_look(&self) -> Result<Option<Timestamp>, StoreError> {
        const NEXT: &str = "
            select min(at)
              from (select min(iif(j.heard is h.heard_at, h.due_at, j.heard + h.silent_after)) as at
                      from device_health h
                      left join (select device, max(last_received) as heard from device_jobs group by device) j
                        on j.device = h.device
                     where h.state <> 'paused'
                     union all
                    select min(check_at) from device_health
                     union all
                    select min(due_at) from run_starts
                     union all
                    select min(next_at) from incidents where resolved_at is null)
        ";
        self.read_events(Cost::Long, |connection| {
            connection.prepare_cached(NEXT)?.query_row([], |row| optional_time(row, 0))
        })
        .await
    }

    async fn pass_over(&self, until: Timestamp) -> Result<(), StoreError> {
        const ALIVE: &str = "update fleet_state set alive_at = ?1";
        let until = until.as_millisecond();
        self.writer.call(move |writer| writer.connection.execute(ALIVE, [until]).map(|_| ())).await
    }

    async fn register_devices(
        &self,
        devices: &[(String, Option<String>)],
        at: Timestamp,
    ) -> Result<(), StoreError> {
        const REGISTER: &str = r#"
            insert into devices (device_id, "group", created_at) values (?1, ?2, ?3) on conflict do nothing
        "#;
        let devices = devices.to_vec();
        self.writer
            .call(move |writer| {
                let transaction = writer.connection.transaction()?;
                for (device_id, group) in &devices {
                    let values = params![device_id, group, at.as_millisecond()];
                    transaction.prepare_cached(REGISTER)?.execute(values)?;
                }
                transaction.commit()
            })
            .await
    }

    async fn state_changes(
        &self,
        before: Option<i64>,
        limit: u32,
    ) -> Result<Vec<StateChange>, StoreError> {
        const CHANGES: &str = r#"
            select id, at, device_id, "from", "to", reason
              from state_changes
             where id < ifnull(?1, 9223372036854775807)
             order by id desc
             limit ?2
        "#;
        self.read(move |connection| {
            connection
                .prepare_cached(CHANGES)?
                .query_map(params![before, limit], |row| {
                    Ok(StateChange {
                        id: row.get(0)?,
                        at: time(row, 1)?,
                        device_id: row.get(2)?,
                        from: row.get(3)?,
                        to: row.get(4)?,
                        reason: row.get(5)?,
                    })
                })?
                .collect()
        })
        .await
    }

    async fn examine_device(
        &self,
        device_id: &str,
        now: Timestamp,
    ) -> Result<Option<Examination>, StoreError> {
        let device_id = device_id.to_owned();
        self.read_events(Cost::Short, move |connection| {
            let snapshot = connection.unchecked_transaction()?;
            let settings = fleet_settings(&snapshot)?;
            let row = Reading::new(&snapshot, &settings)?.device_row(&snapshot, &device_id)?;
            Ok(row.map(|(_, row)| examine(row, &settings, now)))
        })
        .await
    }
}

fn contradicted_devices(connection: &Connection, now: Timestamp) -> rusqlite::Result<Vec<String>> {
    // Silence, a wrong group, a time to look again, and dates that are behind: what is kept for the device as a whole.
    const DEVICES: &str = r#"
        select d.device_id
          from (select device, max(last_received) as heard, max(last_sync) as dated
                  from device_jobs
                 group by device) j
          join devices d on d.id = j.device
          left join device_health h on h.device = j.device
         where h.device is null
            or h."group" <> ifnull(d."group", '')
            or h.check_at <= :now
            or (h.state <> 'paused'
                and case when j.heard is h.heard_at then h.due_at <= :now
                         else h.state in ('silent', 'never') or j.heard + h.silent_after <= :now
                    end)
            or (j.heard - j.dated > h.behind_after) <> h.is_behind
    "#;
    const NEVER_HEARD: &str = r#"
        select d.device_id
          from devices d
          left join device_health h on h.device = d.id
         where not exists (select 1 from device_jobs j where j.device = d.id)
           and (h.device is null or h."group" <> ifnull(d."group", '') or h.check_at <= :now)
    "#;
    const JOBS: &str = "
        select distinct d.device_id
          from device_jobs j
          left join job_health h on h.device = j.device and h.job = j.job
          join devices d on d.id = j.device
         where (h.device is null and j.consecutive_failures > 0)
            or j.consecutive_failures <> h.seen_failures
            or j.failed_syncs <> h.seen_failed
            or (h.state <> 'ok' and j.last_received is not h.heard_at)
    ";
    const RUNS: &str = "
        select distinct d.device_id
          from run_starts r
          join devices d on d.id = r.device
         where r.due_at <= :now
    ";
    let snapshot = connection.unchecked_transaction()?;
    let mut found = Vec::new();
    for select in [DEVICES, NEVER_HEARD, RUNS] {
        let mut select = snapshot.prepare_cached(select)?;
        let rows = select.query_map(named_params! { ":now": now.as_millisecond() }, |row| {
            row.get::<_, String>(0)
        })?;
        for device_id in rows {
            found.push(device_id?);
        }
    }
    let mut jobs = snapshot.prepare_cached(JOBS)?;
    for device_id in jobs.query_map([], |row| row.get::<_, String>(0))? {
        found.push(device_id?);
    }
    found.sort_unstable();
    found.dedup();
    Ok(found)
}

fn changes_to_sweep(connection: &Connection) -> rusqlite::Result<Vec<SettingsChange>> {
    const CHANGES: &str = "select version, scope, key from fleet_changes order by version";
    let mut changes = connection.prepare_cached(CHANGES)?;
    let changes = changes.query_map([], |row| {
        let (scope, key): (String, String) = (row.get(1)?, row.get(2)?);
        // What foreign SQL has written there may concern everybody.
        let scope = WindowScope::new(&scope, &key).unwrap_or(WindowScope::Fleet);
        Ok(SettingsChange { version: row.get(0)?, scope })
    })?;
    changes.collect()
}

fn devices_in(
    connection: &Connection,
    scope: &WindowScope,
    after: Option<&str>,
) -> rusqlite::Result<Vec<String>> {
    let condition = match scope {
        WindowScope::Fleet => "?2 = ''",
        WindowScope::Group(_) => "ifnull(\"group\", '') = ?2",
        WindowScope::Device(_) => "device_id = ?2",
        WindowScope::Tag(_) => "id in (select device from device_tags where tag = ?2)",
    };
    let select = format!(
        "select device_id from devices
          where device_id > ?1 and {condition} order by device_id limit {DEVICES_PER_STEP}"
    );
    connection
        .prepare_cached(&select)?
        .query_map([after.unwrap_or_default(), scope.key()], |row| row.get(0))?
        .collect()
}

/// Begins a step, unless a sweep with a later time has gone through.
pub(super) fn begin_step(
    writer: &mut WriteConnection,
    now: Timestamp,
) -> rusqlite::Result<Option<Transaction<'_>>> {
    const SWEPT_AT: &str = "select swept_at from fleet_state";
    apply_journal(writer)?;
    let transaction =
        writer.connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let swept_at: Option<i64> =
        transaction.prepare_cached(SWEPT_AT)?.query_row([], |row| row.get(0))?;
    let is_behind = swept_at.is_some_and(|swept_at| now.as_millisecond() < swept_at - LARGEST_LAG);
    Ok((!is_behind).then_some(transaction))
}

fn evaluate_devices(
    writer: &mut WriteConnection,
    devices: &[String],
    settings: &FleetSettings,
    now: Timestamp,
) -> rusqlite::Result<Option<Evaluations>> {
    let Some(transaction) = begin_step(writer, now)? else { return Ok(None) };
    let reading = Reading::new(&transaction, settings)?;
    let mut evaluated = Vec::with_capacity(devices.len());
    for device_id in devices {
        if let Some((device, row)) = reading.device_row(&transaction, device_id)? {
            evaluated.push((device, evaluate(&row, settings, now)));
        }
    }
    for (device, one) in &evaluated {
        keep(&transaction, *device, one, now)?;
    }
    const COUNT: &str = r#"
        insert into group_states as kept ("group", state, devices, expected) values (?1, ?2, ?3, ?4)
            on conflict ("group", state) do update
           set devices = kept.devices + excluded.devices, expected = kept.expected + excluded.expected
    "#;
    let counts = state_counts(evaluated.iter().map(|(_, one)| one));
    for ((group, state), (devices, expected)) in &counts {
        transaction.prepare_cached(COUNT)?.execute(params![group, state, devices, expected])?;
    }
    let changes = evaluated.iter().filter(|(_, one)| one.change().is_some()).count();
    transaction.commit()?;
    Ok(Some(Evaluations { devices: evaluated.len(), changes }))
}

fn hour_of(millisecond: i64) -> i64 {
    millisecond - millisecond.rem_euclid(60 * 60 * 1000)
}

/// Notes how many devices of each group are in a state that is not well, if that is the most of this hour and day.
fn note_most(transaction: &Transaction<'_>, now: Timestamp) -> rusqlite::Result<()> {
    let hour = hour_of(now.as_millisecond());
    let day = hour - hour.rem_euclid(DAY_MILLISECONDS);
    for (table, column, begins) in [("group_hours", "hour", hour), ("group_days", "day", day)] {
        let note = format!(
            r#"insert into {table} as kept (
                   "group", {column}, runs, failed_runs, most_failing, most_silent, most_degraded
               )
               select "group", ?1, 0, 0, sum(iif(state = 'failing', devices, 0)),
                      sum(iif(state = 'silent', devices, 0)), sum(iif(state = 'degraded', devices, 0))
                 from group_states
                where true
                group by "group"
               having sum(iif(state in ('failing', 'silent', 'degraded'), devices, 0)) > 0
                   on conflict ("group", {column}) do update
                  set most_failing = max(kept.most_failing, excluded.most_failing),
                      most_silent = max(kept.most_silent, excluded.most_silent),
                      most_degraded = max(kept.most_degraded, excluded.most_degraded)
                where kept.most_failing < excluded.most_failing or kept.most_silent < excluded.most_silent
                   or kept.most_degraded < excluded.most_degraded"#
        );
        transaction.prepare_cached(&note)?.execute([begins])?;
    }
    Ok(())
}

/// Writes what an evaluation has found.
fn keep(
    transaction: &Transaction<'_>,
    device: i64,
    evaluated: &Evaluated,
    now: Timestamp,
) -> rusqlite::Result<()> {
    const CHANGE: &str = r#"
        insert into state_changes (at, device_id, "from", "to", reason) values (?1, ?2, ?3, ?4, ?5)
    "#;
    const LEFT: &str = r#"
        update incidents set next_at = ?2 where resolved_at is null and "group" = ?1
    "#;
    const FORGET_JOB: &str = "delete from job_health where device = ?1 and job = ?2";
    const END_RUN: &str = "delete from run_starts where device = ?1 and job = ?2 and run_id = ?3";
    const AWAIT_RUN: &str =
        "update run_starts set due_at = ?4 where device = ?1 and job = ?2 and run_id = ?3";
    if let Some(health) = &evaluated.health {
        keep_health(transaction, device, evaluated, health)?;
    }
    if let Some((from, to)) = evaluated.change() {
        let change = params![now.as_millisecond(), evaluated.device_id, from, to, evaluated.reason];
        transaction.prepare_cached(CHANGE)?.execute(change)?;
    }
    if let Some(group) = evaluated.left_group() {
        transaction.prepare_cached(LEFT)?.execute(params![group, now.as_millisecond()])?;
    }
    for job in &evaluated.jobs {
        keep_job(transaction, device, job)?;
    }
    for job in &evaluated.forgotten_jobs {
        transaction.prepare_cached(FORGET_JOB)?.execute(params![device, job])?;
    }
    for (job, run_id) in &evaluated.ended_runs {
        transaction.prepare_cached(END_RUN)?.execute(params![device, job, run_id])?;
    }
    for (job, run_id, due_at) in &evaluated.awaited_runs {
        let due_at = due_at.map(Timestamp::as_millisecond);
        transaction.prepare_cached(AWAIT_RUN)?.execute(params![device, job, run_id, due_at])?;
    }
    Ok(())
}

fn keep_health(
    transaction: &Transaction<'_>,
    device: i64,
    evaluated: &Evaluated,
    health: &HealthRow,
) -> rusqlite::Result<()> {
    const KEEP: &str = r#"
        insert into device_health (
            device, "group", state, since, problems, is_expected, is_overdue, is_behind, silent_after,
            grace, due_at, late_at, check_at, patience, behind_after, next_due, waiting_since, heard_at,
            policy_version
        ) values (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15, ?16, ?17, ?18, ?19)
            on conflict (device) do update
           set "group" = ?2, state = ?3, since = ?4, problems = ?5, is_expected = ?6, is_overdue = ?7, is_behind = ?8,
               silent_after = ?9, grace = ?10, due_at = ?11, late_at = ?12, check_at = ?13, patience = ?14,
               behind_after = ?15, next_due = ?16, waiting_since = ?17, heard_at = ?18, policy_version = ?19
    "#;
    const KEEP_STATE: &str = "
        insert into device_states (device, device_id, urgency, since) values (?1, ?4, ?2, ?3)
            on conflict (device) do update set urgency = excluded.urgency, since = excluded.since
    ";
    const RECONCILE: &str = r#"
        insert into unreconciled_devices ("group", device, state) values (?1, ?2, ?3)
            on conflict ("group", device) do update set state = excluded.state
    "#;
    let instant = |at: Option<Timestamp>| at.map(Timestamp::as_millisecond);
    let values = params![
        device,
        health.group,
        health.state,
        health.since.as_millisecond(),
        health.problems,
        health.is_expected,
        health.is_overdue,
        health.is_behind,
        health.silent_after,
        health.grace,
        instant(health.due_at),
        instant(health.late_at),
        instant(health.check_at),
        health.patience,
        health.behind_after,
        instant(health.next_due),
        instant(health.waiting_since),
        instant(health.heard_at),
        health.policy_version,
    ];
    transaction.prepare_cached(KEEP)?.execute(values)?;
    if evaluated.is_in_other_state {
        let since = health.since.as_millisecond();
        let state = params![device, urgency(&health.state), since, evaluated.device_id];
        transaction.prepare_cached(KEEP_STATE)?.execute(state)?;
    }
    if evaluated.is_unreconciled {
        let unreconciled = params![health.group, device, health.state];
        transaction.prepare_cached(RECONCILE)?.execute(unreconciled)?;
    }
    Ok(())
}

fn keep_job(
    transaction: &Transaction<'_>,
    device: i64,
    job: &JobHealthRow,
) -> rusqlite::Result<()> {
    const KEEP: &str = "
        insert or replace into job_health (
            device, job, is_expected, state, reason, since, next_due, waiting_since, heard_at, seen_failures,
            seen_failed
        ) values (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11)
    ";
    let instant = |at: Option<Timestamp>| at.map(Timestamp::as_millisecond);
    let values = params![
        device,
        job.job,
        job.is_expected,
        job.state,
        job.reason,
        instant(job.since),
        instant(job.next_due),
        instant(job.waiting_since),
        instant(job.heard_at),
        job.seen_failures,
        job.seen_failed,
    ];
    transaction.prepare_cached(KEEP)?.execute(values).map(|_| ())
}

/// Fills `device_states` of a new database.
pub(super) fn rebuild_states(connection: &Connection) -> rusqlite::Result<()> {
    let rebuild = format!(
        "insert into device_states (device, device_id, urgency, since)
         select h.device, d.device_id, {}, h.since from device_health h join devices d on d.id = h.device",
        urgency_of_health()
    );
    connection.execute_batch(&rebuild)
}

/// Forgets the state of a device that is being deleted. Its incidents are looked at in the next sweep.
pub(super) fn forget(transaction: &Transaction<'_>, device: i64) -> rusqlite::Result<()> {
    const FORGET: &str = r#"
        delete from device_health where device = ?1 returning "group", state, is_expected
    "#;
    const COUNT: &str = r#"
        update group_states set devices = devices - 1, expected = expected - ?3 where "group" = ?1 and state = ?2
    "#;
    const LOOK: &str = r#"
        update incidents set next_at = opened_at where resolved_at is null and scope <> 'fleet' and "group" = ?1
    "#;
    let kept: Option<(String, String, i64)> = transaction
        .prepare_cached(FORGET)?
        .query_row([device], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))
        .optional()?;
    if let Some((group, state, is_expected)) = kept {
        transaction.prepare_cached(COUNT)?.execute(params![group, state, is_expected])?;
        transaction.prepare_cached(LOOK)?.execute([group])?;
    }
    for table in ["device_states", "job_health", "run_starts", "unreconciled_devices"] {
        transaction.execute(&format!("delete from {table} where device = ?1"), [device])?;
    }
    Ok(())
}

fn end_sweep(writer: &mut WriteConnection, version: i64, now: Timestamp) -> rusqlite::Result<bool> {
    const END: &str = "update fleet_state set swept_at = ?1";
    const FORGET: &str = "delete from fleet_changes where version <= ?1";
    let Some(transaction) = begin_step(writer, now)? else { return Ok(false) };
    note_most(&transaction, now)?;
    transaction.prepare_cached(END)?.execute([now.as_millisecond()])?;
    transaction.prepare_cached(FORGET)?.execute([version])?;
    transaction.commit()?;
    Ok(true)
}

fn note_beat(writer: &mut WriteConnection, beat: &Beat) -> rusqlite::Result<Option<Outage>> {
    // A database from before there were beats, or one that was copied: the last report shows when a server lived.
    const SIGNS: &str = "
        select ifnull(alive_at, (select max(last_received) from device_jobs)), stopped_at from fleet_state
    ";
    const NOT_YET: &str = "delete from outages where from_at >= ?1";
    const CUT: &str = "update outages set until_at = ?1 where until_at > ?1";
    const ALIVE: &str = "update fleet_state set alive_at = ?1";
    let transaction =
        writer.connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let signs = transaction.prepare_cached(SIGNS)?.query_row([], |row| {
        Ok(LastSigns { alive_at: optional_time(row, 0)?, stopped_at: optional_time(row, 1)? })
    })?;
    let found = outage(beat, signs, true);
    if let Some(found) = &found {
        note_outage(&transaction, found, &beat.node)?;
    }
    // A clock that was ahead has gone back: what it took for an outage has not been yet.
    if signs.has_stepped_back(beat.at) {
        transaction.prepare_cached(NOT_YET)?.execute([beat.at.as_millisecond()])?;
        transaction.prepare_cached(CUT)?.execute([beat.at.as_millisecond()])?;
    }
    transaction.prepare_cached(ALIVE)?.execute([beat.at.as_millisecond()])?;
    transaction.commit()?;
    Ok(found)
}

/// Notes an outage, as one with the outage that ends where it begins.
fn note_outage(transaction: &Transaction<'_>, outage: &Outage, node: &str) -> rusqlite::Result<()> {
    const GO_ON: &str = "
        update outages set until_at = max(until_at, ?2)
         where from_at = (select max(from_at) from outages where from_at <= ?1)
           and until_at >= ?1 and cause = ?3
    ";
    const ADD: &str = "
        insert into outages (from_at, until_at, cause, node) values (?1, ?2, ?3, ?4)
            on conflict (from_at) do update set until_at = max(until_at, excluded.until_at)
    ";
    let (from, until) = (outage.from.as_millisecond(), outage.until.as_millisecond());
    let cause = outage.cause.as_str();
    if transaction.prepare_cached(GO_ON)?.execute(params![from, until, cause])? == 0 {
        transaction.prepare_cached(ADD)?.execute(params![from, until, cause, node])?;
    }
    Ok(())
}

/// Reads [`HEALTH_COLUMNS`] from column `first` on.
fn health_row(row: &Row<'_>, first: usize) -> rusqlite::Result<HealthRow> {
    Ok(HealthRow {
        group: row.get(first)?,
        state: row.get(first + 1)?,
        since: time(row, first + 2)?,
        problems: row.get(first + 3)?,
        is_expected: row.get(first + 4)?,
        is_overdue: row.get(first + 5)?,
        is_behind: row.get(first + 6)?,
        silent_after: row.get(first + 7)?,
        grace: row.get(first + 8)?,
        due_at: optional_time(row, first + 9)?,
        late_at: optional_time(row, first + 10)?,
        check_at: optional_time(row, first + 11)?,
        patience: row.get(first + 12)?,
        behind_after: row.get(first + 13)?,
        next_due: optional_time(row, first + 14)?,
        waiting_since: optional_time(row, first + 15)?,
        heard_at: optional_time(row, first + 16)?,
        policy_version: row.get(first + 17)?,
    })
}

/// What is read of devices in one transaction.
struct Reading<'a> {
    settings: &'a FleetSettings,
    /// The statement that reads a device.
    device: String,
    /// Whether anything is set for tags.
    has_tags: bool,
    /// Whether any run has been started.
    has_runs: bool,
}

impl<'a> Reading<'a> {
    fn new(snapshot: &Connection, settings: &'a FleetSettings) -> rusqlite::Result<Self> {
        const HAS_RUNS: &str = "select exists (select 1 from run_starts)";
        let of_settings = LEVEL_COLUMNS.split(", ").map(|column| format!("s.{column}"));
        let of_settings = of_settings.collect::<Vec<_>>().join(", ");
        let device = format!(
            r#"select d.id, ifnull(d."group", ''), d.created_at, s.device is not null, h.device is not null,
                      s.expected_from, ifnull(s.is_excused, 0), {of_settings}, {HEALTH_COLUMNS}
                 from devices d
                 left join device_settings s on s.device = d.id
                 left join device_health h on h.device = d.id
                where d.device_id = ?1"#
        );
        let is_of_tag = |window: &FleetWindow| matches!(window.scope, WindowScope::Tag(_));
        Ok(Self {
            settings,
            device,
            has_tags: settings.windows.iter().any(is_of_tag),
            has_runs: snapshot.prepare_cached(HAS_RUNS)?.query_row([], |row| row.get(0))?,
        })
    }

    /// All that an evaluation of a device needs, and its number; `None` when it is unknown.
    fn device_row(
        &self,
        snapshot: &Connection,
        device_id: &str,
    ) -> rusqlite::Result<Option<(i64, DeviceRow)>> {
        let mut select = snapshot.prepare_cached(&self.device)?;
        let row = select.query_row([device_id], |row| {
            let has_settings: bool = row.get(3)?;
            let is_kept: bool = row.get(4)?;
            let device: i64 = row.get(0)?;
            let mut of_device = DeviceSettings::default();
            if has_settings {
                of_device.level = level(row, 7)?;
                of_device.expected_from = optional_time(row, 5)?;
                of_device.is_excused = row.get(6)?;
            }
            let kept = if is_kept { Some(health_row(row, 12)?) } else { None };
            Ok((
                device,
                DeviceRow {
                    device_id: device_id.to_owned(),
                    group: row.get(1)?,
                    registered_at: time(row, 2)?,
                    settings: of_device,
                    kept,
                    jobs: Vec::new(),
                    runs: Vec::new(),
                },
            ))
        });
        let Some((device, mut row)) = row.optional()? else { return Ok(None) };
        if self.has_tags {
            row.settings.tags = tags(snapshot, device)?;
        }
        row.jobs = jobs(snapshot, device)?;
        if self.has_runs {
            row.runs = runs(snapshot, device)?;
        }
        add_first_failures(snapshot, device, &mut row)?;
        for (job, figures) in row.counted_jobs(self.settings) {
            figures.outcomes = outcomes(snapshot, device, job, figures.last_sync)?;
        }
        Ok(Some((device, row)))
    }
}

pub(super) fn tags(snapshot: &Connection, device: i64) -> rusqlite::Result<Vec<String>> {
    const TAGS: &str = "select tag from device_tags where device = ?1 order by tag";
    snapshot.prepare_cached(TAGS)?.query_map([device], |row| row.get(0))?.collect()
}

fn jobs(snapshot: &Connection, device: i64) -> rusqlite::Result<Vec<JobRow>> {
    const FIGURES: &str = "
        select job, failed_syncs, consecutive_failures, last_received, last_sync, last_success, last_failure
          from device_jobs
         where device = ?1
         order by job
    ";
    const KEPT: &str = "
        select job, is_expected, state, reason, since, next_due, waiting_since, heard_at, seen_failures,
               seen_failed
          from job_health
         where device = ?1
         order by job
    ";
    let figures = |row: &Row<'_>| {
        Ok(JobRow {
            job: row.get(0)?,
            figures: Some(JobFigureRow {
                failed_syncs: row.get(1)?,
                consecutive_failures: row.get(2)?,
                last_received: time(row, 3)?,
                last_sync: time(row, 4)?,
                last_success: optional_time(row, 5)?,
                last_failure: optional_time(row, 6)?,
                first_failure: None,
                outcomes: Vec::new(),
            }),
            kept: None,
        })
    };
    let kept = |row: &Row<'_>| {
        Ok(JobHealthRow {
            job: row.get(0)?,
            is_expected: row.get(1)?,
            state: row.get(2)?,
            reason: row.get(3)?,
            since: optional_time(row, 4)?,
            next_due: optional_time(row, 5)?,
            waiting_since: optional_time(row, 6)?,
            heard_at: optional_time(row, 7)?,
            seen_failures: row.get(8)?,
            seen_failed: row.get(9)?,
        })
    };
    let mut jobs = snapshot
        .prepare_cached(FIGURES)?
        .query_map([device], figures)?
        .collect::<rusqlite::Result<Vec<_>>>()?;
    for kept in snapshot.prepare_cached(KEPT)?.query_map([device], kept)? {
        let kept = kept?;
        match jobs.iter_mut().find(|job| job.job == kept.job) {
            Some(job) => job.kept = Some(kept),
            None => jobs.push(JobRow { job: kept.job.clone(), figures: None, kept: Some(kept) }),
        }
    }
    Ok(jobs)
}

fn runs(snapshot: &Connection, device: i64) -> rusqlite::Result<Vec<RunRow>> {
    const RUNS: &str = "
        select job, run_id, received_at,
               exists (select 1 from event_keys k where k.device = r.device and k.event_id = r.run_id)
          from run_starts r
         where device = ?1
         order by received_at, job, run_id
    ";
    let run = |row: &Row<'_>| {
        Ok(RunRow {
            job: row.get(0)?,
            run_id: row.get(1)?,
            received_at: time(row, 2)?,
            is_reported: row.get(3)?,
        })
    };
    snapshot.prepare_cached(RUNS)?.query_map([device], run)?.collect()
}

/// Fills in the date of the first failure after the last success.
fn add_first_failures(
    snapshot: &Connection,
    device: i64,
    row: &mut DeviceRow,
) -> rusqlite::Result<()> {
    const FIRST: &str = "
        select timestamp
          from sync_events
         where device = ?1 and timestamp >= ?2 and timestamp <= ?3 and total_errors > 0
           and ifnull(job, '') = ?4
         order by timestamp
         limit 1
    ";
    for (job, figures) in row.failing_jobs() {
        let after = figures.last_success.unwrap_or(Timestamp::MIN).as_millisecond();
        let until = figures.last_failure.unwrap_or(figures.last_sync).as_millisecond();
        figures.first_failure = snapshot
            .prepare_cached(FIRST)?
            .query_row(params![device, after, until, job], |row| time(row, 0))
            .optional()?
            .or(figures.last_failure);
    }
    Ok(())
}

/// The last runs of a job by date, the latest at the end.
fn outcomes(
    snapshot: &Connection,
    device: i64,
    job: &str,
    until: Timestamp,
) -> rusqlite::Result<Vec<Outcome>> {
    const OUTCOMES: &str = "
        select timestamp, total_errors > 0
          from sync_events
         where device = ?1 and timestamp <= ?2 and ifnull(job, '') = ?3
         order by timestamp desc, id desc
         limit ?4
    ";
    let mut outcomes = snapshot
        .prepare_cached(OUTCOMES)?
        .query_map(params![device, until.as_millisecond(), job, OUTCOMES_READ], |row| {
            Ok(Outcome { at: time(row, 0)?, has_failed: row.get(1)? })
        })?
        .collect::<rusqlite::Result<Vec<_>>>()?;
    outcomes.reverse();
    Ok(outcomes)
}
