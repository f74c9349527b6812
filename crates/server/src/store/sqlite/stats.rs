//! Statistics in SQLite: from totals and summaries, and over roll-ups within a window. The API calls it through
//! `StatsStore`. It changes nothing.

use async_trait::async_trait;
use pisync_core::Timestamp;
use rusqlite::{Connection, named_params};

use super::{connection::Cost, roll_ups, rows::optional_time, store::SqliteStore, summaries};
use crate::store::{
    Count, Device, FailureQuery, Figures, FleetStats, Freshness, Page, StatsStore, StoreError,
    Window,
    device_list::Filter,
    ordered_scan::Places,
    stats::{Failing, page_within_window},
    summaries::correction,
};

#[async_trait]
impl StatsStore for SqliteStore {
    async fn fleet_stats(
        &self,
        active_since: Timestamp,
        recent: u32,
        freshness: Freshness,
    ) -> Result<FleetStats, StoreError> {
        let read = move |connection: &Connection| fleet_stats(connection, active_since, recent);
        self.read_events_as(freshness, Cost::Short, read).await
    }

    async fn window_figures(&self, window: &Window) -> Result<Figures, StoreError> {
        let window = *window;
        self.read_events(Cost::Long, move |connection| {
            roll_ups::window_figures(connection, &window)
        })
        .await
    }

    async fn repeated_failures(&self, query: &FailureQuery) -> Result<Page<Device>, StoreError> {
        let query = query.clone();
        self.read_events(Cost::Long, move |connection| match &query.window {
            None => repeated_failures(connection, &query),
            Some(window) => failures_within(connection, &query, window),
        })
        .await
    }
}

fn repeated_failures(
    connection: &Connection,
    query: &FailureQuery,
) -> rusqlite::Result<Page<Device>> {
    let (order, measure) = query.of_all_time();
    let threshold = i64::from(query.threshold);
    let filter = Filter::at_least(threshold);
    let snapshot = connection.unchecked_transaction()?;
    let changed = summaries::changed(&snapshot, &Filter::default())?;
    let places = summaries::summary_places(&snapshot, order, query.part(), &filter, &changed)?;
    let stored = summaries::number_with(&snapshot, measure, threshold)?;
    let total = stored + correction(&changed, |summary| summary.number(measure) >= threshold);
    Ok(Page {
        items: summaries::devices_at(&snapshot, &places.places)?,
        total: Count::Exactly(total.cast_unsigned()),
        next: places.next,
    })
}

fn fleet_stats(
    connection: &Connection,
    active_since: Timestamp,
    recent: u32,
) -> rusqlite::Result<FleetStats> {
    let snapshot = connection.unchecked_transaction()?;
    let mut recent_devices = Vec::new();
    if recent > 0 {
        recent_devices = summaries::recent_devices(&snapshot, recent)?;
    }
    Ok(FleetStats {
        total_devices: summaries::number_of_devices(&snapshot)?,
        active_devices: summaries::active_devices(&snapshot, active_since.as_millisecond())?,
        figures: roll_ups::totals(&snapshot)?,
        recent_devices,
    })
}

/// Devices that failed within a window. Their number of failures in it replaces that of all time.
fn failures_within(
    connection: &Connection,
    query: &FailureQuery,
    window: &Window,
) -> rusqlite::Result<Page<Device>> {
    const BY_DAY: &str = "
        select device, sum(failed_syncs) as failed_syncs
          from (
              select device, failed_syncs
                from device_days
               where day >= :from and day < :until and failed_syncs > 0
              union all
              select device, 1
                from sync_events
               where id > (select folded_id from roll_up_state)
                 and total_errors > 0 and +timestamp >= :from and +timestamp < :until
          )
         group by device
    ";
    // Uses the index of failed events.
    const BY_EVENT: &str = "
        select device, count(*) as failed_syncs
          from sync_events
         where total_errors > 0 and timestamp >= :from and timestamp < :until
         group by device
    ";
    let failing = if window.is_whole_days() { BY_DAY } else { BY_EVENT };
    let (measure, least) = if query.consecutive {
        ("max(j.consecutive_failures)", "1")
    } else {
        ("failing.failed_syncs", ":threshold")
    };
    let select = format!(
        "with failing as materialized (select * from ({failing}) where failed_syncs >= {least})
         select d.device_id, failing.failed_syncs, max(j.consecutive_failures), max(j.last_failure)
           from failing
           join devices d on d.id = failing.device
           join device_jobs j on j.device = failing.device
          group by failing.device
         having {measure} >= :threshold"
    );
    let (from, until) = (window.from().as_millisecond(), window.until().as_millisecond());
    let snapshot = connection.unchecked_transaction()?;
    let mut select = snapshot.prepare_cached(&select)?;
    let parameters =
        named_params! { ":from": from, ":until": until, ":threshold": query.threshold };
    let failing = select.query_map(parameters, |row| {
        Ok(Failing {
            device_id: row.get(0)?,
            failed_syncs: row.get(1)?,
            consecutive_failures: row.get(2)?,
            last_failure: optional_time(row, 3)?,
        })
    })?;
    let failing: Vec<Failing> = failing.collect::<rusqlite::Result<_>>()?;
    let Places { places, next } = query.places(&failing);
    let devices = summaries::devices_at(&snapshot, &places)?;
    Ok(page_within_window(&failing, devices, next))
}
