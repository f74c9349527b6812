//! Statistics in PostgreSQL: from totals and summaries, and over roll-ups within a window. The API calls it through
//! `StatsStore`. It changes nothing.

use async_trait::async_trait;
use jiff::tz::TimeZone;
use pisync_core::Timestamp;
use tokio_postgres::{Error, Row, types::ToSql};

use super::{
    aggregated_events,
    connect::Object,
    roll_ups,
    rows::{optional_time, snapshot},
    store::PostgresStore,
    summaries::{self, SummarizedUntil},
};
use crate::store::{
    Count, Device, FailureQuery, Figures, FleetStats, Freshness, Page, StatsStore, StoreError,
    Window,
    device_list::Filter,
    ordered_scan::Places,
    stats::{Failing, page_within_window},
    summaries::correction,
};

#[async_trait]
impl StatsStore for PostgresStore {
    /// Events are acknowledged when they are in the tables, so every read sees everything.
    async fn fleet_stats(
        &self,
        active_since: Timestamp,
        recent: u32,
        _: Freshness,
    ) -> Result<FleetStats, StoreError> {
        self.call(async |connection| fleet_stats(connection, active_since, recent).await).await
    }

    async fn window_figures(&self, window: &Window) -> Result<Figures, StoreError> {
        self.call_long(async |connection| roll_ups::window_figures(connection, window).await).await
    }

    async fn repeated_failures(&self, query: &FailureQuery) -> Result<Page<Device>, StoreError> {
        self.call_long(async |connection| match &query.window {
            None => repeated_failures(connection, query).await,
            Some(window) => failures_within(connection, query, window).await,
        })
        .await
    }
}

async fn repeated_failures(
    connection: &mut Object,
    query: &FailureQuery,
) -> Result<Page<Device>, Error> {
    let (order, measure) = query.of_all_time();
    let threshold = i64::from(query.threshold);
    let filter = Filter::at_least(threshold);
    let snapshot = snapshot(connection).await?;
    let changed = summaries::changed(&snapshot, &Filter::default()).await?;
    let places =
        summaries::summary_places(&snapshot, order, query.part(), &filter, &changed).await?;
    let stored = summaries::number_with(&snapshot, measure, threshold).await?;
    let total = stored + correction(&changed, |summary| summary.number(measure) >= threshold);
    Ok(Page {
        items: summaries::devices_at(&snapshot, &places.places).await?,
        total: Count::Exactly(total.cast_unsigned()),
        next: places.next,
    })
}

async fn fleet_stats(
    connection: &mut Object,
    active_since: Timestamp,
    recent: u32,
) -> Result<FleetStats, Error> {
    let snapshot = snapshot(connection).await?;
    let summarized = SummarizedUntil::read(&snapshot).await?;
    let mut recent_devices = Vec::new();
    if recent > 0 {
        recent_devices = summaries::recent_devices(&snapshot, &summarized, recent).await?;
    }
    let active_since = active_since.as_millisecond();
    Ok(FleetStats {
        total_devices: summaries::number_of_devices(&snapshot, &summarized).await?,
        active_devices: summaries::active_devices(&snapshot, &summarized, active_since).await?,
        figures: roll_ups::totals(&snapshot).await?,
        recent_devices,
    })
}

/// Devices that failed within a window. Their number of failures in it replaces that of all time.
async fn failures_within(
    connection: &mut Object,
    query: &FailureQuery,
    window: &Window,
) -> Result<Page<Device>, Error> {
    const BY_DAY: &str = "
        select device_id, sum(failed_syncs)::bigint as failed_syncs
          from (
              select device_id, failed_syncs
                from device_days
               where day between $6 and $7 and failed_syncs > 0
              union all
              select device_id, 1
                from sync_events
               where created_at > $5 and created_at >= $3
                 and total_errors > 0 and timestamp >= $1 and timestamp < $2
          ) failures
         group by device_id
    ";
    // Uses the index of failed events.
    const BY_EVENT: &str = "
        select device_id, count(*) as failed_syncs
          from sync_events
         where total_errors > 0 and timestamp >= $1 and timestamp < $2 and created_at >= $3
         group by device_id
    ";
    let failing = if window.is_whole_days() { BY_DAY } else { BY_EVENT };
    let (measure, least) = if query.consecutive {
        ("max(j.consecutive_failures)", "1")
    } else {
        ("failing.failed_syncs", "$4::bigint")
    };
    let select = format!(
        "with failing as materialized (
             select * from ({failing}) counted where failed_syncs >= {least}
         )
         select device_id, failing.failed_syncs, max(j.consecutive_failures), max(j.last_failure)
           from failing
           join device_jobs j using (device_id)
          group by device_id, failing.failed_syncs
         having {measure} >= $4::bigint"
    );
    let snapshot = snapshot(connection).await?;
    let watermark = aggregated_events::watermark(&snapshot).await?;
    let (from, until) = (window.from().to_jiff(), window.until().to_jiff());
    let day = |instant: Timestamp| instant.to_jiff().to_zoned(TimeZone::UTC).date();
    let (first, last) = (day(window.from()), day(window.until().saturating_add_milliseconds(-1)));
    let received =
        window.from().saturating_add_milliseconds(-roll_ups::LONGEST_LEAD_MILLISECONDS).to_jiff();
    let threshold = i64::from(query.threshold);
    let mut parameters: Vec<&(dyn ToSql + Sync)> = vec![&from, &until, &received, &threshold];
    if window.is_whole_days() {
        parameters.extend([&watermark as &(dyn ToSql + Sync), &first, &last]);
    }
    let failing = |row: &Row| -> Result<Failing, Error> {
        Ok(Failing {
            device_id: row.try_get(0)?,
            failed_syncs: row.try_get(1)?,
            consecutive_failures: row.try_get(2)?,
            last_failure: optional_time(row, 3)?,
        })
    };
    let rows = snapshot.query(&select, &parameters).await?;
    let failing: Vec<_> = rows.iter().map(failing).collect::<Result<_, _>>()?;
    let Places { places, next } = query.places(&failing);
    let devices = summaries::devices_at(&snapshot, &places).await?;
    Ok(page_within_window(&failing, devices, next))
}
