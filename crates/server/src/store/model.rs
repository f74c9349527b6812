//! Types that several resources use: figures, devices, and pages of a list. The stores fill them and the rest of the
//! program shows them. Nothing here may depend on one store.

use std::time::Duration;

use pisync_core::Timestamp;

use super::Place;

/// How much of what is acknowledged a read must see. A method of a trait takes it as soon as one of its callers may lag.
/// All other methods see everything.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Freshness {
    /// The read sees every event that was acknowledged before it began, and waits for this if necessary. The API needs
    /// it, because a device that has its answer must find its event.
    Everything,
    /// The read never waits for ingest. It may miss events that were acknowledged up to [`Freshness::LARGEST_LAG`] ago.
    /// What people watch needs no more than this. While nothing can be written to the database, because its disk is full
    /// or another process writes, the read misses events for longer. All that it sees is as of one moment.
    Lagging,
}

impl Freshness {
    /// How long an acknowledged event may be missing from a [`Freshness::Lagging`] read.
    pub const LARGEST_LAG: Duration = Duration::from_secs(2);
}

/// The figures of a device or of the fleet.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Figures {
    /// Syncs reported.
    pub total_syncs: i64,
    /// Syncs with errors.
    pub failed_syncs: i64,
    /// Sum of files.
    pub total_files_synced: i64,
    /// Sum of errors.
    pub total_errors: i64,
    /// Sum of the measured speeds, in hundredths of Mbps.
    pub speed_sum: i64,
    /// How many syncs measured their speed.
    pub speed_count: i64,
    /// Earliest sync by its own date.
    pub first_sync: Option<Timestamp>,
    /// Latest sync by its own date.
    pub last_sync: Option<Timestamp>,
    /// Latest sync without errors.
    pub last_success: Option<Timestamp>,
    /// Latest sync with errors.
    pub last_failure: Option<Timestamp>,
    /// The worst streak among the jobs.
    pub consecutive_failures: i64,
    /// When the server last received an event.
    pub last_seen: Option<Timestamp>,
}

impl Figures {
    /// Syncs without errors.
    #[must_use]
    pub fn successful_syncs(&self) -> i64 {
        self.total_syncs - self.failed_syncs
    }

    /// The fraction of syncs without errors, 0 to 1, not rounded; `None` before the first sync.
    #[must_use]
    #[expect(clippy::cast_precision_loss, reason = "a ratio for people to read")]
    pub fn success_ratio(&self) -> Option<f64> {
        (self.total_syncs > 0).then(|| self.successful_syncs() as f64 / self.total_syncs as f64)
    }

    /// Mean of the measured speeds in Mbps, rounded to 2 decimals. `None` when none was measured. It is 0 only when all
    /// were 0.
    #[must_use]
    #[expect(clippy::cast_precision_loss, reason = "rounded to hundredths of a mean")]
    pub fn avg_internet_speed(&self) -> Option<f64> {
        (self.speed_count > 0).then(|| {
            let hundredths = (self.speed_sum as f64 / self.speed_count as f64).round();
            // A slow line is not the same as a line that carries nothing.
            if self.speed_sum > 0 { hundredths.max(1.0) / 100.0 } else { hundredths / 100.0 }
        })
    }
}

/// A device and its figures over all jobs.
#[derive(Debug, Clone)]
pub struct Device {
    /// The id that the device calls itself by.
    pub device_id: String,
    /// The name that people gave it.
    pub name: Option<String>,
    /// The group that people put it in.
    pub group: Option<String>,
    /// When it was first seen.
    pub created_at: Timestamp,
    /// Its figures; zeros and `None` until it has reported.
    pub figures: Figures,
}

/// A device with the figures of each of its jobs.
#[derive(Debug)]
pub struct DeviceWithJobs {
    /// The device and its sums.
    pub device: Device,
    /// Each job's name (`None` for events that name no job) and figures, by name.
    pub jobs: Vec<(Option<String>, Figures)>,
}

/// One page of a longer list.
#[derive(Debug)]
pub struct Page<T> {
    /// What is on the page.
    pub items: Vec<T>,
    /// How many there are on all pages.
    pub total: Count,
    /// The place of the last item, when more follow.
    pub next: Option<Place>,
}

/// How many there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Count {
    /// So many.
    Exactly(u64),
    /// At least so many. Counting the rest would take too long.
    AtLeast(u64),
}

impl Count {
    /// The count, when `counted` ended after `most`.
    #[must_use]
    pub fn up_to(most: u32, counted: u64) -> Self {
        let most = u64::from(most);
        if counted > most { Self::AtLeast(most) } else { Self::Exactly(counted) }
    }

    /// The number, when it is known.
    #[must_use]
    pub fn exact(self) -> Option<u64> {
        match self {
            Self::Exactly(count) => Some(count),
            Self::AtLeast(_) => None,
        }
    }
}

/// The state of the connections for reading.
#[derive(Debug, Clone, Copy)]
pub struct PoolUsage {
    /// The most there can be.
    pub max: usize,
    /// In use right now.
    pub in_use: usize,
    /// Requests that wait for one.
    pub waiting: usize,
}
