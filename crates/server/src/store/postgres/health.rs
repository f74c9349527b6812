//! States of devices and jobs in PostgreSQL. The sweep calls it through `HealthStore`. A step reads what is known about some
//! devices, evaluates it and writes the result in one transaction. One server at a time does so; the others sit the step out.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, LazyLock},
};

use async_trait::async_trait;
use deadpool_postgres::{GenericClient, Transaction};
use pisync_core::{Timestamp, health::Outcome};
use tokio_postgres::{Error, Row};

use super::{
    connect::Object,
    fleet_settings::{LEVEL_COLUMNS, fleet_settings, level},
    locks::SWEEP_LOCK,
    rows::{instant, optional_time, snapshot, time},
    store::PostgresStore,
};
use crate::store::{
    DeviceSettings, FleetSettings, StoreError, WindowScope,
    device_states::{urgency, urgency_of_health},
    health::{
        Beat, CHANGES_KEPT, DELETED_AT_ONCE, DEVICES_PER_STEP, DeviceRow, Evaluated, Evaluations,
        Examination, HEALTH_COLUMNS, HealthRow, HealthStore, INCIDENTS_KEPT, JobFigureRow,
        JobHealthRow, JobRow, LARGEST_LAG, LastSigns, OUTCOMES_READ, Outage, RunRow,
        SettingsChange, StateChange, evaluate, examine, outage, state_counts,
    },
};

#[async_trait]
impl HealthStore for PostgresStore {
    async fn contradicted_devices(&self, now: Timestamp) -> Result<Vec<String>, StoreError> {
        self.call(async |connection| contradicted_devices(connection, now).await).await
    }

    async fn changes_to_sweep(&self) -> Result<Vec<SettingsChange>, StoreError> {
        self.call(async |connection| changes_to_sweep(connection).await).await
    }

    async fn devices_in(
        &self,
        scope: &WindowScope,
        after: Option<&str>,
    ) -> Result<Vec<String>, StoreError> {
        self.call(async |connection| devices_in(connection, scope, after).await).await
    }

    async fn evaluate_devices(
        &self,
        devices: &[String],
        settings: &Arc<FleetSettings>,
        now: Timestamp,
    ) -> Result<Option<Evaluations>, StoreError> {
        self.call(async |connection| evaluate_devices(connection, devices, settings, now).await)
            .await
    }

    async fn end_sweep(&self, version: i64, now: Timestamp) -> Result<bool, StoreError> {
        self.call(async |connection| end_sweep(connection, version, now).await).await
    }

    async fn follow_clock(&self, swept_at: Timestamp, now: Timestamp) -> Result<bool, StoreError> {
        // PostgreSQL counts microseconds.
        const FOLLOW: &str = "
            update fleet_state set swept_at = $2
             where swept_at >= $1 and swept_at < $1 + interval '1 millisecond'
        ";
        self.call(async |connection| {
            let followed =
                connection.execute(FOLLOW, &[&swept_at.to_jiff(), &now.to_jiff()]).await?;
            Ok(followed > 0)
        })
        .await
    }

    async fn drop_old_changes(&self, now: Timestamp) -> Result<bool, StoreError> {
        const CHANGES: &str = "
            delete from state_changes
             where id in (select id from state_changes where at < $1 order by at limit $2)
        ";
        const INCIDENTS: &str = "
            delete from incidents
             where id in (select id from incidents where resolved_at < $1 order by resolved_at limit $2)
        ";
        let before = |kept: i64| now.saturating_add_milliseconds(-kept).to_jiff();
        self.call(async |connection| {
            let mut most = 0;
            for (drop, kept) in [(CHANGES, CHANGES_KEPT), (INCIDENTS, INCIDENTS_KEPT)] {
                let drop = connection.prepare_cached(drop).await?;
                let dropped = connection.execute(&drop, &[&before(kept), &DELETED_AT_ONCE]).await?;
                most = most.max(dropped);
            }
            Ok(i64::try_from(most) == Ok(DELETED_AT_ONCE))
        })
        .await
    }

    async fn beat(&self, beat: &Beat) -> Result<Option<Outage>, StoreError> {
        self.call(async |connection| note_beat(connection, beat).await).await
    }

    async fn note_stop(&self, now: Timestamp) -> Result<(), StoreError> {
        const STOP: &str = "update fleet_state set stopped_at = $1";
        self.call(async |connection| connection.execute(STOP, &[&now.to_jiff()]).await.map(|_| ()))
            .await
    }

    async fn next_look(&self) -> Result<Option<Timestamp>, StoreError> {
        const NEXT: &str = "
            select least(
                       (select min(case when j.heard is not distinct from h.heard_at then h.due_at
                                        else j.heard + h.silent_after * interval '1 millisecond'
                                   end)
                          from device_health h
                          left join (select device_id, max(last_received) as heard
                                       from device_jobs
                                      group by device_id) j using (device_id)
                         where h.state <> 'paused'),
                       (select min(check_at) from device_health),
                       (select min(due_at) from run_starts),
                       (select min(next_at) from incidents where resolved_at is null)
                   )
        ";
        self.call(async |connection| {
            let next = connection.prepare_cached(NEXT).await?;
            optional_time(&connection.query_one(&next, &[]).await?, 0)
        })
        .await
    }

    async fn pass_over(&self, until: Timestamp) -> Result<(), StoreError> {
        const ALIVE: &str = "update fleet_state set alive_at = $1";
        self.call(async |connection| {
            connection.execute(ALIVE, &[&until.to_jiff()]).await.map(|_| ())
        })
        .await
    }

