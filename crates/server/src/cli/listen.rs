//! The addresses that a server listens on. `serve` listens, and `doctor` tries whether a server could.

use std::{fmt::Display, io::ErrorKind, net::SocketAddr};

use tokio::net::{TcpListener, TcpSocket, lookup_host};

use crate::{config::ListenArgs, net::Listeners};

/// Connections that may wait to be taken in: a whole fleet reports at the same second. The kernel
/// bounds it by net.core.somaxconn, 4,096 on Debian.
const BACKLOG: u32 = 4_096;

/// How often to look for a port that is free for every address, where `PORT=0` lets the system choose.
const FREE_PORT_ATTEMPTS: usize = 20;

/// The addresses that the host name stands for.
///
/// # Errors
/// When it stands for none that can be found.
pub(super) async fn addresses(arguments: &ListenArgs) -> Result<Vec<SocketAddr>, String> {
    let found = lookup_host(arguments.address()).await;
    let mut addresses: Vec<SocketAddr> =
        found.map_err(|error| cannot(arguments, &error))?.collect();
    // IPv4's first: the log names that one, and most people know it better.
    addresses.sort_by_key(|address| (address.is_ipv6(), *address));
    addresses.dedup();
    Ok(addresses)
}

fn cannot(arguments: &ListenArgs, error: &dyn Display) -> String {
    let (host, port) = arguments.address();
    format!("cannot listen on {host}:{port}: {error}; set HOST and PORT to others")
}

/// Listens on every address that the host name stands for, at one port.
///
/// # Errors
/// When that is not possible; the message says what to do.
pub(super) async fn listen(arguments: &ListenArgs) -> Result<Listeners, String> {
    let (_, port) = arguments.address();
    let cannot = |error: &dyn Display| cannot(arguments, error);
    let addresses = addresses(arguments).await?;
    for _ in 0..FREE_PORT_ATTEMPTS {
        match bind_all(&addresses) {
            Ok(sockets) if sockets.is_empty() => return Err(cannot(&"no such host")),
            Ok(sockets) => return Ok(Listeners::new(sockets)),
            // The port that is free for one address is taken for another.
            Err(error) if port == 0 && error.kind() == ErrorKind::AddrInUse => {}
            Err(error) => return Err(cannot(&error)),
        }
    }
    Err(cannot(&"no port is free for all of its addresses"))
}

/// A socket for each address. Addresses of a kind that this machine does not have are skipped, unless there is no
/// other.
fn bind_all(addresses: &[SocketAddr]) -> std::io::Result<Vec<TcpListener>> {
    let mut sockets: Vec<TcpListener> = Vec::new();
    let mut missing = None;
    for address in addresses {
        let mut address = *address;
        if let Some(first) = sockets.first() {
            address.set_port(first.local_addr()?.port());
        }
        match bind(address) {
            Ok(socket) => sockets.push(socket),
            Err(error) if is_missing(&error) => missing = Some((address, error)),
            Err(error) => return Err(error),
        }
    }
    match missing {
        Some((_, error)) if sockets.is_empty() => Err(error),
        Some((address, error)) => {
            tracing::info!(%error, "not listening on {address}, which this machine does not have");
            Ok(sockets)
        }
        None => Ok(sockets),
    }
}

/// Whether a machine has no such address, for instance none of IPv6 at all.
fn is_missing(error: &std::io::Error) -> bool {
    error.kind() == ErrorKind::AddrNotAvailable || error.raw_os_error() == Some(libc::EAFNOSUPPORT)
}

fn bind(address: SocketAddr) -> std::io::Result<TcpListener> {
    let socket = if address.is_ipv6() { TcpSocket::new_v6()? } else { TcpSocket::new_v4()? };
    // A restart must not wait for the last run's connections to be forgotten.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ports(sockets: &[TcpListener]) -> Vec<u16> {
        sockets.iter().map(|socket| socket.local_addr().unwrap().port()).collect()
    }

    #[tokio::test]
    async fn one_port_at_every_address() {
        let all = ["127.0.0.1:0", "127.0.0.2:0", "127.0.0.3:0"].map(|text| text.parse().unwrap());
        let sockets = bind_all(&all).unwrap();
        let found = ports(&sockets);
        assert!(found.len() == 3 && found.iter().all(|port| *port == found[0] && *port > 0));
        // A port that is taken is no address that is missing.
        let taken =
            [SocketAddr::from(([127, 0, 0, 4], found[0])), sockets[1].local_addr().unwrap()];
        assert_eq!(bind_all(&taken).unwrap_err().kind(), ErrorKind::AddrInUse);
    }

    #[tokio::test]
    async fn addresses_that_the_machine_does_not_have_are_skipped() {
        // Reserved for documentation, and IPv6's own machine, which not every machine has.
        let [v4, v6, missing] =
            ["127.0.0.1:0", "[::1]:0", "192.0.2.1:0"].map(|text| text.parse().unwrap());
        assert_eq!(bind_all(&[v4, missing]).unwrap().len(), 1);
        assert_eq!(bind_all(&[missing, v4]).unwrap().len(), 1);
        assert!(is_missing(&bind_all(&[missing]).unwrap_err()));
        let has_v6 = std::net::TcpListener::bind(v6).is_ok();
        let found = ports(&bind_all(&[v4, v6]).unwrap());
        assert_eq!(found.len(), if has_v6 { 2 } else { 1 });
        assert_eq!(found.first(), found.last());
    }
}
