//! Who changes something: goes into the audit log with every change.

use std::net::IpAddr;

use pisync_core::Timestamp;

/// How whoever does something came in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Via {
    /// With a key.
    Key(i64),
    /// Without one, from the same machine.
    Local,
    /// Without one, since nobody is asked (`AUTH=off`).
    Open,
    /// By the program's own commands.
    CommandLine,
}

impl Via {
    /// As it is stored and shown.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Key(_) => "key",
            Self::Local => "local",
            Self::Open => "open",
            Self::CommandLine => "command line",
        }
    }

    /// The key, if there was one.
    #[must_use]
    pub fn key_id(self) -> Option<i64> {
        match self {
            Self::Key(id) => Some(id),
            Self::Local | Self::Open | Self::CommandLine => None,
        }
    }
}

/// Who does something, from where, and when.
#[derive(Debug, Clone, Copy)]
pub struct Actor {
    /// How they came in.
    pub via: Via,
    /// From where.
    pub address: Option<IpAddr>,
    /// When.
    pub at: Timestamp,
}