    async fn register_devices(
        &self,
        devices: &[(String, Option<String>)],
        at: Timestamp,
    ) -> Result<(), StoreError> {
        const REGISTER: &str = r#"
            insert into devices (device_id, "group", created_at, updated_at)
            select device_id, in_group, $3, $3
              from unnest($1::text[], $2::text[]) as given (device_id, in_group)
             order by device_id
                on conflict do nothing
        "#;
        let (ids, groups): (Vec<&String>, Vec<&Option<String>>) =
            devices.iter().map(|(device_id, group)| (device_id, group)).unzip();
        self.call(async |connection| {
            connection.execute(REGISTER, &[&ids, &groups, &at.to_jiff()]).await.map(|_| ())
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
             where id < coalesce($1, 9223372036854775807)
             order by id desc
             limit $2
        "#;
        self.call(async |connection| {
            let select = connection.prepare_cached(CHANGES).await?;
            let rows = connection.query(&select, &[&before, &i64::from(limit)]).await?;
            let change = |row: &Row| {
                Ok(StateChange {
                    id: row.try_get(0)?,
                    at: time(row, 1)?,
                    device_id: row.try_get(2)?,
                    from: row.try_get(3)?,
                    to: row.try_get(4)?,
                    reason: row.try_get(5)?,
                })
            };
            rows.iter().map(change).collect()
        })
        .await
    }

    async fn examine_device(
        &self,
        device_id: &str,
        now: Timestamp,
    ) -> Result<Option<Examination>, StoreError> {
        self.call(async |connection| {
            let snapshot = snapshot(connection).await?;
            let settings = fleet_settings(&snapshot).await?;
            let rows = device_rows(&snapshot, &[device_id.to_owned()], &settings).await?;
            Ok(rows.into_iter().next().map(|row| examine(row, &settings, now)))
        })
        .await
    }
}

async fn contradicted_devices(
    connection: &mut Object,
    now: Timestamp,
) -> Result<Vec<String>, Error> {
    // Silence, a wrong group, a time to look again, and dates that are behind: what is kept for the device as a whole.
    const DEVICES: &str = r#"
        select d.device_id
          from devices d
          left join (select device_id, max(last_received) as heard, max(last_sync) as dated
                       from device_jobs
                      group by device_id) j using (device_id)
          left join device_health h using (device_id)
         where h.device_id is null
            or h."group" <> coalesce(d."group", '')
            or h.check_at <= $1
            or (h.state <> 'paused'
                and case when j.heard is not distinct from h.heard_at then h.due_at <= $1
                         else h.state in ('silent', 'never')
                              or j.heard <= $1::timestamptz - h.silent_after * interval '1 millisecond'
                    end)
            or (j.heard - j.dated > h.behind_after * interval '1 millisecond') <> h.is_behind
    "#;
    const JOBS: &str = "
        select distinct j.device_id
          from device_jobs j
          left join job_health h using (device_id, job)
         where (h.device_id is null and j.consecutive_failures > 0)
            or j.consecutive_failures <> h.seen_failures
            or j.failed_syncs <> h.seen_failed
            or (h.state <> 'ok' and j.last_received is distinct from h.heard_at)
    ";
    const RUNS: &str = "select distinct device_id from run_starts where due_at <= $1";
    // 100,000 devices are compared in memory.
    const SETTINGS: &str = "set local work_mem = '32MB'";
    let snapshot = snapshot(connection).await?;
    snapshot.batch_execute(SETTINGS).await?;
    let mut found = Vec::new();
    for select in [DEVICES, RUNS] {
        let select = snapshot.prepare_cached(select).await?;
        for row in snapshot.query(&select, &[&now.to_jiff()]).await? {
            found.push(row.try_get::<_, String>(0)?);
        }
    }
    let jobs = snapshot.prepare_cached(JOBS).await?;
    for row in snapshot.query(&jobs, &[]).await? {
        found.push(row.try_get(0)?);
    }
    found.sort_unstable();
    found.dedup();
    Ok(found)
}

async fn changes_to_sweep(connection: &Object) -> Result<Vec<SettingsChange>, Error> {
    const CHANGES: &str = "select version, scope, key from fleet_changes order by version";
    let select = connection.prepare_cached(CHANGES).await?;
    let rows = connection.query(&select, &[]).await?;
    let change = |row: &Row| {
        // What foreign SQL has written there may concern everybody.
        let scope = WindowScope::new(row.try_get(1)?, row.try_get(2)?);
        let scope = scope.unwrap_or(WindowScope::Fleet);
        Ok(SettingsChange { version: row.try_get(0)?, scope })
    };
    rows.iter().map(change).collect()
}

async fn devices_in(
    connection: &Object,
    scope: &WindowScope,
    after: Option<&str>,
) -> Result<Vec<String>, Error> {
    let condition = match scope {
        WindowScope::Fleet => "$2 = ''",
        WindowScope::Group(_) => "coalesce(\"group\", '') = $2",
        WindowScope::Device(_) => "device_id = $2",
        WindowScope::Tag(_) => "device_id in (select device_id from device_tags where tag = $2)",
    };
    let select = format!(
        "select device_id from devices
          where device_id > $1 and {condition} order by device_id limit {DEVICES_PER_STEP}"
    );
    let select = connection.prepare_cached(&select).await?;
    let rows = connection.query(&select, &[&after.unwrap_or_default(), &scope.key()]).await?;
    rows.iter().map(|row| row.try_get(0)).collect()
}

/// Begins a step; `None` when another server is at one, or a sweep with a later time has gone through.
pub(super) async fn begin_step(
    connection: &mut Object,
    now: Timestamp,
) -> Result<Option<Transaction<'_>>, Error> {
    // A server that is stopped in the middle of a step must not hold the lock for ever. A step looks up few rows of large
    // tables whose figures have just changed: by its own costs, the planner would read them whole. What a power cut takes of
    // the last steps, the next sweep does again; a message about it is sent only after a commit that is synced.
    const SETTINGS: &str = "
        set local idle_in_transaction_session_timeout = '10s';
        set local random_page_cost = 1.1;
        set local max_parallel_workers_per_gather = 0;
        set local synchronous_commit = off
    ";
    const LOCK: &str = "select pg_try_advisory_xact_lock($1)";
    const SWEPT_AT: &str = "select swept_at from fleet_state";
    let transaction = connection.transaction().await?;
    transaction.batch_execute(SETTINGS).await?;
    let lock = transaction.prepare_cached(LOCK).await?;
    if !transaction.query_one(&lock, &[&SWEEP_LOCK]).await?.try_get::<_, bool>(0)? {
        return Ok(None);
    }
    let swept_at = transaction.prepare_cached(SWEPT_AT).await?;
    let swept_at = optional_time(&transaction.query_one(&swept_at, &[]).await?, 0)?;
    let is_behind =
        swept_at.is_some_and(|swept_at| now < swept_at.saturating_add_milliseconds(-LARGEST_LAG));
    Ok((!is_behind).then_some(transaction))
}

async fn evaluate_devices(
    connection: &mut Object,
    devices: &[String],
    settings: &FleetSettings,
    now: Timestamp,
) -> Result<Option<Evaluations>, Error> {
    let Some(transaction) = begin_step(connection, now).await? else { return Ok(None) };
    let rows = device_rows(&transaction, devices, settings).await?;
    let mut evaluated: Vec<_> = rows.iter().map(|row| evaluate(row, settings, now)).collect();
    // What adds rows comes first, because it locks their devices. A deletion locks the device, and then its state.
    keep_health(&transaction, &mut evaluated, true).await?;
    keep_jobs(&transaction, &evaluated).await?;
    keep_runs(&transaction, &evaluated).await?;
    keep_health(&transaction, &mut evaluated, false).await?;
    keep_states(&transaction, &evaluated).await?;
    let changes = keep_changes(&transaction, &evaluated, now).await?;
    transaction.commit().await?;
    Ok(Some(Evaluations { devices: evaluated.len(), changes }))
}

/// A column of many rows, by a function of the row.
fn column<'a, R, T>(rows: &[&'a R], of: impl Fn(&'a R) -> T) -> Vec<T> {
    rows.iter().map(|row| of(row)).collect()
}

