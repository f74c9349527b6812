//! Makes incidents in PostgreSQL. The sweep calls it through `IncidentSteps`. Each step is one transaction; one server at a
//! time takes steps.

use std::{collections::HashMap, sync::Arc};

use async_trait::async_trait;
use deadpool_postgres::Transaction;
use pisync_core::{
    Timestamp,
    health::{IncidentScope, ProblemKind, Tally, incident::LEAST_LONG},
};
use tokio_postgres::{Error, Row};

use super::{
    connect::Object,
    health::begin_step,
    outbox,
    rows::{instant, optional_time, time},
    store::PostgresStore,
};
use crate::store::{
    FleetSettings, StoreError,
    health::KeptProblem,
    incident_steps::{
        ASKED_MEMBERS, DEVICES_AT_ONCE, FLEET, FleetFacts, GoneMember, GroupFacts,
        INCIDENT_COLUMNS, IncidentColumns, IncidentEvent, IncidentRow, IncidentSteps,
        IncidentWrite, KINDS, Reconciled, TroubleRow, TroubleState, WantedMembers, fleet_writes,
        group_writes, reopened_since,
    },
};

#[async_trait]
impl IncidentSteps for PostgresStore {
    async fn groups_to_reconcile(&self, now: Timestamp) -> Result<Vec<String>, StoreError> {
        const GROUPS: &str = r#"
            select distinct "group" from unreconciled_devices
             union
            select "group" from incidents
             where resolved_at is null and next_at <= $1 and scope in ('device', 'group')
             union
            select "group" from incidents
             where resolved_at is null and scope = 'group'
               and (subject in (select key from fleet_changes where scope = 'group')
                    or exists (select from fleet_changes where scope = 'fleet'))
             order by 1
        "#;
        self.call(async |connection| {
            let select = connection.prepare_cached(GROUPS).await?;
            let rows = connection.query(&select, &[&now.to_jiff()]).await?;
            rows.iter().map(|row| row.try_get(0)).collect()
        })
        .await
    }

    async fn reconcile_fleet(
        &self,
        settings: &Arc<FleetSettings>,
        now: Timestamp,
    ) -> Result<Option<Vec<IncidentEvent>>, StoreError> {
        self.call(async |connection| reconcile_fleet(connection, settings, now).await).await
    }

    async fn reconcile_group(
        &self,
        group: &str,
        settings: &Arc<FleetSettings>,
        now: Timestamp,
    ) -> Result<Option<Reconciled>, StoreError> {
        self.call(async |connection| reconcile_group(connection, group, settings, now).await).await
    }
}

async fn reconcile_fleet(
    connection: &mut Object,
    settings: &FleetSettings,
    now: Timestamp,
) -> Result<Option<Vec<IncidentEvent>>, Error> {
    const NEW: &str = "select exists (select from unreconciled_devices where state = $1)";
    const AGAIN: &str = r#"
        insert into unreconciled_devices ("group", device_id, state)
        select "group", device_id, state from device_health where state = $1
            on conflict do nothing
    "#;
    let Some(transaction) = begin_step(connection, now).await? else { return Ok(None) };
    let open = open_incidents(&transaction, None).await?;
    let mut has_new = [false; 2];
    let new = transaction.prepare_cached(NEW).await?;
    for (index, kind) in KINDS.into_iter().enumerate() {
        has_new[index] = transaction.query_one(&new, &[&kind.as_str()]).await?.try_get(0)?;
    }
    if open.is_empty() && has_new == [false; 2] {
        return Ok(Some(Vec::new()));
    }
    let is_silence = has_new[0] || open.iter().any(|one| one.kind == ProblemKind::Silent);
    let last_heard = if is_silence { last_heard(&transaction, None).await? } else { None };
    let mut facts = FleetFacts {
        ended: ended_incidents(&transaction, IncidentScope::Fleet, &[FLEET], now).await?,
        tallies: [Tally::default(); 2],
        missing: [0; 2],
        last_heard,
        has_new,
        open,
    };
    for (index, kind) in KINDS.into_iter().enumerate() {
        facts.tallies[index] = tally(&transaction, None, kind, last_heard, now).await?;
        if let Some(open) = facts.open.iter().find(|one| one.kind == kind) {
            facts.missing[index] = missing(&transaction, None, kind, open.since).await?;
        }
    }
    if is_silence {
        let (late, groups) = late_in_fleet(&transaction, last_heard, now).await?;
        let tally = &mut facts.tallies[0];
        (tally.late, tally.late_in_dark) = (late.0, tally.late_in_dark + late.1);
        tally.groups = tally.groups.max(groups);
    }
    let mut writes = fleet_writes(&facts, settings, now);
    explain_ends(&transaction, &facts.open, &mut writes, now).await?;
    let events = keep_incidents(&transaction, settings, &writes, now).await?;
    for write in &writes {
        if write.incident.resolved_at.is_some() {
            // The devices that are left get incidents of their own, or of their groups.
            transaction.execute(AGAIN, &[&write.incident.kind.as_str()]).await?;
        }
    }
    transaction.commit().await?;
    Ok(Some(events))
}

