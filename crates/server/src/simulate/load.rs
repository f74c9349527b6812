//! What sending cost: answers by status, attempts that had to be repeated, and how long answers took. `sender` counts;
//! the command shows it.

use std::{collections::BTreeMap, time::Duration};

use hdrhistogram::Histogram;
use serde_json::{Value, json};

/// Latencies are told apart to three digits.
const DIGITS: u8 = 3;

/// The longest latency that is told apart, in microseconds: ten minutes.
const LONGEST: u64 = 600_000_000;

/// The percentiles that are told.
const PERCENTILES: [(&str, f64); 5] =
    [("p50", 50.0), ("p90", 90.0), ("p99", 99.0), ("p99.9", 99.9), ("max", 100.0)];

/// The cost of one phase.
#[derive(Debug, Default)]
pub struct Load {
    /// Acknowledged events, those that were sent again on purpose among them.
    pub events: u64,
    /// Requests that were answered in the end.
    pub requests: u64,
    /// Answers by status.
    pub statuses: BTreeMap<u16, u64>,
    /// Requests without an answer: nobody knows what became of them, so they were sent again.
    pub unanswered: u64,
    /// Attempts after the first one.
    pub repeated: u64,
    /// Events that the server called duplicates.
    pub duplicates: u64,
    /// Events that their devices sent once more on purpose.
    pub twice: u64,
    latencies: Option<Histogram<u64>>,
    /// How long the phase took.
    pub took: Duration,
}

impl Load {
    pub(super) fn add_latency(&mut self, latency: Duration) {
        let microseconds = u64::try_from(latency.as_micros()).unwrap_or(u64::MAX);
        if self.latencies.is_none() {
            self.latencies = Histogram::new_with_bounds(1, LONGEST, DIGITS).ok();
        }
        if let Some(latencies) = &mut self.latencies {
            latencies.saturating_record(microseconds);
        }
    }

    pub(super) fn add(&mut self, other: Self) {
        self.events += other.events;
        self.requests += other.requests;
        self.unanswered += other.unanswered;
        self.repeated += other.repeated;
        self.duplicates += other.duplicates;
        self.twice += other.twice;
        for (status, count) in other.statuses {
            *self.statuses.entry(status).or_default() += count;
        }
        match (&mut self.latencies, other.latencies) {
            // Both have the same bounds.
            (Some(latencies), Some(others)) => drop(latencies.add(others)),
            (latencies @ None, others) => *latencies = others,
            (Some(_), None) => {}
        }
    }

    /// Milliseconds at each of [`PERCENTILES`]; `None` when nothing was measured.
    #[must_use]
    #[expect(clippy::cast_precision_loss, reason = "ten minutes have 30 bits")]
    pub fn percentiles(&self) -> Option<[(&'static str, f64); 5]> {
        let latencies = self.latencies.as_ref()?;
        Some(PERCENTILES.map(|(name, percentile)| {
            (name, latencies.value_at_percentile(percentile) as f64 / 1_000.0)
        }))
    }

    /// Events a second.
    #[must_use]
    #[expect(clippy::cast_precision_loss, reason = "a rate for people to read")]
    pub fn rate(&self) -> f64 {
        self.events as f64 / self.took.as_secs_f64().max(0.001)
    }

    /// For programs.
    #[must_use]
    pub fn document(&self) -> Value {
        let latencies = self.percentiles().into_iter().flatten();
        json!({
            "events": self.events,
            "requests": self.requests,
            "duplicates": self.duplicates,
            "sent_twice": self.twice,
            "seconds": self.took.as_secs_f64(),
            "events_per_second": self.rate(),
            "statuses": self.statuses,
            "unanswered": self.unanswered,
            "tried_again": self.repeated,
            "latency_ms": latencies.map(|(name, value)| (name.to_owned(), json!(value))).collect::<serde_json::Map<_, _>>(),
        })
    }
}