/// The columns of `device_health` but for the device, and their types.
const KEPT_COLUMNS: [(&str, &str); 18] = [
    ("\"group\"", "text"),
    ("state", "text"),
    ("since", "timestamptz"),
    ("problems", "text"),
    ("is_expected", "boolean"),
    ("is_overdue", "boolean"),
    ("is_behind", "boolean"),
    ("silent_after", "bigint"),
    ("grace", "bigint"),
    ("due_at", "timestamptz"),
    ("late_at", "timestamptz"),
    ("check_at", "timestamptz"),
    ("patience", "bigint"),
    ("behind_after", "bigint"),
    ("next_due", "timestamptz"),
    ("waiting_since", "timestamptz"),
    ("heard_at", "timestamptz"),
    ("policy_version", "bigint"),
];

/// The statements that add rows to `device_health`, and that change rows of it.
static KEEP: LazyLock<[String; 2]> = LazyLock::new(|| {
    let list = |of: &dyn Fn(usize, &str, &str) -> String| {
        let columns = KEPT_COLUMNS.iter().enumerate();
        columns.map(|(at, (name, kind))| of(at, name, kind)).collect::<Vec<_>>().join(", ")
    };
    let names = list(&|_, name, _| name.to_owned());
    let arrays = list(&|at, _, kind| format!("${}::{kind}[]", at + 2));
    let changed = list(&|_, name, _| format!("{name} = given.{name}"));
    let given = format!("unnest($1::text[], {arrays}) as given (device_id, {names})");
    [
        // A device that was deleted meanwhile is left out.
        format!(
            "insert into device_health (device_id, {names})
             select given.*
               from {given}
               join devices d on d.device_id = given.device_id
              order by given.device_id
                for key share of d
                 on conflict do nothing"
        ),
        format!(
            "update device_health kept set {changed} from {given} where kept.device_id = given.device_id"
        ),
    ]
});

