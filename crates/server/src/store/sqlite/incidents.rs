//! Incidents in SQLite: how they are listed, looked up and acknowledged. The API and `pisync incident` call it through
//! `Incidents`. Only the sweep makes and resolves them.

use async_trait::async_trait;
use pisync_core::{DeviceId, Timestamp};
use rusqlite::{
    Connection, OptionalExtension, Row, Transaction, TransactionBehavior, params, params_from_iter,
    types::Value,
};

use super::{
    audit::record,
    connection::expect_row,
    rows::{optional_time, time},
    store::SqliteStore,
};
use crate::store::{
    AcknowledgeOutcome, Acknowledgement, Actor, Count, GroupFilter, HealthCounts, HistoryPosition,
    Incident, IncidentDetail, IncidentEntry, IncidentMember, IncidentPage, IncidentQuery,
    Incidents, NewAcknowledgement, StoreError, Via,
    audit::NewAuditEntry,
    incidents::{
        COUNTED, Dialect, INCIDENT_COLUMNS, Parameter, Standing, Statement, TIMELINE, details_of,
        name_of, stored_json,
    },
};

const DIALECT: Dialect = Dialect { placeholder: '?' };

#[async_trait]
impl Incidents for SqliteStore {
    async fn incidents(&self, query: &IncidentQuery) -> Result<IncidentPage, StoreError> {
        let query = query.clone();
        self.read(move |connection| incidents(connection, &query)).await
    }

    async fn incident(
        &self,
        id: i64,
        limit: u32,
        offset: u64,
    ) -> Result<Option<IncidentDetail>, StoreError> {
        self.read(move |connection| incident(connection, id, limit, offset)).await
    }

    async fn acknowledge_incident(
        &self,
        id: i64,
        acknowledgement: Option<&NewAcknowledgement>,
        by: &Actor,
    ) -> Result<AcknowledgeOutcome, StoreError> {
        let (acknowledgement, by) = (acknowledgement.cloned(), *by);
        self.writer
            .call(move |writer| acknowledge(writer.connection(), id, acknowledgement.as_ref(), &by))
            .await
    }

    async fn health_counts(&self) -> Result<HealthCounts, StoreError> {
        self.read(health_counts).await
    }
}

fn incidents(connection: &Connection, query: &IncidentQuery) -> rusqlite::Result<IncidentPage> {
    let snapshot = connection.unchecked_transaction()?;
    let page = DIALECT.page(query);
    let values = values(query, &page, i64::from(query.limit) + 1);
    let mut incidents = snapshot
        .prepare_cached(&page.sql)?
        .query_map(params_from_iter(values), stored_incident)?
        .collect::<rusqlite::Result<Vec<_>>>()?;
    let has_more = incidents.len() > query.limit as usize;
    incidents.truncate(query.limit as usize);
    let next = incidents.last().filter(|_| has_more).map(|last| HistoryPosition {
        microsecond: last.opened_at.as_millisecond() * 1000,
        id: last.id,
    });
    let count = DIALECT.count(query);
    let counted: i64 = snapshot.prepare_cached(&count.sql)?.query_row(
        params_from_iter(self::values(query, &count, i64::from(COUNTED) + 1)),
        |row| row.get(0),
    )?;
    Ok(IncidentPage { incidents, total: Count::up_to(COUNTED, counted.cast_unsigned()), next })
}

/// The parameters of a statement.
fn values(query: &IncidentQuery, statement: &Statement, limit: i64) -> Vec<Value> {
    let text = |text: Option<&str>| text.map_or(Value::Null, |text| text.to_owned().into());
    statement
        .parameters
        .iter()
        .map(|parameter| match parameter {
            Parameter::Limit => limit.into(),
            Parameter::Since => query.since.unwrap_or(Timestamp::MIN).as_millisecond().into(),
            Parameter::AfterTime => {
                query.after.map_or(i64::MAX, |after| after.microsecond.div_euclid(1000)).into()
            }
            Parameter::AfterId => query.after.map_or(i64::MAX, |after| after.id).into(),
            Parameter::Group => text(query.group.as_ref().map(GroupFilter::key)),
            Parameter::Device => text(query.device_id.as_ref().map(DeviceId::as_str)),
        })
        .collect()
}

/// Reads [`INCIDENT_COLUMNS`].
pub(super) fn stored_incident(row: &Row<'_>) -> rusqlite::Result<Incident> {
    let acknowledgement = match optional_time(row, 9)? {
        Some(at) => Some(Acknowledgement {
            at,
            by: row.get::<_, Option<String>>(10)?.unwrap_or_default(),
            until: optional_time(row, 11)?,
            note: row.get(12)?,
        }),
        None => None,
    };
    Ok(Incident {
        id: row.get(0)?,
        scope: row.get(1)?,
        subject: row.get(2)?,
        kind: row.get(3)?,
        severity: row.get(4)?,
        since: time(row, 5)?,
        opened_at: time(row, 6)?,
        resolved_at: optional_time(row, 7)?,
        resolution: row.get(8)?,
        acknowledgement,
        reopened: row.get(13)?,
        flapping_since: optional_time(row, 14)?,
        summary: stored_json(&row.get::<_, String>(15)?),
    })
}