async fn reconcile_group(
    connection: &mut Object,
    group: &str,
    settings: &FleetSettings,
    now: Timestamp,
) -> Result<Option<Reconciled>, Error> {
    const RECONCILED: &str =
        r#"delete from unreconciled_devices where "group" = $1 and device_id <= $2"#;
    let Some(transaction) = begin_step(connection, now).await? else { return Ok(None) };
    let (facts, last) = group_facts(&transaction, group, now).await?;
    let mut writes = group_writes(&facts, settings, now);
    explain_ends(&transaction, &facts.open, &mut writes, now).await?;
    let events = keep_incidents(&transaction, settings, &writes, now).await?;
    if let Some(last) = last {
        let reconciled = transaction.prepare_cached(RECONCILED).await?;
        transaction.execute(&reconciled, &[&group, &last]).await?;
    }
    transaction.commit().await?;
    Ok(Some(Reconciled { events, has_more: facts.has_more }))
}

/// Finds out why incidents of many devices end. `open` are the incidents before the step.
async fn explain_ends(
    transaction: &Transaction<'_>,
    open: &[IncidentRow],
    writes: &mut [IncidentWrite],
    now: Timestamp,
) -> Result<(), Error> {
    const HAS_DEVICES: &str = r#"
        select exists (select from device_health where $1::text is null or "group" = $1)
    "#;
    for write in writes {
        let Some(wanted) = write.wanted_members(open, now) else { continue };
        let gone = gone_members(transaction, &wanted).await?;
        let has_devices = transaction.prepare_cached(HAS_DEVICES).await?;
        let has_devices =
            transaction.query_one(&has_devices, &[&wanted.group]).await?.try_get(0)?;
        write.ends_for(&gone, has_devices);
    }
    Ok(())
}

/// Some members of an incident that it is no longer about.
async fn gone_members(
    transaction: &Transaction<'_>,
    wanted: &WantedMembers,
) -> Result<Vec<GoneMember>, Error> {
    const GONE: &str = r#"
        select m.device_id, m.joined_at, m.jobs, m.presumed
          from incident_members m
          left join device_health h using (device_id)
         where m.incident = $1 and (m.left_at is null or m.left_at >= $2)
           and (h.state is null or h.state <> $3 or h."group" <> $4)
         limit $5
    "#;
    let select = transaction.prepare_cached(GONE).await?;
    let left_since = wanted.left_since.to_jiff();
    let values: [&(dyn tokio_postgres::types::ToSql + Sync); 5] =
        [&wanted.incident, &left_since, &wanted.kind.as_str(), &wanted.group, &ASKED_MEMBERS];
    let rows = transaction.query(&select, &values).await?;
    let ids = rows.iter().map(|row| row.try_get(0)).collect::<Result<Vec<String>, Error>>()?;
    let mut states = troubles(transaction, &ids).await?;
    let member = |(device_id, row): (String, &Row)| {
        Ok(GoneMember {
            device: TroubleRow { state: states.remove(&device_id), device_id },
            joined_at: time(row, 1)?,
            jobs: row.try_get(2)?,
            is_presumed: row.try_get(3)?,
        })
    };
    ids.into_iter().zip(&rows).map(member).collect()
}