/// Writes the states of devices that have none yet, or of those that have one. A device that was deleted meanwhile is taken
/// out of `evaluated`.
async fn keep_health(
    transaction: &Transaction<'_>,
    evaluated: &mut Vec<Evaluated>,
    is_new: bool,
) -> Result<(), Error> {
    const LEFT: &str = "select device_id from device_health where device_id = any($1)";
    let rows: Vec<(&str, &HealthRow)> = evaluated
        .iter()
        .filter(|one| one.before.is_none() == is_new)
        .filter_map(|one| one.health.as_ref().map(|health| (one.device_id.as_str(), health)))
        .collect();
    if rows.is_empty() {
        return Ok(());
    }
    let (ids, rows): (Vec<&str>, Vec<&HealthRow>) = rows.into_iter().unzip();
    let keep = transaction.prepare_cached(&KEEP[usize::from(!is_new)]).await?;
    let kept = transaction
        .execute(
            &keep,
            &[
                &ids,
                &column(&rows, |row| row.group.as_str()),
                &column(&rows, |row| row.state.as_str()),
                &column(&rows, |row| row.since.to_jiff()),
                &column(&rows, |row| row.problems.as_str()),
                &column(&rows, |row| row.is_expected),
                &column(&rows, |row| row.is_overdue),
                &column(&rows, |row| row.is_behind),
                &column(&rows, |row| row.silent_after),
                &column(&rows, |row| row.grace),
                &column(&rows, |row| instant(row.due_at)),
                &column(&rows, |row| instant(row.late_at)),
                &column(&rows, |row| instant(row.check_at)),
                &column(&rows, |row| row.patience),
                &column(&rows, |row| row.behind_after),
                &column(&rows, |row| instant(row.next_due)),
                &column(&rows, |row| instant(row.waiting_since)),
                &column(&rows, |row| instant(row.heard_at)),
                &column(&rows, |row| row.policy_version),
            ],
        )
        .await?;
    if usize::try_from(kept) != Ok(ids.len()) {
        let ids: Vec<String> = ids.into_iter().map(str::to_owned).collect();
        let left = transaction.query(LEFT, &[&ids]).await?;
        let left = left.iter().map(|row| row.try_get(0)).collect::<Result<HashSet<String>, _>>()?;
        let is_gone = |device_id: &String| ids.contains(device_id) && !left.contains(device_id);
        evaluated.retain(|one| !is_gone(&one.device_id));
    }
    Ok(())
}

/// Writes the order of devices by state, and from whose states incidents are to be made. Their rows of `device_health` are
/// locked.
async fn keep_states(transaction: &Transaction<'_>, evaluated: &[Evaluated]) -> Result<(), Error> {
    const STATES: &str = "
        insert into device_states (device_id, urgency, since)
        select given.*
          from unnest($1::text[], $2::bigint[], $3::bigint[]) as given (device_id)
          join device_health h on h.device_id = given.device_id
         order by given.device_id
            on conflict (device_id) do update set urgency = excluded.urgency, since = excluded.since
    ";
    const UNRECONCILED: &str = r#"
        insert into unreconciled_devices ("group", device_id, state)
        select * from unnest($1::text[], $2::text[], $3::text[])
            on conflict ("group", device_id) do update set state = excluded.state
    "#;
    let rows = |is_written: fn(&Evaluated) -> bool| {
        evaluated
            .iter()
            .filter(move |one| is_written(one))
            .filter_map(|one| one.health.as_ref().map(|health| (one.device_id.as_str(), health)))
            .unzip::<_, _, Vec<&str>, Vec<&HealthRow>>()
    };
    let (ids, states) = rows(|one| one.is_in_other_state);
    if !ids.is_empty() {
        let keep = transaction.prepare_cached(STATES).await?;
        let urgencies = column(&states, |row| urgency(&row.state));
        let since = column(&states, |row| row.since.as_millisecond());
        transaction.execute(&keep, &[&ids, &urgencies, &since]).await?;
    }
    let (ids, states) = rows(|one| one.is_unreconciled);
    if !ids.is_empty() {
        let keep = transaction.prepare_cached(UNRECONCILED).await?;
        let groups = column(&states, |row| row.group.as_str());
        let states = column(&states, |row| row.state.as_str());
        transaction.execute(&keep, &[&groups, &ids, &states]).await?;
    }
    Ok(())
}

/// Fills `device_states` of a new database.
pub(super) fn rebuild_states_statement() -> String {
    format!(
        "insert into device_states (device_id, urgency, since)
         select h.device_id, {}, floor(extract(epoch from h.since) * 1000) from device_health h",
        urgency_of_health()
    )
}

async fn keep_jobs(transaction: &Transaction<'_>, evaluated: &[Evaluated]) -> Result<(), Error> {
    const KEEP: &str = "
        insert into job_health (
            device_id, job, is_expected, state, reason, since, next_due, waiting_since, heard_at,
            seen_failures, seen_failed
        )
        select given.*
          from unnest(
                   $1::text[], $2::text[], $3::bool[], $4::text[], $5::text[], $6::timestamptz[],
                   $7::timestamptz[], $8::timestamptz[], $9::timestamptz[], $10::bigint[], $11::bigint[]
               ) as given (device_id, job)
          join devices d on d.device_id = given.device_id
         order by given.device_id, given.job
            on conflict (device_id, job) do update
           set is_expected = excluded.is_expected, state = excluded.state, reason = excluded.reason,
               since = excluded.since, next_due = excluded.next_due, waiting_since = excluded.waiting_since,
               heard_at = excluded.heard_at, seen_failures = excluded.seen_failures,
               seen_failed = excluded.seen_failed
    ";
    const FORGET: &str = "
        delete from job_health
         where (device_id, job) in (select * from unnest($1::text[], $2::text[]))
    ";
    let rows: Vec<(&str, &JobHealthRow)> = evaluated
        .iter()
        .flat_map(|one| one.jobs.iter().map(|job| (one.device_id.as_str(), job)))
        .collect();
    if !rows.is_empty() {
        let ids: Vec<&str> = rows.iter().map(|(device_id, _)| *device_id).collect();
        let rows: Vec<&JobHealthRow> = rows.into_iter().map(|(_, job)| job).collect();
        let keep = transaction.prepare_cached(KEEP).await?;
        transaction
            .execute(
                &keep,
                &[
                    &ids,
                    &column(&rows, |row| row.job.as_str()),
                    &column(&rows, |row| row.is_expected),
                    &column(&rows, |row| row.state.as_str()),
                    &column(&rows, |row| row.reason.as_deref()),
                    &column(&rows, |row| instant(row.since)),
                    &column(&rows, |row| instant(row.next_due)),
                    &column(&rows, |row| instant(row.waiting_since)),
                    &column(&rows, |row| instant(row.heard_at)),
                    &column(&rows, |row| row.seen_failures),
                    &column(&rows, |row| row.seen_failed),
                ],
            )
            .await?;
    }
    let forgotten: Vec<(&str, &str)> = evaluated
        .iter()
        .flat_map(|one| one.forgotten_jobs.iter().map(|job| (one.device_id.as_str(), job.as_str())))
        .collect();
    if !forgotten.is_empty() {
        let (ids, jobs): (Vec<&str>, Vec<&str>) = forgotten.into_iter().unzip();
        let forget = transaction.prepare_cached(FORGET).await?;
        transaction.execute(&forget, &[&ids, &jobs]).await?;
    }
    Ok(())
}

