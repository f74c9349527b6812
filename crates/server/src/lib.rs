//! PiSync.
pub mod clock;
pub mod store;