/// What a step of a group reads, and the last device whose state is taken up by it.
async fn group_facts(
    transaction: &Transaction<'_>,
    group: &str,
    now: Timestamp,
) -> Result<(GroupFacts, Option<String>), Error> {
    const PAGE: &str = r#"
        select device_id from unreconciled_devices where "group" = $1 order by device_id limit $2
    "#;
    const MEMBERS: &str = "
        select incident, device_id, presumed from incident_members
         where incident = any($1) and left_at is null
    ";
    let open = open_incidents(transaction, Some(group)).await?;
    let select = transaction.prepare_cached(PAGE).await?;
    let rows = transaction.query(&select, &[&group, &(DEVICES_AT_ONCE + 1)]).await?;
    let mut page = rows.iter().map(|row| row.try_get(0)).collect::<Result<Vec<String>, Error>>()?;
    let has_more = i64::try_from(page.len()).is_ok_and(|found| found > DEVICES_AT_ONCE);
    page.truncate(usize::try_from(DEVICES_AT_ONCE).unwrap_or(usize::MAX));
    let last = page.last().cloned();
    let mut device_ids = page;
    let own = open.iter().filter(|one| one.scope == IncidentScope::Device);
    device_ids.extend(own.map(|own| own.subject.clone()));
    device_ids.sort_unstable();
    device_ids.dedup();
    let of_group: Vec<i64> = open
        .iter()
        .filter(|one| one.scope == IncidentScope::Group)
        .filter_map(|one| one.id)
        .collect();
    let select = transaction.prepare_cached(MEMBERS).await?;
    let rows = transaction.query(&select, &[&of_group]).await?;
    let member_rows = rows
        .iter()
        .map(|row| Ok((row.try_get(0)?, row.try_get(1)?, row.try_get(2)?)))
        .collect::<Result<Vec<(i64, String, bool)>, Error>>()?;
    let mut wanted = device_ids.clone();
    wanted.extend(member_rows.iter().map(|(_, device_id, _)| device_id.clone()));
    let known = troubles(transaction, &wanted).await?;
    let trouble = |device_id: &String| TroubleRow {
        device_id: device_id.clone(),
        state: known.get(device_id).cloned(),
    };
    let devices: Vec<TroubleRow> = device_ids.iter().map(trouble).collect();
    let members = member_rows
        .iter()
        .map(|(incident, device_id, presumed)| (*incident, trouble(device_id), *presumed))
        .collect();
    let is_silence = GroupFacts::needs_late(&open, &devices);
    let (late, last_heard) = if is_silence {
        (late_in_group(transaction, group).await?, last_heard(transaction, Some(group)).await?)
    } else {
        (Vec::new(), None)
    };
    let subjects: Vec<&str> = device_ids.iter().map(String::as_str).collect();
    let mut ended = ended_incidents(transaction, IncidentScope::Device, &subjects, now).await?;
    ended.extend(ended_incidents(transaction, IncidentScope::Group, &[group], now).await?);
    let mut facts = GroupFacts {
        group: group.to_owned(),
        has_more,
        tallies: [Tally::default(); 2],
        last_heard,
        members,
        missing: [0; 2],
        ended,
        late: Vec::new(),
        next_late: None,
        open,
        devices,
    };
    for (index, kind) in KINDS.into_iter().enumerate() {
        facts.tallies[index] = tally(transaction, Some(group), kind, last_heard, now).await?;
        if let Some(open) = GroupFacts::of_group(&facts.open, kind) {
            facts.missing[index] = missing(transaction, Some(group), kind, open.since).await?;
        }
    }
    facts.note_late(late, now);
    Ok((facts, last))
}