async fn keep_runs(transaction: &Transaction<'_>, evaluated: &[Evaluated]) -> Result<(), Error> {
    const END: &str = "
        delete from run_starts
         where (device_id, job, run_id) in (select * from unnest($1::text[], $2::text[], $3::text[]))
    ";
    const AWAIT: &str = "
        update run_starts run set due_at = given.due_at
          from unnest($1::text[], $2::text[], $3::text[], $4::timestamptz[])
               as given (device_id, job, run_id, due_at)
         where run.device_id = given.device_id and run.job = given.job and run.run_id = given.run_id
    ";
    let mut ended = (Vec::new(), Vec::new(), Vec::new());
    let mut awaited = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for one in evaluated {
        for (job, run_id) in &one.ended_runs {
            ended.0.push(one.device_id.as_str());
            ended.1.push(job.as_str());
            ended.2.push(run_id.as_str());
        }
        for (job, run_id, due_at) in &one.awaited_runs {
            awaited.0.push(one.device_id.as_str());
            awaited.1.push(job.as_str());
            awaited.2.push(run_id.as_str());
            awaited.3.push(instant(*due_at));
        }
    }
    if !ended.0.is_empty() {
        let end = transaction.prepare_cached(END).await?;
        transaction.execute(&end, &[&ended.0, &ended.1, &ended.2]).await?;
    }
    if !awaited.0.is_empty() {
        let wait = transaction.prepare_cached(AWAIT).await?;
        transaction.execute(&wait, &[&awaited.0, &awaited.1, &awaited.2, &awaited.3]).await?;
    }
    Ok(())
}

/// Writes which devices are in another state, and counts them; answers how many there are.
async fn keep_changes(
    transaction: &Transaction<'_>,
    evaluated: &[Evaluated],
    now: Timestamp,
) -> Result<usize, Error> {
    const CHANGES: &str = r#"
        insert into state_changes (at, device_id, "from", "to", reason)
        select $1, given.* from unnest($2::text[], $3::text[], $4::text[], $5::text[]) as given
    "#;
    const COUNT: &str = r#"
        insert into group_states as kept ("group", state, devices, expected)
        select * from unnest($1::text[], $2::text[], $3::bigint[], $4::bigint[]) as given (name, state)
         order by name, state
            on conflict ("group", state) do update
           set devices = kept.devices + excluded.devices, expected = kept.expected + excluded.expected
    "#;
    const LEFT: &str = r#"
        update incidents set next_at = $2 where resolved_at is null and "group" = any($1)
    "#;
    let changed: Vec<&Evaluated> = evaluated.iter().filter(|one| one.change().is_some()).collect();
    if !changed.is_empty() {
        let from = column(&changed, |one| one.change().and_then(|(from, _)| from));
        let to = column(&changed, |one| one.change().map(|(_, to)| to));
        let changes = transaction.prepare_cached(CHANGES).await?;
        let ids = column(&changed, |one| one.device_id.as_str());
        let reasons = column(&changed, |one| one.reason);
        transaction.execute(&changes, &[&now.to_jiff(), &ids, &from, &to, &reasons]).await?;
    }
    let counts = state_counts(evaluated.iter());
    if !counts.is_empty() {
        let count = transaction.prepare_cached(COUNT).await?;
        let groups: Vec<&str> = counts.keys().map(|(group, _)| group.as_str()).collect();
        let states: Vec<&str> = counts.keys().map(|(_, state)| state.as_str()).collect();
        let devices: Vec<i64> = counts.values().map(|(devices, _)| *devices).collect();
        let expected: Vec<i64> = counts.values().map(|(_, expected)| *expected).collect();
        transaction.execute(&count, &[&groups, &states, &devices, &expected]).await?;
    }
    let left: Vec<&str> = evaluated.iter().filter_map(Evaluated::left_group).collect();
    if !left.is_empty() {
        let leave = transaction.prepare_cached(LEFT).await?;
        transaction.execute(&leave, &[&left, &now.to_jiff()]).await?;
    }
    Ok(changed.len())
}

