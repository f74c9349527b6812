//! `pisync serve`: the server itself, from its settings to its orderly end.

use tokio::{
    net::{TcpListener, TcpSocket, lookup_host},
    signal::unix::{SignalKind, signal},
};

use super::EnvFile;
use crate::{app, clock::Clock, config::ServeArgs, logs};

/// Connections that may wait to be taken in: a whole fleet reports at the same second. The kernel
/// bounds it by net.core.somaxconn, 4,096 on Debian.
const BACKLOG: u32 = 4_096;

pub(super) async fn run(arguments: &ServeArgs, env_file: &EnvFile) -> Result<(), String> {
    let settings = arguments.settings().map_err(|error| error.to_string())?;
    let _guard = logs::init(&arguments.log_settings())?;
    for name in &env_file.unknown {
        tracing::warn!(name, "unknown setting in .env; is it misspelt?");
    }
    if !arguments.is_loopback() {
        tracing::warn!(
            "listening beyond this machine without keys: whoever reaches the server can read and write everything"
        );
    }
    let shutdown = shutdown_signal()?;
    let listener = listen(arguments).await?;
    let result = app::run(settings, Clock::system(), listener, shutdown).await;
    match &result {
        Ok(()) => tracing::info!("stopped; everything that was accepted is stored"),
        Err(error) => tracing::error!(%error, "stopped"),
    }
    result.map_err(|error| error.to_string())
}

async fn listen(arguments: &ServeArgs) -> Result<TcpListener, String> {
    let (host, port) = arguments.address();
    let cannot = |error: &dyn std::fmt::Display| {
        format!("cannot listen on {host}:{port}: {error}; set HOST and PORT to others")
    };
    let mut addresses = lookup_host((host, port)).await.map_err(|error| cannot(&error))?;
    let address = addresses.next().ok_or_else(|| cannot(&"no such host"))?;
    let open = || {
        let socket = if address.is_ipv6() { TcpSocket::new_v6()? } else { TcpSocket::new_v4()? };
        // A restart must not wait for the last run's connections to be forgotten.
        socket.set_reuseaddr(true)?;
        socket.bind(address)?;
        socket.listen(BACKLOG)
    };
    open().map_err(|error: std::io::Error| cannot(&error))
}

/// Comes true on SIGTERM or SIGINT (Ctrl-C).
fn shutdown_signal() -> Result<impl Future<Output = ()>, String> {
    let cannot = |error: std::io::Error| format!("cannot listen for signals: {error}");
    let mut terminate = signal(SignalKind::terminate()).map_err(cannot)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(cannot)?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::info!("stopping: finishing what was accepted");
    })
}
