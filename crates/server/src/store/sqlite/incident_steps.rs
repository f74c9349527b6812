//! Makes incidents in SQLite. The sweep calls it through `IncidentSteps`. Each step is one transaction of the writer.

use std::{collections::HashMap, sync::Arc};

use async_trait::async_trait;
use pisync_core::{
    Timestamp,
    health::{IncidentScope, ProblemKind, Tally},
};
use rusqlite::{OptionalExtension, Row, Transaction, named_params, params};
use serde_json::json;

use super::{
    health::begin_step,
    outbox,
    rows::{optional_time, time},
    store::SqliteStore,
    write_connection::WriteConnection,
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
impl IncidentSteps for SqliteStore {
    async fn groups_to_reconcile(&self, now: Timestamp) -> Result<Vec<String>, StoreError> {
        const GROUPS: &str = r#"
            select distinct "group" from unreconciled_devices
             union
            select "group" from incidents
             where resolved_at is null and next_at <= ?1 and scope in ('device', 'group')
             union
            select "group" from incidents
             where resolved_at is null and scope = 'group'
               and (subject in (select key from fleet_changes where scope = 'group')
                    or exists (select 1 from fleet_changes where scope = 'fleet'))
             order by 1
        "#;
        self.read(move |connection| {
            connection
                .prepare_cached(GROUPS)?
                .query_map([now.as_millisecond()], |row| row.get(0))?
                .collect()
        })
        .await
    }

    async fn reconcile_fleet(
        &self,
        settings: &Arc<FleetSettings>,
        now: Timestamp,
    ) -> Result<Option<Vec<IncidentEvent>>, StoreError> {
        let settings = Arc::clone(settings);
        self.writer.call(move |writer| reconcile_fleet(writer, &settings, now)).await
    }

    async fn reconcile_group(
        &self,
        group: &str,
        settings: &Arc<FleetSettings>,
        now: Timestamp,
    ) -> Result<Option<Reconciled>, StoreError> {
        let (group, settings) = (group.to_owned(), Arc::clone(settings));
        self.writer.call(move |writer| reconcile_group(writer, &group, &settings, now)).await
    }
}

fn reconcile_fleet(
    writer: &mut WriteConnection,
    settings: &FleetSettings,
    now: Timestamp,
) -> rusqlite::Result<Option<Vec<IncidentEvent>>> {
    const NEW: &str = "select exists (select 1 from unreconciled_devices where state = ?1)";
    const AGAIN: &str = r#"
        insert or ignore into unreconciled_devices select "group", device, state from device_health where state = ?1
    "#;
    let Some(transaction) = begin_step(writer, now)? else { return Ok(None) };
    let open = open_incidents(&transaction, None)?;
    let mut has_new = [false; 2];
    for (index, kind) in KINDS.into_iter().enumerate() {
        has_new[index] =
            transaction.prepare_cached(NEW)?.query_row([kind.as_str()], |row| row.get(0))?;
    }
    if open.is_empty() && has_new == [false; 2] {
        return Ok(Some(Vec::new()));
    }
    let is_silence = has_new[0] || open.iter().any(|one| one.kind == ProblemKind::Silent);
    let last_heard = if is_silence { last_heard(&transaction, None)? } else { None };
    let mut facts = FleetFacts {
        ended: ended_incidents(&transaction, IncidentScope::Fleet, FLEET, now)?,
        tallies: [Tally::default(); 2],
        missing: [0; 2],
        last_heard,
        has_new,
        open,
    };
    for (index, kind) in KINDS.into_iter().enumerate() {
        facts.tallies[index] = tally(&transaction, None, kind, last_heard, now)?;
        if let Some(open) = facts.open.iter().find(|one| one.kind == kind) {
            facts.missing[index] = missing(&transaction, None, kind, open.since)?;
        }
    }
    if is_silence {
        let (late, groups) = late_in_fleet(&transaction, last_heard, now)?;
        let tally = &mut facts.tallies[0];
        (tally.late, tally.late_in_dark) = (late.0, tally.late_in_dark + late.1);
        tally.groups = tally.groups.max(groups);
    }
    let mut writes = fleet_writes(&facts, settings, now);
    explain_ends(&transaction, &facts.open, &mut writes, now)?;
    let events = keep_incidents(&transaction, settings, &writes, now)?;
    for write in &writes {
        if write.incident.resolved_at.is_some() {
            // The devices that are left get incidents of their own, or of their groups.
            transaction.execute(AGAIN, [write.incident.kind.as_str()])?;
        }
    }
    transaction.commit()?;
    Ok(Some(events))
}

fn reconcile_group(
    writer: &mut WriteConnection,
    group: &str,
    settings: &FleetSettings,
    now: Timestamp,
) -> rusqlite::Result<Option<Reconciled>> {
    const RECONCILED: &str =
        r#"delete from unreconciled_devices where "group" = ?1 and device <= ?2"#;
    let Some(transaction) = begin_step(writer, now)? else { return Ok(None) };
    let (facts, last) = group_facts(&transaction, group, now)?;
    let mut writes = group_writes(&facts, settings, now);
    explain_ends(&transaction, &facts.open, &mut writes, now)?;
    let events = keep_incidents(&transaction, settings, &writes, now)?;
    if let Some(last) = last {
        transaction.prepare_cached(RECONCILED)?.execute(params![group, last])?;
    }
    transaction.commit()?;
    Ok(Some(Reconciled { events, has_more: facts.has_more }))
}

/// Finds out why incidents of many devices end. `open` are the incidents before the step.
fn explain_ends(
    transaction: &Transaction<'_>,
    open: &[IncidentRow],
    writes: &mut [IncidentWrite],
    now: Timestamp,
) -> rusqlite::Result<()> {
    const HAS_DEVICES: &str = r#"
        select exists (select 1 from device_health where ?1 is null or "group" = ?1)
    "#;
    for write in writes {
        let Some(wanted) = write.wanted_members(open, now) else { continue };
        let gone = gone_members(transaction, &wanted)?;
        let has_devices = transaction
            .prepare_cached(HAS_DEVICES)?
            .query_row([&wanted.group], |row| row.get(0))?;
        write.ends_for(&gone, has_devices);
    }
    Ok(())
}

/// Some members of an incident that it is no longer about.
fn gone_members(
    transaction: &Transaction<'_>,
    wanted: &WantedMembers,
) -> rusqlite::Result<Vec<GoneMember>> {
    const GONE: &str = r#"
        select m.device_id, m.joined_at, m.jobs, m.presumed
          from incident_members m
          left join devices d on d.device_id = m.device_id
          left join device_health h on h.device = d.id
         where m.incident = ?1 and (m.left_at is null or m.left_at >= ?2)
           and (h.state is null or h.state <> ?3 or h."group" <> ?4)
         limit ?5
    "#;
    let left_since = wanted.left_since.as_millisecond();
    let kind = wanted.kind.as_str();
    let found = transaction
        .prepare_cached(GONE)?
        .query_map(
            params![wanted.incident, left_since, kind, wanted.group, ASKED_MEMBERS],
            |row| Ok((row.get(0)?, (time(row, 1)?, row.get(2)?, row.get(3)?))),
        )?
        .collect::<rusqlite::Result<Vec<(String, (Timestamp, String, bool))>>>()?;
    let (device_ids, members): (Vec<_>, Vec<_>) = found.into_iter().unzip();
    let devices = troubles(transaction, device_ids)?.into_iter();
    let member = |(device, (joined_at, jobs, is_presumed))| GoneMember {
        device,
        joined_at,
        jobs,
        is_presumed,
    };
    Ok(devices.zip(members).map(member).collect())
}

/// What a step of a group reads, and the number of the last device whose state is taken up by it.
fn group_facts(
    transaction: &Transaction<'_>,
    group: &str,
    now: Timestamp,
) -> rusqlite::Result<(GroupFacts, Option<i64>)> {
    // The row of a device that foreign SQL has deleted is still to be taken away.
    const PAGE: &str = r#"
        select u.device, d.device_id
          from unreconciled_devices u
          left join devices d on d.id = u.device
         where u."group" = ?1
         order by u.device
         limit ?2
    "#;
    const MEMBERS: &str = "
        select device_id, presumed from incident_members where incident = ?1 and left_at is null
    ";
    let open = open_incidents(transaction, Some(group))?;
    let mut page = transaction
        .prepare_cached(PAGE)?
        .query_map(params![group, DEVICES_AT_ONCE + 1], |row| Ok((row.get(0)?, row.get(1)?)))?
        .collect::<rusqlite::Result<Vec<(i64, Option<String>)>>>()?;
    let has_more = i64::try_from(page.len()).is_ok_and(|found| found > DEVICES_AT_ONCE);
    page.truncate(usize::try_from(DEVICES_AT_ONCE).unwrap_or(usize::MAX));
    let last = page.last().map(|(device, _)| *device);
    let mut device_ids: Vec<String> =
        page.into_iter().filter_map(|(_, device_id)| device_id).collect();
    let own = open.iter().filter(|one| one.scope == IncidentScope::Device);
    device_ids.extend(own.map(|own| own.subject.clone()));
    device_ids.sort_unstable();
    device_ids.dedup();
    let devices = troubles(transaction, device_ids)?;
    let mut members = Vec::new();
    for of_group in open.iter().filter(|one| one.scope == IncidentScope::Group) {
        let Some(id) = of_group.id else { continue };
        let rows = transaction
            .prepare_cached(MEMBERS)?
            .query_map([id], |row| Ok((row.get(0)?, row.get(1)?)))?
            .collect::<rusqlite::Result<Vec<(String, bool)>>>()?;
        let (device_ids, presumed): (Vec<String>, Vec<bool>) = rows.into_iter().unzip();
        let rows = troubles(transaction, device_ids)?.into_iter().zip(presumed);
        members.extend(rows.map(|(member, presumed)| (id, member, presumed)));
    }
    let is_silence = GroupFacts::needs_late(&open, &devices);
    let (late, last_heard) = if is_silence {
        (late_in_group(transaction, group)?, last_heard(transaction, Some(group))?)
    } else {
        (Vec::new(), None)
    };
    let mut facts = GroupFacts {
        group: group.to_owned(),
        has_more,
        tallies: [Tally::default(); 2],
        last_heard,
        members,
        missing: [0; 2],
        ended: ended_incidents(transaction, IncidentScope::Group, group, now)?,
        late: Vec::new(),
        next_late: None,
        open,
        devices,
    };
    if has_ended_incidents(transaction, now)? {
        for device in &facts.devices {
            let subject = &device.device_id;
            facts.ended.extend(ended_incidents(transaction, IncidentScope::Device, subject, now)?);
        }
    }
    for (index, kind) in KINDS.into_iter().enumerate() {
        facts.tallies[index] = tally(transaction, Some(group), kind, last_heard, now)?;
        if let Some(open) = GroupFacts::of_group(&facts.open, kind) {
            facts.missing[index] = missing(transaction, Some(group), kind, open.since)?;
        }
    }
    facts.note_late(late, now);
    Ok((facts, last))
}

/// Reads [`INCIDENT_COLUMNS`].
fn incident(row: &Row<'_>) -> rusqlite::Result<Option<IncidentRow>> {
    let columns = IncidentColumns {
        id: row.get(0)?,
        scope: row.get(1)?,
        subject: row.get(2)?,
        group: row.get(3)?,
        kind: row.get(4)?,
        severity: row.get(5)?,
        since: time(row, 6)?,
        opened_at: time(row, 7)?,
        resolved_at: optional_time(row, 8)?,
        resolution: row.get(9)?,
        reopened: row.get(10)?,
        reopenings: row.get(11)?,
        flapping_since: optional_time(row, 12)?,
        calm_at: optional_time(row, 13)?,
        next_at: optional_time(row, 14)?,
        summary: row.get(15)?,
        is_told: row.get(16)?,
    };
    Ok(columns.incident())
}

/// The open incidents of the fleet, and of a group and its devices.
fn open_incidents(
    transaction: &Transaction<'_>,
    group: Option<&str>,
) -> rusqlite::Result<Vec<IncidentRow>> {
    let select = format!(
        r#"select {INCIDENT_COLUMNS} from incidents where resolved_at is null and scope = 'fleet'
            union all
           select {INCIDENT_COLUMNS} from incidents
            where resolved_at is null and scope in ('device', 'group') and "group" = ?1"#
    );
    let rows = transaction
        .prepare_cached(&select)?
        .query_map([group], incident)?
        .collect::<rusqlite::Result<Vec<_>>>()?;
    Ok(rows.into_iter().flatten().collect())
}

/// Whether any incident ended not long ago. Most often none did, and then none need be looked for, device by device.
fn has_ended_incidents(transaction: &Transaction<'_>, now: Timestamp) -> rusqlite::Result<bool> {
    const HAS_ENDED: &str = "select exists (select 1 from incidents where resolved_at >= ?1)";
    let since = reopened_since(now).as_millisecond();
    transaction.prepare_cached(HAS_ENDED)?.query_row([since], |row| row.get(0))
}

/// The last incidents of a subject, of each kind, that ended not long ago and that somebody may have been told of.
fn ended_incidents(
    transaction: &Transaction<'_>,
    scope: IncidentScope,
    subject: &str,
    now: Timestamp,
) -> rusqlite::Result<Vec<IncidentRow>> {
    let select = format!(
        "select {INCIDENT_COLUMNS}
           from incidents
          where scope = ?1 and subject = ?2 and kind = ?3 and resolved_at >= ?4 and resolution <> 'merged'
          order by id desc
          limit 1"
    );
    let mut ended = Vec::new();
    for kind in KINDS {
        let since = reopened_since(now).as_millisecond();
        let found = transaction
            .prepare_cached(&select)?
            .query_row(params![scope.as_str(), subject, kind.as_str(), since], incident)
            .optional()?;
        ended.extend(found.flatten());
    }
    Ok(ended)
}

/// What is kept of devices' states, in the order of `device_ids`.
fn troubles(
    transaction: &Transaction<'_>,
    device_ids: Vec<String>,
) -> rusqlite::Result<Vec<TroubleRow>> {
    const TROUBLES: &str = r#"
        select d.device_id, h."group", h.state, h.problems, h.is_expected, h.patience, h.heard_at,
               (select json_group_array(json_array(j.job, j.last_success, j.last_received))
                  from device_jobs j where j.device = h.device),
               ifnull((select s.policy from device_settings s where s.device = h.device), '{}')
          from json_each(?1) page
         cross join devices d on d.device_id = page.value
         cross join device_health h on h.device = d.id
    "#;
    let mut troubles = transaction.prepare_cached(TROUBLES)?;
    let states = troubles.query_map([json!(device_ids).to_string()], |row| {
        let state = TroubleState {
            group: row.get(1)?,
            state: row.get(2)?,
            problems: KeptProblem::read(row.get_ref(3)?.as_str()?),
            is_expected: row.get(4)?,
            patience: row.get(5)?,
            heard_at: optional_time(row, 6)?,
            reports: row.get(7)?,
            policy: row.get(8)?,
        };
        Ok((row.get(0)?, state))
    })?;
    let mut states = states.collect::<rusqlite::Result<HashMap<String, TroubleState>>>()?;
    let of = |device_id: String| TroubleRow { state: states.remove(&device_id), device_id };
    Ok(device_ids.into_iter().map(of).collect())
}

/// How a group, or the fleet, is doing, but for those who are late.
fn tally(
    transaction: &Transaction<'_>,
    group: Option<&str>,
    kind: ProblemKind,
    last_heard: Option<Timestamp>,
    now: Timestamp,
) -> rusqlite::Result<Tally> {
    let of_group = if group.is_some() { r#""group" = :group"# } else { ":group is null" };
    let judged = format!("select ifnull(sum(expected), 0) from group_states where {of_group}");
    let in_problem = format!(
        r#"select ifnull(sum(is_recent), 0), ifnull(sum(not is_recent), 0),
                  min(iif(is_recent, since, null)),
                  ifnull(sum(is_recent and since - grace > :last_heard), 0),
                  count(distinct iif(is_recent, "group", null))
             from (select *, since >= :now - max(:long, ifnull(patience, 0)) as is_recent
                     from device_health
                    where {of_group} and state = :state and is_expected = 1)"#
    );
    let judged = transaction
        .prepare_cached(&judged)?
        .query_row(named_params! { ":group": group }, |row| row.get(0))?;
    let parameters = named_params! {
        ":group": group,
        ":state": kind.as_str(),
        ":now": now.as_millisecond(),
        ":long": pisync_core::health::incident::LEAST_LONG,
        ":last_heard": last_heard.map(Timestamp::as_millisecond),
    };
    transaction.prepare_cached(&in_problem)?.query_row(parameters, |row| {
        Ok(Tally {
            judged,
            in_problem: row.get(0)?,
            long_in_problem: row.get(1)?,
            since: optional_time(row, 2)?,
            late: 0,
            late_in_dark: row.get(3)?,
            groups: row.get(4)?,
        })
    })
}

/// How many devices of a group, or of the fleet, have had a problem since an incident began.
fn missing(
    transaction: &Transaction<'_>,
    group: Option<&str>,
    kind: ProblemKind,
    since: Timestamp,
) -> rusqlite::Result<i64> {
    let of_group = if group.is_some() { r#""group" = ?3"# } else { "?3 is null" };
    // Of a group, the index by group is the right one, however few devices the planner takes to be in the state since then.
    let missing = format!(
        "select count(*) from device_health
          where state = ?1 and +since >= ?2 and is_expected = 1 and {of_group}"
    );
    let parameters = params![kind.as_str(), since.as_millisecond(), group];
    transaction.prepare_cached(&missing)?.query_row(parameters, |row| row.get(0))
}

/// When any device of a group, or of the fleet, was last heard.
fn last_heard(
    transaction: &Transaction<'_>,
    group: Option<&str>,
) -> rusqlite::Result<Option<Timestamp>> {
    const OF_FLEET: &str = "select max(last_received) from device_jobs where ?1 is null";
    const OF_GROUP: &str = r#"
        select max(j.last_received)
          from device_health h
          join device_jobs j on j.device = h.device
         where h."group" = ?1
    "#;
    let select = if group.is_some() { OF_GROUP } else { OF_FLEET };
    transaction.prepare_cached(select)?.query_row([group], |row| optional_time(row, 0))
}

/// The devices of which a report is late, and since when: device_id, group, late_at. They are not silent yet.
const LATE: &str = r#"
    select d.device_id as device_id, h."group" as of_group,
           iif(j.heard is h.heard_at, h.late_at, j.heard + h.silent_after - h.grace) as late_at
      from device_health h
      join devices d on d.id = h.device
      join (select device, max(last_received) as heard from device_jobs group by device) j on j.device = h.device
     where h.is_expected = 1 and h.state not in ('silent', 'never')
"#;

/// The devices of a group that are not silent, and when a report of each is late.
fn late_in_group(
    transaction: &Transaction<'_>,
    group: &str,
) -> rusqlite::Result<Vec<(String, Timestamp)>> {
    // As `LATE`, but it looks up the jobs of this group's devices alone.
    const OF_GROUP: &str = r#"
        select device_id, iif(heard is heard_at, late_at, heard + silent_after - grace) as since
          from (select d.device_id, h.heard_at, h.late_at, h.silent_after, h.grace,
                       (select max(last_received) from device_jobs j where j.device = h.device) as heard
                  from device_health h
                  join devices d on d.id = h.device
                 where h."group" = ?1 and h.is_expected = 1 and h.state not in ('silent', 'never'))
         where since is not null
         order by device_id
    "#;
    transaction
        .prepare_cached(OF_GROUP)?
        .query_map([group], |row| Ok((row.get(0)?, time(row, 1)?)))?
        .collect()
}

/// How many devices are late, and how many since anybody was heard; and in how many groups devices are silent or late.
fn late_in_fleet(
    transaction: &Transaction<'_>,
    last_heard: Option<Timestamp>,
    now: Timestamp,
) -> rusqlite::Result<((i64, i64), i64)> {
    let select = format!(
        r#"with late as (select * from ({LATE}) where late_at <= :now)
           select (select count(*) from late),
                  (select count(*) from late where late_at > :last_heard),
                  (select count(*)
                     from (select of_group from late
                            union
                           select "group" from device_health where state = 'silent' and is_expected = 1))"#
    );
    let parameters = named_params! {
        ":now": now.as_millisecond(),
        ":last_heard": last_heard.map(Timestamp::as_millisecond),
    };
    transaction
        .prepare_cached(&select)?
        .query_row(parameters, |row| Ok(((row.get(0)?, row.get(1)?), row.get(2)?)))
}

/// The open incidents about channels.
pub(super) fn channel_incidents(
    transaction: &Transaction<'_>,
) -> rusqlite::Result<Vec<IncidentRow>> {
    let select = format!(
        "select {INCIDENT_COLUMNS} from incidents where resolved_at is null and scope = 'channel'"
    );
    let rows = transaction
        .prepare_cached(&select)?
        .query_map([], incident)?
        .collect::<rusqlite::Result<Vec<_>>>()?;
    Ok(rows.into_iter().flatten().collect())
}

/// Writes the changes of incidents, has people told of them, and answers what they would want to know.
pub(super) fn keep_incidents(
    transaction: &Transaction<'_>,
    settings: &FleetSettings,
    writes: &[IncidentWrite],
    now: Timestamp,
) -> rusqlite::Result<Vec<IncidentEvent>> {
    let events = apply(transaction, writes, now)?;
    outbox::tell(transaction, settings, &events, now)?;
    Ok(events.into_iter().map(|(_, event)| event).collect())
}

/// Writes the changes of incidents, and answers what has become of them, with the group of each.
fn apply(
    transaction: &Transaction<'_>,
    writes: &[IncidentWrite],
    now: Timestamp,
) -> rusqlite::Result<Vec<(String, IncidentEvent)>> {
    const JOIN: &str = "
        insert into incident_members as kept (incident, device_id, jobs, joined_at, left_at, presumed)
        values (?1, ?2, ?3, ?4, null, ?5)
            on conflict (incident, device_id) do update
           set jobs = excluded.jobs, presumed = excluded.presumed, left_at = null,
               joined_at = iif(kept.left_at is null, kept.joined_at, excluded.joined_at)
    ";
    const LEAVE: &str = "
        update incident_members set left_at = ?3
         where incident = ?1 and device_id = ?2 and left_at is null
    ";
    const ENTRY: &str = r#"
        insert into incident_entries (incident, id, at, what, "by", details)
        values (?1, (select ifnull(max(id), 0) + 1 from incident_entries where incident = ?1), ?2, ?3, null, ?4)
    "#;
    let at = now.as_millisecond();
    let mut events = Vec::new();
    for write in writes {
        let id = keep(transaction, &write.incident)?;
        for (device_id, jobs, presumed) in &write.joined {
            let member = params![id, device_id, jobs, at, presumed];
            transaction.prepare_cached(JOIN)?.execute(member)?;
        }
        for device_id in &write.left {
            transaction.prepare_cached(LEAVE)?.execute(params![id, device_id, at])?;
        }
        for (what, details) in &write.entries {
            let entry = params![id, at, what, details.to_string()];
            transaction.prepare_cached(ENTRY)?.execute(entry)?;
        }
        events.extend(write.event(id).map(|event| (write.incident.group.clone(), event)));
    }
    Ok(events)
}

/// Keeps an incident, and answers its id.
fn keep(transaction: &Transaction<'_>, incident: &IncidentRow) -> rusqlite::Result<i64> {
    const ADD: &str = r#"
        insert into incidents (
            scope, subject, "group", kind, severity, since, opened_at, resolved_at, resolution, reopened,
            reopenings, flapping_since, calm_at, next_at, summary
        ) values (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15)
    "#;
    // An acknowledgement does not outlive the end of an incident.
    const CHANGE: &str = r#"
        update incidents
           set acknowledged_at = iif(resolved_at is null, acknowledged_at, null),
               acknowledged_by = iif(resolved_at is null, acknowledged_by, null),
               acknowledged_until = iif(resolved_at is null, acknowledged_until, null),
               acknowledged_note = iif(resolved_at is null, acknowledged_note, null),
               scope = ?1, subject = ?2, "group" = ?3, kind = ?4, severity = ?5, since = ?6, opened_at = ?7,
               resolved_at = ?8, resolution = ?9, reopened = ?10, reopenings = ?11, flapping_since = ?12,
               calm_at = ?13, next_at = ?14, summary = ?15
         where id = ?16
    "#;
    let instant = |at: Option<Timestamp>| at.map(Timestamp::as_millisecond);
    let (scope, kind) = (incident.scope.as_str(), incident.kind.as_str());
    let severity = incident.severity.as_str();
    let (since, opened_at) = (incident.since.as_millisecond(), incident.opened_at.as_millisecond());
    let (reopenings, summary) = (incident.reopenings_json(), incident.summary.to_string());
    let resolved_at = instant(incident.resolved_at);
    let [flapping_since, calm_at, next_at] =
        [incident.flapping_since, incident.calm_at, incident.next_at].map(instant);
    let values: [&dyn rusqlite::ToSql; 16] = [
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
            transaction.prepare_cached(CHANGE)?.execute(&values[..])?;
            Ok(id)
        }
        None => {
            transaction.prepare_cached(ADD)?.execute(&values[..15])?;
            Ok(transaction.last_insert_rowid())
        }
    }
}