/// Notes how many devices of each group are in a state that is not well, if that is the most of this hour and day.
async fn note_most(transaction: &Transaction<'_>, now: Timestamp) -> Result<(), Error> {
    let tables = [
        ("group_hours", "hour", "date_trunc('hour', $1::timestamptz, 'UTC')"),
        ("group_days", "day", "($1::timestamptz at time zone 'UTC')::date"),
    ];
    for (table, column, begins) in tables {
        let note = format!(
            r#"insert into {table} as kept (
                   "group", {column}, runs, failed_runs, most_failing, most_silent, most_degraded
               )
               select "group", {begins}, 0, 0,
                      coalesce(sum(devices) filter (where state = 'failing'), 0),
                      coalesce(sum(devices) filter (where state = 'silent'), 0),
                      coalesce(sum(devices) filter (where state = 'degraded'), 0)
                 from group_states
                group by "group"
               having coalesce(sum(devices) filter (where state in ('failing', 'silent', 'degraded')), 0) > 0
                order by "group"
                   on conflict ("group", {column}) do update
                  set most_failing = greatest(kept.most_failing, excluded.most_failing),
                      most_silent = greatest(kept.most_silent, excluded.most_silent),
                      most_degraded = greatest(kept.most_degraded, excluded.most_degraded)
                where kept.most_failing < excluded.most_failing or kept.most_silent < excluded.most_silent
                   or kept.most_degraded < excluded.most_degraded"#
        );
        let note = transaction.prepare_cached(&note).await?;
        transaction.execute(&note, &[&now.to_jiff()]).await?;
    }
    Ok(())
}

/// Forgets the state of a device that is being deleted, whose row is locked. Its incidents are looked at in the next sweep.
pub(super) async fn forget(transaction: &Transaction<'_>, device_id: &str) -> Result<(), Error> {
    const FORGET: &str = r#"
        delete from device_health where device_id = $1 returning "group", state, is_expected
    "#;
    const COUNT: &str = r#"
        update group_states set devices = devices - 1, expected = expected - $3::boolean::integer
         where "group" = $1 and state = $2
    "#;
    const LOOK: &str = r#"
        update incidents set next_at = opened_at where resolved_at is null and scope <> 'fleet' and "group" = $1
    "#;
    if let Some(kept) = transaction.query_opt(FORGET, &[&device_id]).await? {
        let (group, state, is_expected): (String, String, bool) =
            (kept.try_get(0)?, kept.try_get(1)?, kept.try_get(2)?);
        transaction.execute(COUNT, &[&group, &state, &is_expected]).await?;
        transaction.execute(LOOK, &[&group]).await?;
    }
    for table in ["device_states", "job_health", "run_starts", "unreconciled_devices"] {
        transaction
            .execute(&format!("delete from {table} where device_id = $1"), &[&device_id])
            .await?;
    }
    Ok(())
}

async fn end_sweep(connection: &mut Object, version: i64, now: Timestamp) -> Result<bool, Error> {
    const END: &str = "update fleet_state set swept_at = $1";
    const FORGET: &str = "delete from fleet_changes where version <= $1";
    let Some(transaction) = begin_step(connection, now).await? else { return Ok(false) };
    note_most(&transaction, now).await?;
    let end = transaction.prepare_cached(END).await?;
    transaction.execute(&end, &[&now.to_jiff()]).await?;
    let forget = transaction.prepare_cached(FORGET).await?;
    transaction.execute(&forget, &[&version]).await?;
    transaction.commit().await?;
    Ok(true)
}

async fn note_beat(connection: &mut Object, beat: &Beat) -> Result<Option<Outage>, Error> {
    // A database from before there were beats, or one that was copied: the last report shows when a server lived.
    const SIGNS: &str = "
        select coalesce(alive_at, (select max(last_received) from device_jobs)), stopped_at
          from fleet_state
           for update
    ";
    const ALIVE: &str = "update fleet_state set alive_at = greatest(alive_at, $1)";
    const STEPPED_BACK: &str = "update fleet_state set alive_at = $1";
    const NOT_YET: &str = "delete from outages where from_at >= $1";
    const CUT: &str = "update outages set until_at = $1 where until_at > $1";
    let transaction = connection.transaction().await?;
    let signs = transaction.prepare_cached(SIGNS).await?;
    let row = transaction.query_one(&signs, &[]).await?;
    let signs =
        LastSigns { alive_at: optional_time(&row, 0)?, stopped_at: optional_time(&row, 1)? };
    let found = outage(beat, signs, false);
    if let Some(found) = &found {
        note_outage(&transaction, found, &beat.node).await?;
    }
    // The clock of another server may be a little ahead. One that went back by more is followed.
    let has_stepped_back = signs.has_stepped_back(beat.at);
    if has_stepped_back {
        // What the clock took for an outage has not been yet.
        transaction.execute(NOT_YET, &[&beat.at.to_jiff()]).await?;
        transaction.execute(CUT, &[&beat.at.to_jiff()]).await?;
    }
    let alive = if has_stepped_back { STEPPED_BACK } else { ALIVE };
    let alive = transaction.prepare_cached(alive).await?;
    transaction.execute(&alive, &[&beat.at.to_jiff()]).await?;
    transaction.commit().await?;
    Ok(found)
}

/// Notes an outage, as one with the outage that ends where it begins.
async fn note_outage(
    transaction: &Transaction<'_>,
    outage: &Outage,
    node: &str,
) -> Result<(), Error> {
    const GO_ON: &str = "
        update outages set until_at = greatest(until_at, $2)
         where from_at = (select max(from_at) from outages where from_at <= $1)
           and until_at >= $1 and cause = $3
    ";
    const ADD: &str = "
        insert into outages as kept (from_at, until_at, cause, node) values ($1, $2, $3, $4)
            on conflict (from_at) do update set until_at = greatest(kept.until_at, excluded.until_at)
    ";
    let (from, until) = (outage.from.to_jiff(), outage.until.to_jiff());
    let cause = outage.cause.as_str();
    if transaction.execute(GO_ON, &[&from, &until, &cause]).await? == 0 {
        transaction.execute(ADD, &[&from, &until, &cause, &node]).await?;
    }
    Ok(())
}

