//! The tables in PostgreSQL that follow from `device_health` alone: `group_states` counts its rows, and `device_states` has their
//! order. Sweeps and deletions write them in the same transaction. `pisync verify` and `maintenance` compare them here, and make
//! good what foreign SQL or a mistake has made wrong.

use deadpool_postgres::{GenericClient, Transaction};
use tokio_postgres::Error;

use super::{connect::Object, locks::SWEEP_LOCK};
use crate::store::{StateDifferences, device_states::urgency_of_health};

/// How many rows of `device_states` are made good in one transaction.
const DEVICES_AT_ONCE: usize = 500;

/// When a device `h` came into its state, as `device_states` has it.
const SINCE: &str = "floor(extract(epoch from h.since) * 1000)::bigint";

/// What differs.
#[derive(Debug, Default)]
pub(super) struct WrongStates {
    /// Groups with wrong rows, and how many each has.
    groups: Vec<(String, u64)>,
    /// Devices whose row is missing, wrong, or too much.
    devices: Vec<String>,
}

impl WrongStates {
    pub(super) fn number(&self) -> StateDifferences {
        StateDifferences {
            group_states: self.groups.iter().map(|(_, rows)| rows).sum(),
            device_states: self.devices.len() as u64,
        }
    }
}

/// Compares both tables with what they are made from, in one snapshot.
pub(super) async fn differences(snapshot: &impl GenericClient) -> Result<WrongStates, Error> {
    const WRONG_COUNTS: &str = r#"
        select "group", count(*)
          from (select "group", state
                  from (select "group", state, devices, expected from group_states
                         union all
                        select "group", state, -count(*), -count(*) filter (where is_expected)
                          from device_health
                         group by "group", state) both_sides
                 group by "group", state
                having sum(devices) <> 0 or sum(expected) <> 0) wrong
         group by "group"
    "#;
    let wrong_order = format!(
        "select h.device_id
           from device_health h
           left join device_states s using (device_id)
          where s.device_id is null or s.since <> {SINCE} or s.urgency <> {}
          union all
         select s.device_id
           from device_states s
           left join device_health h using (device_id)
          where h.device_id is null",
        urgency_of_health()
    );
    let mut wrong = WrongStates::default();
    for row in snapshot.query(WRONG_COUNTS, &[]).await? {
        wrong.groups.push((row.try_get(0)?, row.try_get::<_, i64>(1)?.cast_unsigned()));
    }
    for row in snapshot.query(&wrong_order, &[]).await? {
        wrong.devices.push(row.try_get(0)?);
    }
    Ok(wrong)
}

/// Makes good what was found. Each step counts again what is there, so that what has changed meanwhile does no harm.
pub(super) async fn make_good(connection: &mut Object, wrong: &WrongStates) -> Result<(), Error> {
    for (group, _) in &wrong.groups {
        count_group(connection, group).await?;
    }
    for devices in wrong.devices.chunks(DEVICES_AT_ONCE) {
        order_devices(connection, devices).await?;
    }
    Ok(())
}

/// Begins a step, after the step of a sweep that is at work. Sweeps sit out meanwhile.
async fn begin(connection: &mut Object) -> Result<Transaction<'_>, Error> {
    const TIMEOUT: &str = "set local idle_in_transaction_session_timeout = '10s'";
    const LOCK: &str = "select pg_advisory_xact_lock($1)";
    let transaction = connection.transaction().await?;
    transaction.batch_execute(TIMEOUT).await?;
    transaction.execute(LOCK, &[&SWEEP_LOCK]).await?;
    Ok(transaction)
}

async fn count_group(connection: &mut Object, group: &str) -> Result<(), Error> {
    // A deletion changes states without the lock of sweeps. It has either written both tables and ended, and is counted, or
    // waits, and then changes what is counted here.
    const LOCK: &str = "lock table group_states in share row exclusive mode";
    const REMOVE: &str = r#"delete from group_states where "group" = $1"#;
    const COUNT: &str = r#"
        insert into group_states ("group", state, devices, expected)
        select "group", state, count(*), count(*) filter (where is_expected)
          from device_health
         where "group" = $1
         group by "group", state
    "#;
    let transaction = begin(connection).await?;
    transaction.batch_execute(LOCK).await?;
    transaction.execute(REMOVE, &[&group]).await?;
    transaction.execute(COUNT, &[&group]).await?;
    transaction.commit().await
}

async fn order_devices(connection: &mut Object, devices: &[String]) -> Result<(), Error> {
    // What a deletion has removed is seen by the statements that follow.
    const LOCK: &str = r#"
        select device_id from devices where device_id = any($1) order by device_id for key share
    "#;
    const REMOVE: &str = "delete from device_states where device_id = any($1)";
    let order = format!(
        "insert into device_states (device_id, urgency, since)
         select h.device_id, {}, {SINCE} from device_health h where h.device_id = any($1)",
        urgency_of_health()
    );
    let transaction = begin(connection).await?;
    transaction.query(LOCK, &[&devices]).await?;
    transaction.execute(REMOVE, &[&devices]).await?;
    transaction.execute(&order, &[&devices]).await?;
    transaction.commit().await
}
