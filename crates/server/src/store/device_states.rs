//! The order of devices by their state: the table `device_states`. A sweep writes it with `device_health`, and a copy makes it
//! anew from there. Lists read it through its indexes. A device that no sweep has evaluated yet has no row.

use pisync_core::health::State;

/// All states, the most urgent first.
const BY_URGENCY: [State; State::ALL.len()] =
    [State::Silent, State::Failing, State::Degraded, State::Never, State::Ok, State::Paused];

/// The place of a state among all: 0 for the most urgent. Words that stand for no state come last.
pub(super) fn urgency(state: &str) -> i64 {
    let place = BY_URGENCY.iter().position(|known| known.as_str() == state);
    i64::try_from(place.unwrap_or(BY_URGENCY.len())).unwrap_or(i64::MAX)
}

/// The same as SQL, of the column `state` of `device_health` `h`.
pub(super) fn urgency_of_health() -> String {
    let known: Vec<_> = BY_URGENCY
        .iter()
        .enumerate()
        .map(|(place, state)| format!("when '{}' then {place}", state.as_str()))
        .collect();
    format!("case h.state {} else {} end", known.join(" "), BY_URGENCY.len())
}

/// What a list by states is sorted by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum StateOrder {
    /// By urgency, then by how long the device has been in the state.
    Urgency,
    /// By the time since which it has been in the state.
    Since,
}

impl StateOrder {
    /// The columns of `device_states`.
    pub(super) fn columns(self) -> &'static [&'static str] {
        match self {
            Self::Urgency => &["urgency", "since"],
            Self::Since => &["since"],
        }
    }
}