/// Reads [`INCIDENT_COLUMNS`].
fn incident(row: &Row) -> Result<Option<IncidentRow>, Error> {
    let columns = IncidentColumns {
        id: row.try_get(0)?,
        scope: row.try_get(1)?,
        subject: row.try_get(2)?,
        group: row.try_get(3)?,
        kind: row.try_get(4)?,
        severity: row.try_get(5)?,
        since: time(row, 6)?,
        opened_at: time(row, 7)?,
        resolved_at: optional_time(row, 8)?,
        resolution: row.try_get(9)?,
        reopened: row.try_get(10)?,
        reopenings: row.try_get(11)?,
        flapping_since: optional_time(row, 12)?,
        calm_at: optional_time(row, 13)?,
        next_at: optional_time(row, 14)?,
        summary: row.try_get(15)?,
        is_told: row.try_get(16)?,
    };
    Ok(columns.incident())
}

/// The open incidents of the fleet, and of a group and its devices.
async fn open_incidents(
    transaction: &Transaction<'_>,
    group: Option<&str>,
) -> Result<Vec<IncidentRow>, Error> {
    let select = format!(
        r#"select {INCIDENT_COLUMNS} from incidents where resolved_at is null and scope = 'fleet'
            union all
           select {INCIDENT_COLUMNS} from incidents
            where resolved_at is null and scope in ('device', 'group') and "group" = $1"#
    );
    let select = transaction.prepare_cached(&select).await?;
    let rows = transaction.query(&select, &[&group]).await?;
    rows.iter().filter_map(|row| incident(row).transpose()).collect()
}

/// The last incidents of subjects, of each kind, that ended not long ago and that somebody may have been told of.
async fn ended_incidents(
    transaction: &Transaction<'_>,
    scope: IncidentScope,
    subjects: &[&str],
    now: Timestamp,
) -> Result<Vec<IncidentRow>, Error> {
    let select = format!(
        "select distinct on (subject, kind) {INCIDENT_COLUMNS}
           from incidents
          where scope = $1 and subject = any($2) and kind = any($3) and resolved_at >= $4
            and resolution <> 'merged'
          order by subject, kind, id desc"
    );
    let kinds = KINDS.map(ProblemKind::as_str);
    let since = reopened_since(now).to_jiff();
    let select = transaction.prepare_cached(&select).await?;
    let parameters: [&(dyn tokio_postgres::types::ToSql + Sync); 4] =
        [&scope.as_str(), &subjects, &&kinds[..], &since];
    let rows = transaction.query(&select, &parameters).await?;
    rows.iter().filter_map(|row| incident(row).transpose()).collect()
}

/// What is kept of devices' states.
async fn troubles(
    transaction: &Transaction<'_>,
    devices: &[String],
) -> Result<HashMap<String, TroubleState>, Error> {
    const TROUBLES: &str = r#"
        select h.device_id, h."group", h.state, h.problems, h.is_expected, h.patience, h.heard_at,
               coalesce(
                   (select json_agg(json_build_array(
                               j.job, floor(extract(epoch from j.last_success) * 1000)::bigint,
                               floor(extract(epoch from j.last_received) * 1000)::bigint
                           ))::text
                      from device_jobs j where j.device_id = h.device_id),
                   '[]'
               ),
               coalesce((select s.policy from device_settings s where s.device_id = h.device_id), '{}')
          from device_health h
         where h.device_id = any($1)
    "#;
    let select = transaction.prepare_cached(TROUBLES).await?;
    let rows = transaction.query(&select, &[&devices]).await?;
    let trouble = |row: &Row| {
        let state = TroubleState {
            group: row.try_get(1)?,
            state: row.try_get(2)?,
            problems: KeptProblem::read(row.try_get(3)?),
            is_expected: row.try_get(4)?,
            patience: row.try_get(5)?,
            heard_at: optional_time(row, 6)?,
            reports: row.try_get(7)?,
            policy: row.try_get(8)?,
        };
        Ok((row.try_get(0)?, state))
    };
    rows.iter().map(trouble).collect()
}

