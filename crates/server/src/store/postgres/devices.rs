//! Devices in PostgreSQL: how they are listed and looked up. The API calls it through `DeviceStore`. Deleting
//! one is in `deletion`. Statements are prepared once per connection.

use async_trait::async_trait;
use pisync_core::{DeviceId, GroupName};
use tokio_postgres::{Error, Row};

use super::{
    connect::Object,
    rows::{device_row, job_sums, jobs, snapshot},
    store::PostgresStore,
    summaries::{self, SummarizedUntil},
};
use crate::store::{
    Count, Device, DeviceQuery, DeviceStore, DeviceWithJobs, Page, StoreError,
    device_list::{COUNTED, Filter, Order},
    devices::DEVICE_IDS,
    figure_columns::DEVICE_COLUMNS,
    ordered_scan::Part,
};

#[async_trait]
impl DeviceStore for PostgresStore {
    async fn devices(&self, query: &DeviceQuery) -> Result<Page<Device>, StoreError> {
        self.call(async |connection| devices(connection, query).await).await
    }

    async fn device(&self, device_id: &DeviceId) -> Result<Option<DeviceWithJobs>, StoreError> {
        self.call(async |connection| device(connection, device_id).await).await
    }

    async fn device_ids(
        &self,
        group: Option<&GroupName>,
        after: Option<&str>,
    ) -> Result<Vec<DeviceId>, StoreError> {
        self.call(async |connection| device_ids(connection, group, after).await).await
    }
}

async fn devices(connection: &mut Object, query: &DeviceQuery) -> Result<Page<Device>, Error> {
    let filter = Filter::of(query);
    let snapshot = snapshot(connection).await?;
    let order = Order::of(query.sort);
    let places = summaries::places(&snapshot, order, Part::of(query), &filter).await?;
    let total = if filter.is_none() {
        let summarized = SummarizedUntil::read(&snapshot).await?;
        Count::Exactly(summaries::number_of_devices(&snapshot, &summarized).await?)
    } else {
        Count::up_to(COUNTED, summaries::count(&snapshot, &filter, COUNTED).await?)
    };
    let items = summaries::devices_at(&snapshot, &places.places).await?;
    Ok(Page { items, total, next: places.next })
}

async fn device(
    connection: &mut Object,
    device_id: &DeviceId,
) -> Result<Option<DeviceWithJobs>, Error> {
    let sums = job_sums();
    let select = format!(
        "select {DEVICE_COLUMNS}, {sums}
           from devices d
           left join device_jobs j using (device_id)
          where d.device_id = $1
          group by d.device_id"
    );
    let snapshot = snapshot(connection).await?;
    let select = snapshot.prepare_cached(&select).await?;
    let Some(row) = snapshot.query_opt(&select, &[&device_id.as_str()]).await? else {
        return Ok(None);
    };
    Ok(Some(DeviceWithJobs {
        device: device_row(&row)?,
        jobs: jobs(&snapshot, device_id.as_str()).await?,
    }))
}

/// One page of devices' ids, in byte-wise order.
async fn device_ids(
    connection: &Object,
    group: Option<&GroupName>,
    after: Option<&str>,
) -> Result<Vec<DeviceId>, Error> {
    const DEVICE_IDS_AFTER: &str = r#"
        select device_id
          from devices
         where device_id > coalesce($1, '') and ($2::text is null or "group" = $2)
         order by device_id
         limit $3
    "#;
    let select = connection.prepare_cached(DEVICE_IDS_AFTER).await?;
    let rows = connection
        .query(&select, &[&after, &group.map(GroupName::as_str), &i64::from(DEVICE_IDS)])
        .await?;
    // Foreign SQL may have written a device id that nobody can request. Such a device has no history either.
    let device_id = |row: &Row| Ok(DeviceId::new(row.try_get(0)?).ok());
    rows.iter().filter_map(|row| device_id(row).transpose()).collect()
}
