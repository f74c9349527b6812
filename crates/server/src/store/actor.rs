//! Who changes something, from where and when. The API and the commands make an [`Actor`], and the stores write it into
//! the audit log with every change. It must never hold a key, only the key's number.

use std::net::IpAddr;

use pisync_core::Timestamp;

/// How the actor was admitted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Via {
    /// With a key.
    Key(i64),
    /// Without a key, from the same machine.
    Local,
    /// Without a key, because nobody is asked for one (`AUTH=off`).
    Open,
    /// By the program's own commands.
    CommandLine,
}

impl Via {
    /// The form that is stored and shown.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Key(_) => "key",
            Self::Local => "local",
            Self::Open => "open",
            Self::CommandLine => "command line",
        }
    }

    /// The key, if one was used.
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
    /// How the actor was admitted.
    pub via: Via,
    /// The address from which the actor came.
    pub address: Option<IpAddr>,
    /// When it was done.
    pub at: Timestamp,
}