/// How a group, or the fleet, is doing, but for those who are late.
async fn tally(
    transaction: &Transaction<'_>,
    group: Option<&str>,
    kind: ProblemKind,
    last_heard: Option<Timestamp>,
    now: Timestamp,
) -> Result<Tally, Error> {
    let (of_group, with) = of_group(group);
    let judged =
        format!("select coalesce(sum(expected), 0)::bigint from group_states where {of_group}");
    let in_problem = format!(
        r#"{with}
           select count(*) filter (where is_recent), count(*) filter (where not is_recent),
                  min(since) filter (where is_recent),
                  count(*) filter (where is_recent and since - grace * interval '1 millisecond' > $5),
                  count(distinct "group") filter (where is_recent)
             from (select *, since >= $3::timestamptz - greatest($4, coalesce(patience, 0)) * interval '1 millisecond' as is_recent
                     from health
                    where state = $2 and is_expected) troubled"#
    );
    let judged = transaction.prepare_cached(&judged).await?;
    let judged = transaction.query_one(&judged, &[&group]).await?.try_get(0)?;
    let in_problem = transaction.prepare_cached(&in_problem).await?;
    let parameters: [&(dyn tokio_postgres::types::ToSql + Sync); 5] =
        [&group, &kind.as_str(), &now.to_jiff(), &LEAST_LONG, &instant(last_heard)];
    let row = transaction.query_one(&in_problem, &parameters).await?;
    Ok(Tally {
        judged,
        in_problem: row.try_get(0)?,
        long_in_problem: row.try_get(1)?,
        since: optional_time(&row, 2)?,
        late: 0,
        late_in_dark: row.try_get(3)?,
        groups: row.try_get(4)?,
    })
}

/// How many devices of a group, or of the fleet, have had a problem since an incident began.
async fn missing(
    transaction: &Transaction<'_>,
    group: Option<&str>,
    kind: ProblemKind,
    since: Timestamp,
) -> Result<i64, Error> {
    let (_, with) = of_group(group);
    let missing = format!(
        "{with} select count(*) from health where state = $2 and since >= $3 and is_expected"
    );
    let missing = transaction.prepare_cached(&missing).await?;
    transaction.query_one(&missing, &[&group, &kind.as_str(), &since.to_jiff()]).await?.try_get(0)
}

