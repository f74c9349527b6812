//! The sockets that clients connect to: one, or several when the server's host name stands for several
//! addresses, as `localhost` does for 127.0.0.1 and ::1.

use std::{
    io,
    net::SocketAddr,
    sync::atomic::{AtomicUsize, Ordering},
    task::{Context, Poll},
};

use tokio::net::{TcpListener, TcpStream};

/// See the module.
#[derive(Debug)]
pub struct Listeners {
    sockets: Vec<TcpListener>,
    /// Where to look first the next time.
    next: AtomicUsize,
}

impl Listeners {
    /// Of these sockets, of which there must be one at least.
    #[must_use]
    pub fn new(sockets: Vec<TcpListener>) -> Self {
        Self { sockets, next: AtomicUsize::new(0) }
    }

    /// Where they listen.
    ///
    /// # Errors
    /// What the system says instead.
    pub fn addresses(&self) -> io::Result<Vec<SocketAddr>> {
        self.sockets.iter().map(TcpListener::local_addr).collect()
    }

    /// The next connection, whichever socket it comes to.
    pub(crate) async fn accept(&self) -> io::Result<(TcpStream, SocketAddr)> {
        std::future::poll_fn(|context| self.poll_accept(context)).await
    }

    fn poll_accept(&self, context: &mut Context<'_>) -> Poll<io::Result<(TcpStream, SocketAddr)>> {
        // Each is the first in turn, or one with many clients would keep the others' waiting.
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
        // Nobody comes: it waits.
        let waited = tokio::time::timeout(Duration::from_millis(1), listeners.accept()).await;
        assert!(waited.is_err());
        // The first two are crowded, and the third is not kept waiting.
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
