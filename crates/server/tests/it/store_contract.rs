//! What the rest of the program may expect of a store, whichever it is. Everything goes through the
//! trait; where a test looks behind it, or is about one store alone, it says why.

mod channels;
mod deletion;
mod devices;
mod event_ids;
mod faults;
mod figures;
mod fleet_changes;
mod freshness;
mod history;
mod lost_key_changes;
pub(crate) mod nodes;
mod pipelined;
mod received_at;
pub(crate) mod retention;
mod roll_up_tables;
mod roll_ups;
pub(crate) mod streaks;
mod triggers;