/// The condition by which rows are of a group, or of the fleet, and the states of its devices as `health`. Those of a group
/// are read by the group: right after thousands have changed, the planner takes any state for rare.
fn of_group(group: Option<&str>) -> (&'static str, String) {
    let (condition, materialized) = match group {
        Some(_) => (r#""group" = $1"#, "materialized"),
        None => ("$1::text is null", "not materialized"),
    };
    (
        condition,
        format!("with health as {materialized} (select * from device_health where {condition})"),
    )
}

/// When any device of a group, or of the fleet, was last heard.
async fn last_heard(
    transaction: &Transaction<'_>,
    group: Option<&str>,
) -> Result<Option<Timestamp>, Error> {
    const OF_FLEET: &str = "select max(last_received) from device_jobs where $1::text is null";
    const OF_GROUP: &str = r#"
        select max(j.last_received)
          from device_health h
          join device_jobs j using (device_id)
         where h."group" = $1
    "#;
    let select = if group.is_some() { OF_GROUP } else { OF_FLEET };
    let select = transaction.prepare_cached(select).await?;
    optional_time(&transaction.query_one(&select, &[&group]).await?, 0)
}

/// When a report of a device `h` that was last heard at `heard` became late, or will.
const LATE_AT: &str = "
    case when heard is not distinct from h.heard_at then h.late_at
         else heard + (h.silent_after - h.grace) * interval '1 millisecond'
    end
";

/// The devices of a group that are not silent, and when a report of each is late.
async fn late_in_group(
    transaction: &Transaction<'_>,
    group: &str,
) -> Result<Vec<(String, Timestamp)>, Error> {
    let select = format!(
        r#"select device_id, late_at
             from (select h.device_id, {LATE_AT} as late_at
                     from device_health h
                    cross join lateral (
                              select max(last_received) as heard from device_jobs j where j.device_id = h.device_id
                          ) j
                    where h."group" = $1 and h.is_expected and h.state not in ('silent', 'never')) found
            where late_at is not null
            order by device_id"#
    );
    let select = transaction.prepare_cached(&select).await?;
    let rows = transaction.query(&select, &[&group]).await?;
    rows.iter().map(|row| Ok((row.try_get(0)?, time(row, 1)?))).collect()
}

/// How many devices are late, and how many since anybody was heard; and in how many groups devices are silent or late.
async fn late_in_fleet(
    transaction: &Transaction<'_>,
    last_heard: Option<Timestamp>,
    now: Timestamp,
) -> Result<((i64, i64), i64), Error> {
    let select = format!(
        r#"with late as (
               select of_group, late_at
                 from (select h."group" as of_group, {LATE_AT} as late_at
                         from device_health h
                         join (select device_id, max(last_received) as heard
                                 from device_jobs
                                group by device_id) j using (device_id)
                        where h.is_expected and h.state not in ('silent', 'never')) found
                where late_at <= $1
           )
           select (select count(*) from late),
                  (select count(*) from late where late_at > $2),
                  (select count(*)
                     from (select of_group from late
                            union
                           select "group" from device_health where state = 'silent' and is_expected) groups)"#
    );
    let select = transaction.prepare_cached(&select).await?;
    let row = transaction.query_one(&select, &[&now.to_jiff(), &instant(last_heard)]).await?;
    Ok(((row.try_get(0)?, row.try_get(1)?), row.try_get(2)?))
}

/// The open incidents about channels.
pub(super) async fn channel_incidents(
    transaction: &Transaction<'_>,
) -> Result<Vec<IncidentRow>, Error> {
    let select = format!(
        "select {INCIDENT_COLUMNS} from incidents where resolved_at is null and scope = 'channel'"
    );
    let select = transaction.prepare_cached(&select).await?;
    let rows = transaction.query(&select, &[]).await?;
    rows.iter().filter_map(|row| incident(row).transpose()).collect()
}

/// Writes the changes of incidents, has people told of them, and answers what they would want to know.
pub(super) async fn keep_incidents(
    transaction: &Transaction<'_>,
    settings: &FleetSettings,
    writes: &[IncidentWrite],
    now: Timestamp,
) -> Result<Vec<IncidentEvent>, Error> {
    let events = apply(transaction, writes, now).await?;
    outbox::tell(transaction, settings, &events, now).await?;
    Ok(events.into_iter().map(|(_, event)| event).collect())
}