/// Reads [`HEALTH_COLUMNS`] from column `first` on.
fn health_row(row: &Row, first: usize) -> Result<HealthRow, Error> {
    Ok(HealthRow {
        group: row.try_get(first)?,
        state: row.try_get(first + 1)?,
        since: time(row, first + 2)?,
        problems: row.try_get(first + 3)?,
        is_expected: row.try_get(first + 4)?,
        is_overdue: row.try_get(first + 5)?,
        is_behind: row.try_get(first + 6)?,
        silent_after: row.try_get(first + 7)?,
        grace: row.try_get(first + 8)?,
        due_at: optional_time(row, first + 9)?,
        late_at: optional_time(row, first + 10)?,
        check_at: optional_time(row, first + 11)?,
        patience: row.try_get(first + 12)?,
        behind_after: row.try_get(first + 13)?,
        next_due: optional_time(row, first + 14)?,
        waiting_since: optional_time(row, first + 15)?,
        heard_at: optional_time(row, first + 16)?,
        policy_version: row.try_get(first + 17)?,
    })
}

/// All that an evaluation of devices needs, in the order of their ids. Unknown ones are left out.
async fn device_rows(
    client: &impl GenericClient,
    devices: &[String],
    settings: &FleetSettings,
) -> Result<Vec<DeviceRow>, Error> {
    let of_settings = LEVEL_COLUMNS.split(", ").map(|column| format!("s.{column}"));
    let of_settings = of_settings.collect::<Vec<_>>().join(", ");
    let select = format!(
        r#"select d.device_id, coalesce(d."group", ''), d.created_at, s.device_id is not null,
                  h.device_id is not null, s.expected_from, coalesce(s.is_excused, false), {of_settings},
                  {HEALTH_COLUMNS}
             from devices d
             left join device_settings s using (device_id)
             left join device_health h using (device_id)
            where d.device_id = any($1)
            order by d.device_id"#
    );
    let select = client.prepare_cached(&select).await?;
    let device = |row: &Row| {
        let mut of_device = DeviceSettings::default();
        if row.try_get(3)? {
            of_device.level = level(row, 7)?;
            of_device.expected_from = optional_time(row, 5)?;
            of_device.is_excused = row.try_get(6)?;
        }
        let kept = if row.try_get(4)? { Some(health_row(row, 12)?) } else { None };
        Ok(DeviceRow {
            device_id: row.try_get(0)?,
            group: row.try_get(1)?,
            registered_at: time(row, 2)?,
            settings: of_device,
            kept,
            jobs: Vec::new(),
            runs: Vec::new(),
        })
    };
    let rows = client.query(&select, &[&devices]).await?;
    let mut rows = rows.iter().map(device).collect::<Result<Vec<_>, Error>>()?;
    let places: HashMap<String, usize> =
        rows.iter().enumerate().map(|(place, row)| (row.device_id.clone(), place)).collect();
    add_tags(client, devices, &places, &mut rows).await?;
    add_jobs(client, devices, &places, &mut rows).await?;
    add_runs(client, devices, &places, &mut rows).await?;
    add_first_failures(client, &mut rows).await?;
    add_outcomes(client, settings, &mut rows).await?;
    Ok(rows)
}

async fn add_tags(
    client: &impl GenericClient,
    devices: &[String],
    places: &HashMap<String, usize>,
    rows: &mut [DeviceRow],
) -> Result<(), Error> {
    const TAGS: &str =
        "select device_id, tag from device_tags where device_id = any($1) order by device_id, tag";
    let select = client.prepare_cached(TAGS).await?;
    for row in client.query(&select, &[&devices]).await? {
        if let Some(place) = places.get(row.try_get::<_, &str>(0)?) {
            rows[*place].settings.tags.push(row.try_get(1)?);
        }
    }
    Ok(())
}

async fn add_jobs(
    client: &impl GenericClient,
    devices: &[String],
    places: &HashMap<String, usize>,
    rows: &mut [DeviceRow],
) -> Result<(), Error> {
    const FIGURES: &str = "
        select device_id, job, failed_syncs, consecutive_failures, last_received, last_sync, last_success,
               last_failure
          from device_jobs
         where device_id = any($1)
         order by device_id, job
    ";
    const KEPT: &str = "
        select device_id, job, is_expected, state, reason, since, next_due, waiting_since, heard_at,
               seen_failures, seen_failed
          from job_health
         where device_id = any($1)
         order by device_id, job
    ";
    let select = client.prepare_cached(FIGURES).await?;
    for row in client.query(&select, &[&devices]).await? {
        let Some(place) = places.get(row.try_get::<_, &str>(0)?) else { continue };
        rows[*place].jobs.push(JobRow {
            job: row.try_get(1)?,
            figures: Some(JobFigureRow {
                failed_syncs: row.try_get(2)?,
                consecutive_failures: row.try_get(3)?,
                last_received: time(&row, 4)?,
                last_sync: time(&row, 5)?,
                last_success: optional_time(&row, 6)?,
                last_failure: optional_time(&row, 7)?,
                first_failure: None,
                outcomes: Vec::new(),
            }),
            kept: None,
        });
    }
    let select = client.prepare_cached(KEPT).await?;
    for row in client.query(&select, &[&devices]).await? {
        let Some(place) = places.get(row.try_get::<_, &str>(0)?) else { continue };
        let kept = JobHealthRow {
            job: row.try_get(1)?,
            is_expected: row.try_get(2)?,
            state: row.try_get(3)?,
            reason: row.try_get(4)?,
            since: optional_time(&row, 5)?,
            next_due: optional_time(&row, 6)?,
            waiting_since: optional_time(&row, 7)?,
            heard_at: optional_time(&row, 8)?,
            seen_failures: row.try_get(9)?,
            seen_failed: row.try_get(10)?,
        };
        let jobs = &mut rows[*place].jobs;
        match jobs.iter_mut().find(|job| job.job == kept.job) {
            Some(job) => job.kept = Some(kept),
            None => jobs.push(JobRow { job: kept.job.clone(), figures: None, kept: Some(kept) }),
        }
    }
    Ok(())
}

