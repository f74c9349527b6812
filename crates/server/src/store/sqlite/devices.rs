//! Devices in SQLite: how they are listed and looked up. The API calls it through `DeviceStore`. Each query
//! runs on one connection for reading, in one read transaction where it needs several statements. Deleting a device is
//! in `deletion`.

use async_trait::async_trait;
use pisync_core::{DeviceId, GroupName};
use rusqlite::{Connection, OptionalExtension, named_params};

use super::{
    connection::Cost,
    rows::{device_number, device_row, job_sums, jobs},
    store::SqliteStore,
    summaries,
};
use crate::store::{
    Count, Device, DeviceQuery, DeviceStore, DeviceWithJobs, Page, StoreError,
    device_list::{COUNTED, Filter, Order},
    devices::DEVICE_IDS,
    figure_columns::DEVICE_COLUMNS,
    ordered_scan::Part,
};

#[async_trait]
impl DeviceStore for SqliteStore {
    async fn devices(&self, query: &DeviceQuery) -> Result<Page<Device>, StoreError> {
        let query = query.clone();
        self.read_events(Cost::Short, move |connection| devices(connection, &query)).await
    }

    async fn device(&self, device_id: &DeviceId) -> Result<Option<DeviceWithJobs>, StoreError> {
        let device_id = device_id.clone();
        self.read_events(Cost::Short, move |connection| device(connection, &device_id)).await
    }

    async fn device_ids(
        &self,
        group: Option<&GroupName>,
        after: Option<&str>,
    ) -> Result<Vec<DeviceId>, StoreError> {
        let (group, after) = (group.cloned(), after.map(str::to_owned));
        self.read_events(Cost::Short, move |connection| {
            device_ids(connection, group.as_ref(), after.as_deref())
        })
        .await
    }
}

fn devices(connection: &Connection, query: &DeviceQuery) -> rusqlite::Result<Page<Device>> {
    let filter = Filter::of(query);
    let snapshot = connection.unchecked_transaction()?;
    let places = summaries::places(&snapshot, Order::of(query.sort), Part::of(query), &filter)?;
    let total = if filter.is_none() {
        Count::Exactly(summaries::number_of_devices(&snapshot)?)
    } else {
        Count::up_to(COUNTED, summaries::count(&snapshot, &filter, COUNTED)?)
    };
    let items = summaries::devices_at(&snapshot, &places.places)?;
    Ok(Page { items, total, next: places.next })
}

fn device(
    connection: &Connection,
    device_id: &DeviceId,
) -> rusqlite::Result<Option<DeviceWithJobs>> {
    let sums = job_sums();
    let select = format!(
        "select {DEVICE_COLUMNS}, {sums}
           from devices d
           left join device_jobs j on j.device = d.id
          where d.device_id = ?1
          group by d.id"
    );
    let snapshot = connection.unchecked_transaction()?;
    let device =
        snapshot.prepare_cached(&select)?.query_row([device_id.as_str()], device_row).optional()?;
    let (Some(device), Some(number)) = (device, device_number(&snapshot, device_id)?) else {
        return Ok(None);
    };
    Ok(Some(DeviceWithJobs { device, jobs: jobs(&snapshot, number)? }))
}

/// One page of devices' ids, in byte-wise order.
fn device_ids(
    connection: &Connection,
    group: Option<&GroupName>,
    after: Option<&str>,
) -> rusqlite::Result<Vec<DeviceId>> {
    const DEVICE_IDS_AFTER: &str = r#"
        select device_id
          from devices
         where device_id > ifnull(:after, '') and (:group is null or "group" = :group)
         order by device_id
         limit :limit
    "#;
    let mut select = connection.prepare_cached(DEVICE_IDS_AFTER)?;
    let parameters = named_params! { ":after": after, ":group": group.map(GroupName::as_str), ":limit": DEVICE_IDS };
    let rows = select.query_map(parameters, |row| row.get::<_, String>(0))?;
    // Foreign SQL may have written a device id that nobody can request. Such a device has no history either.
    rows.filter_map(|id| id.map(|id| DeviceId::new(&id).ok()).transpose()).collect()
}