fn one(connection: &Connection, id: i64) -> rusqlite::Result<Option<Incident>> {
    let select = format!("select {INCIDENT_COLUMNS} from incidents i where i.id = ?1");
    connection.prepare_cached(&select)?.query_row([id], stored_incident).optional()
}

fn incident(
    connection: &Connection,
    id: i64,
    limit: u32,
    offset: u64,
) -> rusqlite::Result<Option<IncidentDetail>> {
    const MEMBERS: &str = "
        select device_id, jobs, joined_at, left_at, presumed
          from incident_members
         where incident = ?1
         order by device_id
         limit ?2 offset ?3
    ";
    const COUNT_MEMBERS: &str = "
        select count(*) from (select 1 from incident_members where incident = ?1 limit ?2)
    ";
    const ENTRIES: &str = r#"
        select at, what, "by", details
          from incident_entries
         where incident = ?1
         order by id desc
         limit ?2
    "#;
    let snapshot = connection.unchecked_transaction()?;
    let Some(incident) = one(&snapshot, id)? else { return Ok(None) };
    let members = snapshot
        .prepare_cached(MEMBERS)?
        .query_map(params![id, limit, offset.cast_signed()], |row| {
            Ok(IncidentMember {
                device_id: row.get(0)?,
                jobs: stored_json(&row.get::<_, String>(1)?),
                joined_at: time(row, 2)?,
                left_at: optional_time(row, 3)?,
                is_presumed: row.get(4)?,
            })
        })?
        .collect::<rusqlite::Result<_>>()?;
    let counted: i64 = snapshot
        .prepare_cached(COUNT_MEMBERS)?
        .query_row(params![id, COUNTED + 1], |row| row.get(0))?;
    let mut timeline = snapshot
        .prepare_cached(ENTRIES)?
        .query_map(params![id, TIMELINE], |row| {
            Ok(IncidentEntry {
                at: time(row, 0)?,
                what: row.get(1)?,
                by: row.get(2)?,
                details: stored_json(&row.get::<_, String>(3)?),
            })
        })?
        .collect::<rusqlite::Result<Vec<_>>>()?;
    timeline.reverse();
    let total_members = Count::up_to(COUNTED, counted.cast_unsigned());
    Ok(Some(IncidentDetail { incident, members, total_members, timeline }))
}

fn acknowledge(
    connection: &mut Connection,
    id: i64,
    acknowledgement: Option<&NewAcknowledgement>,
    by: &Actor,
) -> rusqlite::Result<AcknowledgeOutcome> {
    const ACKNOWLEDGE: &str = "
        update incidents
           set acknowledged_at = ?2, acknowledged_by = ?3, acknowledged_until = ?4, acknowledged_note = ?5
         where id = ?1
    ";
    const ADD_ENTRY: &str = r#"
        insert into incident_entries (incident, id, at, what, "by", details)
        select ?1, 1 + ifnull(max(id), 0), ?2, 'acknowledged', ?3, ?4
          from incident_entries
         where incident = ?1
    "#;
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    match standing(&transaction, id, by.at)? {
        Standing::Unknown => return Ok(AcknowledgeOutcome::Unknown),
        Standing::Resolved => return Ok(AcknowledgeOutcome::Resolved),
        Standing::Open { is_acknowledged } if is_acknowledged || acknowledgement.is_some() => {
            let name = actor_name(&transaction, by)?;
            let now = by.at.as_millisecond();
            let given = acknowledgement.map(|given| (now, &name, given));
            let changed = transaction.execute(
                ACKNOWLEDGE,
                params![
                    id,
                    given.map(|(at, ..)| at),
                    given.map(|(_, name, _)| name),
                    given.and_then(|(.., given)| given.until.map(Timestamp::as_millisecond)),
                    given.and_then(|(.., given)| given.note.as_deref()),
                ],
            )?;
            expect_row("incidents", changed)?;
            let details = details_of(acknowledgement).to_string();
            let added = transaction.execute(ADD_ENTRY, params![id, now, name, details])?;
            expect_row("incident_entries", added)?;
            record(&transaction, by, &NewAuditEntry::acknowledged(id, acknowledgement))?;
        }
        Standing::Open { .. } => {}
    }
    let incident = one(&transaction, id)?.ok_or(rusqlite::Error::QueryReturnedNoRows)?;
    transaction.commit()?;
    Ok(AcknowledgeOutcome::Done(Box::new(incident)))
}

