//! Counts response data that HTTP/2 clients do not read. Such data waits in memory until the client opens a
//! flow-control window. Nothing is written meanwhile, so the write clock of `timeouts` does not notice. `connection`
//! ends connections whose data makes no progress.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::{Duration, Instant},
};

use axum::body::{Body, Bytes};
use bytes::Buf;
use hyper::body::{Frame, SizeHint};

use crate::net::timeouts::InProgress;

/// The largest number of pieces of responses that may wait for clients on all connections. Each holds some 4 KiB
/// besides its data. Nearly all pieces are read at once and count only for microseconds.
const MAX_UNREAD: usize = 8_192;

/// Each connection may have this many waiting pieces regardless of the total. A modest client must not suffer from a
/// greedy one.
const ALWAYS: usize = 8;

/// The pieces that wait on one connection.
pub(crate) struct Unread {
    /// The count on all connections.
    all: Arc<AtomicUsize>,
    own: AtomicUsize,
    started: Instant,
    /// When the client last read something, or the first piece began to wait. In milliseconds after `started`.
    since: AtomicU64,
}

impl Unread {
    pub(crate) fn new(all: &Arc<AtomicUsize>) -> Arc<Self> {
        Arc::new(Self {
            all: Arc::clone(all),
            own: AtomicUsize::new(0),
            started: Instant::now(),
            since: AtomicU64::new(0),
        })
    }

    /// True if no further piece may wait.
    pub(crate) fn is_full(&self) -> bool {
        self.own.load(Ordering::Relaxed) >= ALWAYS && self.all.load(Ordering::Relaxed) >= MAX_UNREAD
    }

    /// Since when the client has read nothing of what waits; `None` when nothing waits.
    pub(crate) fn since(&self) -> Option<Instant> {
        let waits = self.own.load(Ordering::Relaxed) > 0;
        waits.then(|| self.started + Duration::from_millis(self.since.load(Ordering::Relaxed)))
    }

    fn progress(&self) {
        let elapsed = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.since.store(elapsed, Ordering::Relaxed);
    }
}

/// Counts one waiting piece of a response until it is dropped.
struct Waits(Arc<Unread>);

impl Waits {
    fn begin(unread: &Arc<Unread>) -> Self {
        if unread.own.load(Ordering::Relaxed) == 0 {
            unread.progress();
        }
        unread.own.fetch_add(1, Ordering::Relaxed);
        unread.all.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(unread))
    }
}

impl Drop for Waits {
    fn drop(&mut self) {
        self.0.progress();
        self.0.own.fetch_sub(1, Ordering::Relaxed);
        self.0.all.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The body of a response on its way to the client.
pub(crate) struct Outgoing {
    body: Body,
    /// Keeps the request in flight until the body is complete.
    _under_way: Option<InProgress>,
    /// Counts the waiting pieces; only in HTTP/2.
    unread: Option<Arc<Unread>>,
}

impl Outgoing {
    pub(crate) fn new(
        body: Body,
        in_progress: Option<InProgress>,
        unread: Option<Arc<Unread>>,
    ) -> Self {
        Self { body, _under_way: in_progress, unread }
    }
}

impl hyper::body::Body for Outgoing {
    type Data = Piece;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Piece>, axum::Error>>> {
        let frame = Pin::new(&mut self.body).poll_frame(context);
        frame.map_ok(|frame| {
            frame.map_data(|bytes| Piece { bytes, waits: self.unread.as_ref().map(Waits::begin) })
        })
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// A piece of a body. hyper and h2 keep it until it is written.
pub(crate) struct Piece {
    bytes: Bytes,
    waits: Option<Waits>,
}

impl Buf for Piece {
    fn remaining(&self) -> usize {
        self.bytes.remaining()
    }

    fn chunk(&self) -> &[u8] {
        self.bytes.chunk()
    }

    fn advance(&mut self, count: usize) {
        self.bytes.advance(count);
        if let Some(waits) = &self.waits {
            waits.0.progress();
        }
    }
}