async fn add_runs(
    client: &impl GenericClient,
    devices: &[String],
    places: &HashMap<String, usize>,
    rows: &mut [DeviceRow],
) -> Result<(), Error> {
    const RUNS: &str = "
        select r.device_id, r.job, r.run_id, r.received_at,
               exists (select from event_keys k where k.device_id = r.device_id and k.event_id = r.run_id)
          from run_starts r
         where r.device_id = any($1)
         order by r.device_id, r.received_at, r.job, r.run_id
    ";
    let select = client.prepare_cached(RUNS).await?;
    for row in client.query(&select, &[&devices]).await? {
        let Some(place) = places.get(row.try_get::<_, &str>(0)?) else { continue };
        rows[*place].runs.push(RunRow {
            job: row.try_get(1)?,
            run_id: row.try_get(2)?,
            received_at: time(&row, 3)?,
            is_reported: row.try_get(4)?,
        });
    }
    Ok(())
}

/// Fills in the date of the first failure after the last success.
async fn add_first_failures(
    client: &impl GenericClient,
    rows: &mut [DeviceRow],
) -> Result<(), Error> {
    const FIRST: &str = "
        select given.place, first.timestamp
          from unnest($1::text[], $2::text[], $3::timestamptz[], $4::timestamptz[])
               with ordinality as given (device_id, job, after, until, place)
         cross join lateral (
                   select timestamp
                     from sync_events event
                    where event.device_id = given.device_id
                      and event.timestamp >= coalesce(given.after, '-infinity')
                      and event.timestamp <= given.until
                      and event.total_errors > 0
                      and coalesce(event.job, '') = given.job
                    order by event.timestamp
                    limit 1
               ) first
    ";
    let mut failing = Vec::new();
    let (mut ids, mut jobs, mut after, mut until) =
        (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for row in rows {
        let device_id = row.device_id.clone();
        for (job, figures) in row.failing_jobs() {
            ids.push(device_id.clone());
            jobs.push(job.to_owned());
            after.push(instant(figures.last_success));
            until.push(figures.last_failure.unwrap_or(figures.last_sync).to_jiff());
            figures.first_failure = figures.last_failure;
            failing.push(figures);
        }
    }
    if failing.is_empty() {
        return Ok(());
    }
    let select = client.prepare_cached(FIRST).await?;
    for row in client.query(&select, &[&ids, &jobs, &after, &until]).await? {
        let place = usize::try_from(row.try_get::<_, i64>(0)? - 1).ok();
        if let Some(figures) = place.and_then(|place| failing.get_mut(place)) {
            figures.first_failure = Some(time(&row, 1)?);
        }
    }
    Ok(())
}

/// Fills in the last runs of jobs whose rules count them.
async fn add_outcomes(
    client: &impl GenericClient,
    settings: &FleetSettings,
    rows: &mut [DeviceRow],
) -> Result<(), Error> {
    const OUTCOMES: &str = "
        select given.place, last.timestamp, last.has_failed
          from unnest($1::text[], $2::text[], $3::timestamptz[])
               with ordinality as given (device_id, job, until, place)
         cross join lateral (
                   select timestamp, id, total_errors > 0 as has_failed
                     from sync_events event
                    where event.device_id = given.device_id
                      and event.timestamp <= given.until
                      and coalesce(event.job, '') = given.job
                    order by event.timestamp desc, event.id desc
                    limit $4
               ) last
         order by given.place, last.timestamp, last.id
    ";
    let mut counted = Vec::new();
    let (mut ids, mut jobs, mut until) = (Vec::new(), Vec::new(), Vec::new());
    for row in rows {
        let device_id = row.device_id.clone();
        for (job, figures) in row.counted_jobs(settings) {
            ids.push(device_id.clone());
            jobs.push(job.to_owned());
            until.push(figures.last_sync.to_jiff());
            counted.push(figures);
        }
    }
    if counted.is_empty() {
        return Ok(());
    }
    let select = client.prepare_cached(OUTCOMES).await?;
    for row in client.query(&select, &[&ids, &jobs, &until, &OUTCOMES_READ]).await? {
        let place = usize::try_from(row.try_get::<_, i64>(0)? - 1).ok();
        if let Some(figures) = place.and_then(|place| counted.get_mut(place)) {
            figures.outcomes.push(Outcome { at: time(&row, 1)?, has_failed: row.try_get(2)? });
        }
    }
    Ok(())
}
