//! The sockets that clients connect to. There are several when the server's host name has several addresses, as
//! `localhost` has 127.0.0.1 and ::1. `serve` accepts connections from them.

use std::{
    io,
    net::SocketAddr,
    sync::atomic::{AtomicUsize, Ordering},
    task::{Context, Poll},
};

use tokio::net::{TcpListener, TcpStream};

/// A set of listening sockets, accepted from in turn.
#[derive(Debug)]
pub struct Listeners {
    sockets: Vec<TcpListener>,
    /// The socket to poll first next time.
    next: AtomicUsize,
}

impl Listeners {
    /// Wraps these sockets. There must be at least one.
    #[must_use]
    pub fn new(sockets: Vec<TcpListener>) -> Self {
        Self { sockets, next: AtomicUsize::new(0) }
    }

    /// The addresses of the sockets.
    ///
    /// # Errors
    /// The error of the system.
    pub fn addresses(&self) -> io::Result<Vec<SocketAddr>> {
        self.sockets.iter().map(TcpListener::local_addr).collect()
    }

    /// Accepts the next connection from any of the sockets.
    pub(crate) async fn accept(&self) -> io::Result<(TcpStream, SocketAddr)> {
        std::future::poll_fn(|context| self.poll_accept(context)).await
    }

    fn poll_accept(&self, context: &mut Context<'_>) -> Poll<io::Result<(TcpStream, SocketAddr)>> {
        // Each socket is polled first in turn. Otherwise one with many clients would starve the others.
        let first = self.next.fetch_add(1, Ordering::Relaxed);
        let (before, behind) = self.sockets.split_at(first % self.sockets.len().max(1));
        for socket in behind.iter().chain(before) {
            if let Poll::Ready(accepted) = socket.poll_accept(context) {
                return Poll::Ready(accepted);
            }
        }
        Poll::Pending
    }
}

impl From<TcpListener> for Listeners {
    fn from(socket: TcpListener) -> Self {
        Self::new(vec![socket])
    }
}

#[cfg(test)]
mod tests {
    use std::{net::Ipv4Addr, time::Duration};

    use super::*;

    #[tokio::test]
    async fn each_socket_gets_its_turn() {
        let bind = async || TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let listeners = Listeners::new(vec![bind().await, bind().await, bind().await]);
        let addresses = listeners.addresses().unwrap();
        // No client connects, so it waits.
        let waited = tokio::time::timeout(Duration::from_millis(1), listeners.accept()).await;
        assert!(waited.is_err());
        // The first two have many clients, and the third one's client does not wait.
        let mut clients = Vec::new();
        for address in addresses.iter().flat_map(|address| [*address; 20]) {
            clients.push(std::net::TcpStream::connect(address).unwrap());
        }
        let mut counts = [0; 3];
        for _ in 0..30 {
            let (stream, _) = listeners.accept().await.unwrap();
            let own = stream.local_addr().unwrap();
            counts[addresses.iter().position(|address| *address == own).unwrap()] += 1;
        }
        assert!(counts.iter().all(|count| *count >= 5), "{counts:?}");
    }
}
