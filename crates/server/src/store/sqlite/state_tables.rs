//! The tables in SQLite that follow from `device_health` alone: `group_states` counts its rows, and `device_states` has their
//! order. Sweeps and deletions write them in the same transaction. `pisync verify` and `maintenance` compare them here, and make
//! good what foreign SQL or a mistake has made wrong.

use rusqlite::{Connection, Transaction, TransactionBehavior};
use serde_json::json;

use super::{store::SqliteStore, write_connection::WriteConnection};
use crate::store::{StateDifferences, StoreError, device_states::urgency_of_health};

/// How many rows of `device_states` are made good in one transaction.
const DEVICES_AT_ONCE: usize = 500;

/// What differs.
#[derive(Debug, Default)]
pub(super) struct WrongStates {
    /// Groups with wrong rows, and how many each has.
    groups: Vec<(String, u64)>,
    /// Devices whose row is missing, wrong, or too much.
    devices: Vec<i64>,
}

impl WrongStates {
    pub(super) fn number(&self) -> StateDifferences {
        StateDifferences {
            group_states: self.groups.iter().map(|(_, rows)| rows).sum(),
            device_states: self.devices.len() as u64,
        }
    }
}

/// Compares both tables with what they are made from, in the transaction of `snapshot`.
pub(super) fn differences(snapshot: &Connection) -> rusqlite::Result<WrongStates> {
    const WRONG_COUNTS: &str = r#"
        select "group", count(*)
          from (select "group", state
                  from (select "group", state, devices, expected from group_states
                         union all
                        select "group", state, -count(*), -sum(is_expected <> 0)
                          from device_health
                         group by "group", state)
                 group by "group", state
                having sum(devices) <> 0 or sum(expected) <> 0)
         group by "group"
    "#;
    let wrong_order = format!(
        "select h.device
           from device_health h
           join devices d on d.id = h.device
           left join device_states s on s.device = h.device
          where s.device is null or s.device_id <> d.device_id or s.since <> h.since or s.urgency <> {}
          union all
         select s.device
           from device_states s
           left join device_health h on h.device = s.device
          where h.device is null",
        urgency_of_health()
    );
    let groups = snapshot
        .prepare_cached(WRONG_COUNTS)?
        .query_map([], |row| Ok((row.get(0)?, row.get::<_, i64>(1)?.cast_unsigned())))?
        .collect::<rusqlite::Result<_>>()?;
    let devices = snapshot
        .prepare_cached(&wrong_order)?
        .query_map([], |row| row.get(0))?
        .collect::<rusqlite::Result<_>>()?;
    Ok(WrongStates { groups, devices })
}

/// Makes good what was found. Each step counts again what is there, so that what has changed meanwhile does no harm.
pub(super) async fn make_good(store: &SqliteStore, wrong: WrongStates) -> Result<(), StoreError> {
    for (group, _) in wrong.groups {
        store.writer.call(move |writer| count_group(writer, &group)).await?;
    }
    for devices in wrong.devices.chunks(DEVICES_AT_ONCE) {
        let devices = json!(devices).to_string();
        store.writer.call(move |writer| order_devices(writer, &devices)).await?;
    }
    Ok(())
}

fn begin(writer: &mut WriteConnection) -> rusqlite::Result<Transaction<'_>> {
    writer.connection.transaction_with_behavior(TransactionBehavior::Immediate)
}

fn count_group(writer: &mut WriteConnection, group: &str) -> rusqlite::Result<()> {
    const REMOVE: &str = r#"delete from group_states where "group" = ?1"#;
    const COUNT: &str = r#"
        insert into group_states ("group", state, devices, expected)
        select "group", state, count(*), sum(is_expected <> 0)
          from device_health
         where "group" = ?1
         group by state
    "#;
    let transaction = begin(writer)?;
    transaction.prepare_cached(REMOVE)?.execute([group])?;
    transaction.prepare_cached(COUNT)?.execute([group])?;
    transaction.commit()
}

/// Writes the rows of some devices, whose numbers are a JSON array.
fn order_devices(writer: &mut WriteConnection, devices: &str) -> rusqlite::Result<()> {
    const REMOVE: &str = "
        delete from device_states where device in (select value from json_each(?1))
    ";
    let order = format!(
        "insert into device_states (device, device_id, urgency, since)
         select h.device, d.device_id, {}, h.since
           from json_each(?1) page
           join device_health h on h.device = page.value
           join devices d on d.id = h.device",
        urgency_of_health()
    );
    let transaction = begin(writer)?;
    transaction.prepare_cached(REMOVE)?.execute([devices])?;
    transaction.prepare_cached(&order)?.execute([devices])?;
    transaction.commit()
}
