//! How the server speaks HTTP: what `net`, `middleware` and `api` are told. `config::serve` makes it from what was typed, and tests
//! make their own. Nothing here reads a file.

use std::{path::PathBuf, time::Duration};

use axum::http::HeaderValue;
use ipnet::IpNet;

/// How the API is to behave.
#[derive(Debug, Clone)]
pub struct HttpSettings {
    /// Whether to ask for keys.
    pub auth: AuthMode,
    /// How far ahead of the server's clock an event may be dated, in seconds.
    pub max_clock_skew_seconds: u32,
    /// Requests a minute from one address to the endpoints that devices report to; 0 is no limit.
    pub sync_per_minute: u32,
    /// Requests a minute from one address to the rest of the API; 0 is no limit.
    pub api_per_minute: u32,
    /// Requests a minute with one key; 0 is no limit.
    pub key_per_minute: u32,
    /// Connections at a time; 0 is no limit.
    pub max_connections: usize,
    /// Requests being answered at a time; 0 is no limit.
    pub max_requests: usize,
    /// Bytes that large answers may hold, all together, until their clients have taken them. Not for users to set, but
    /// for tests to lower.
    pub answer_bytes: usize,
    /// What to speak TLS with.
    pub tls: Option<TlsFiles>,
    /// Proxies whose word on a client's address is taken.
    pub trusted_proxies: Vec<IpNet>,
    /// Origins whose pages may call the API.
    pub cors_origins: Vec<HeaderValue>,
    /// How long clients may dawdle.
    pub timeouts: Timeouts,
}

/// [`HttpSettings::answer_bytes`]: some sixty of the largest pages of a history, which have 4 MiB.
pub const ANSWER_BYTES: usize = 256 << 20;

/// How long a client may take to send a request, or to take the answer. Not for users to set, but for tests to shorten.
#[derive(Debug, Clone, Copy)]
pub struct Timeouts {
    /// For a request's head to arrive in full, from its first byte on.
    pub head: Duration,
    /// How long a connection may stay open without a request.
    pub idle: Duration,
    /// For a body to arrive in full.
    pub body: Duration,
    /// For the client to take some of an answer that waits to be sent.
    pub write: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        // 64 KiB at the 20 kbit/s of a poor mobile link take 26 s.
        // Proxies in front keep connections to send further requests on: nginx and AWS for 60 s, Traefik for 90.
        // Whoever closes first must be the proxy, or its next request meets a closed connection (a 502).
        Self {
            head: Duration::from_secs(30),
            idle: Duration::from_secs(120),
            body: Duration::from_secs(30),
            write: Duration::from_secs(30),
        }
    }
}

/// Whether the server asks for keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AuthMode {
    /// Of everybody but this machine's own users, when it listens on this machine alone; else of
    /// everybody.
    Auto,
    /// Of nobody.
    Off,
    /// Of everybody.
    Required,
}

/// Where the certificate and its key are.
#[derive(Debug, Clone)]
pub struct TlsFiles {
    /// The certificate and those that vouch for it, PEM.
    pub certificate: PathBuf,
    /// Its private key, PEM.
    pub key: PathBuf,
}