/// Writes the changes of incidents, and answers what has become of them, with the group of each.
async fn apply(
    transaction: &Transaction<'_>,
    writes: &[IncidentWrite],
    now: Timestamp,
) -> Result<Vec<(String, IncidentEvent)>, Error> {
    const JOIN: &str = "
        insert into incident_members as kept (incident, device_id, jobs, joined_at, left_at, presumed)
        select $1, device_id, jobs, $5, null, presumed
          from unnest($2::text[], $3::text[], $4::bool[]) as given (device_id, jobs, presumed)
            on conflict (incident, device_id) do update
           set jobs = excluded.jobs, presumed = excluded.presumed, left_at = null,
               joined_at = case when kept.left_at is null then kept.joined_at else excluded.joined_at end
    ";
    const LEAVE: &str = "
        update incident_members set left_at = $3
         where incident = $1 and device_id = any($2) and left_at is null
    ";
    const ENTRY: &str = r#"
        insert into incident_entries (incident, id, at, what, "by", details)
        select $1, coalesce(max(id), 0) + 1, $2, $3, null, $4 from incident_entries where incident = $1
    "#;
    let at = now.to_jiff();
    let mut events = Vec::new();
    for write in writes {
        let id = keep(transaction, &write.incident).await?;
        if !write.joined.is_empty() {
            let ids: Vec<&str> = write.joined.iter().map(|(id, ..)| id.as_str()).collect();
            let jobs: Vec<&str> = write.joined.iter().map(|(_, jobs, _)| jobs.as_str()).collect();
            let presumed: Vec<bool> = write.joined.iter().map(|(.., presumed)| *presumed).collect();
            let join = transaction.prepare_cached(JOIN).await?;
            transaction.execute(&join, &[&id, &ids, &jobs, &presumed, &at]).await?;
        }
        if !write.left.is_empty() {
            let leave = transaction.prepare_cached(LEAVE).await?;
            transaction.execute(&leave, &[&id, &write.left, &at]).await?;
        }
        let entry = transaction.prepare_cached(ENTRY).await?;
        for (what, details) in &write.entries {
            transaction.execute(&entry, &[&id, &at, what, &details.to_string()]).await?;
        }
        events.extend(write.event(id).map(|event| (write.incident.group.clone(), event)));
    }
    Ok(events)
}

/// Keeps an incident, and answers its id.
async fn keep(transaction: &Transaction<'_>, incident: &IncidentRow) -> Result<i64, Error> {
    const ADD: &str = r#"
        insert into incidents (
            scope, subject, "group", kind, severity, since, opened_at, resolved_at, resolution, reopened,
            reopenings, flapping_since, calm_at, next_at, summary
        ) values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15)
        returning id
    "#;
    // An acknowledgement does not outlive the end of an incident.
    const CHANGE: &str = r#"
        update incidents
           set acknowledged_at = case when resolved_at is null then acknowledged_at end,
               acknowledged_by = case when resolved_at is null then acknowledged_by end,
               acknowledged_until = case when resolved_at is null then acknowledged_until end,
               acknowledged_note = case when resolved_at is null then acknowledged_note end,
               scope = $1, subject = $2, "group" = $3, kind = $4, severity = $5, since = $6, opened_at = $7,
               resolved_at = $8, resolution = $9, reopened = $10, reopenings = $11, flapping_since = $12,
               calm_at = $13, next_at = $14, summary = $15
         where id = $16
    "#;
    let (scope, kind) = (incident.scope.as_str(), incident.kind.as_str());
    let severity = incident.severity.as_str();
    let (since, opened_at) = (incident.since.to_jiff(), incident.opened_at.to_jiff());
    let (reopenings, summary) = (incident.reopenings_json(), incident.summary.to_string());
    let resolved_at = instant(incident.resolved_at);
    let [flapping_since, calm_at, next_at] =
        [incident.flapping_since, incident.calm_at, incident.next_at].map(instant);
    let values: [&(dyn tokio_postgres::types::ToSql + Sync); 16] = [
        &scope,
        &incident.subject,
        &incident.group,
        &kind,
        &severity,
        &since,
        &opened_at,
        &resolved_at,
        &incident.resolution,
        &incident.reopened,
        &reopenings,
        &flapping_since,
        &calm_at,
        &next_at,
        &summary,
        &incident.id,
    ];
    match incident.id {
        Some(id) => {
            let change = transaction.prepare_cached(CHANGE).await?;
            transaction.execute(&change, &values).await?;
            Ok(id)
        }
        None => {
            let add = transaction.prepare_cached(ADD).await?;
            transaction.query_one(&add, &values[..15]).await?.try_get(0)
        }
    }
}