fn standing(transaction: &Transaction<'_>, id: i64, now: Timestamp) -> rusqlite::Result<Standing> {
    const STANDING: &str = "
        select resolved_at is not null,
               acknowledged_at is not null and ifnull(acknowledged_until > ?2, 1)
          from incidents
         where id = ?1
    ";
    let found = transaction
        .query_row(STANDING, params![id, now.as_millisecond()], |row| {
            Ok(match (row.get(0)?, row.get(1)?) {
                (true, _) => Standing::Resolved,
                (false, is_acknowledged) => Standing::Open { is_acknowledged },
            })
        })
        .optional()?;
    Ok(found.unwrap_or(Standing::Unknown))
}

/// The word for an actor in a timeline.
fn actor_name(transaction: &Transaction<'_>, by: &Actor) -> rusqlite::Result<String> {
    const KEY_NAME: &str = "select name from api_keys where id = ?1";
    let Via::Key(id) = by.via else { return Ok(name_of(by, None)) };
    let name = transaction.query_row(KEY_NAME, [id], |row| row.get(0)).optional()?;
    Ok(name_of(by, name.flatten()))
}

fn health_counts(connection: &Connection) -> rusqlite::Result<HealthCounts> {
    const DEVICES: &str = "select state, sum(devices) from group_states group by state";
    const INCIDENTS: &str = "
        select kind, scope, count(*) from incidents where resolved_at is null group by scope, kind
    ";
    const SWEPT_AT: &str = "select swept_at from fleet_state";
    const WAITING: &str = "select count(*) from notifications where state = 'pending'";
    let snapshot = connection.unchecked_transaction()?;
    let devices = snapshot
        .prepare_cached(DEVICES)?
        .query_map([], |row| Ok((row.get(0)?, row.get::<_, i64>(1)?.max(0).cast_unsigned())))?
        .collect::<rusqlite::Result<_>>()?;
    let incidents = snapshot
        .prepare_cached(INCIDENTS)?
        .query_map([], |row| Ok((row.get(0)?, row.get(1)?, row.get::<_, i64>(2)?.cast_unsigned())))?
        .collect::<rusqlite::Result<_>>()?;
    let swept_at = snapshot.prepare_cached(SWEPT_AT)?.query_row([], |row| optional_time(row, 0))?;
    let waiting: i64 = snapshot.prepare_cached(WAITING)?.query_row([], |row| row.get(0))?;
    let waiting_notifications = waiting.cast_unsigned();
    Ok(HealthCounts { devices, incidents, swept_at, waiting_notifications })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use pisync_core::health::IncidentScope;

    use super::*;
    use crate::store::{INCIDENT_KINDS, Target, migrations::Migrator};

    /// Whatever is asked for, a page is found through an index that leads to it, and no incident is read in vain.
    #[tokio::test]
    async fn every_page_is_found_through_its_index() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pisync.db");
        let target = Target::Sqlite(path.clone());
        let mut migrator = Migrator::new(&target, Path::new("/nonexistent")).await.unwrap();
        migrator.up(Timestamp::from_millisecond(0).unwrap()).await.unwrap();
        let connection = Connection::open(path).unwrap();
        let group = Some(GroupFilter::new("g").unwrap());
        let device = Some(DeviceId::new("pi").unwrap());
        let position = Some(HistoryPosition { microsecond: 1, id: 1 });
        let mut checked = 0;
        for number in 0..64 {
            let is = |bit: u32| number >> bit & 1 == 1;
            let query = IncidentQuery {
                is_resolved: is(0),
                kind: is(1).then_some(INCIDENT_KINDS[0]),
                scope: is(2).then_some(IncidentScope::Device),
                group: group.clone().filter(|_| is(3)),
                device_id: device.clone().filter(|_| is(4)),
                since: None,
                limit: 50,
                after: position.filter(|_| is(5)),
            };
            for statement in [DIALECT.page(&query), DIALECT.count(&query)] {
                let plan = format!("explain query plan {}", statement.sql);
                let values = values(&query, &statement, 51);
                let steps: Vec<String> = connection
                    .prepare(&plan)
                    .unwrap()
                    .query_map(params_from_iter(values), |row| row.get(3))
                    .unwrap()
                    .collect::<Result<_, _>>()
                    .unwrap();
                for step in steps.iter().filter(|step| step.contains(" i ")) {
                    let is_member = step.contains("PRIMARY KEY");
                    let columns = match (&query.device_id, &query.group) {
                        (Some(_), _) => "(scope=? AND subject=? AND kind=?",
                        (None, Some(_)) => "(group=? AND scope=? AND kind=?",
                        (None, None) => "(scope=? AND kind=?",
                    };
                    let is_right = step.contains(columns);
                    assert!(step.starts_with("SEARCH"), "{query:?}: {steps:?}");
                    assert!(is_right || is_member, "{query:?}: {step}");
                    assert!(!is_member || query.device_id.is_some(), "{query:?}: {step}");
                    checked += 1;
                }
            }
        }
        assert!(checked > 200, "only {checked} steps were checked");
    }
}
