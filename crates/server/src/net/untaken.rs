//! Answers that HTTP/2 clients do not take. There, an answer waits in memory until its client opens a window for it,
//! and nothing is written meanwhile, so the write clock of `timeouts` sees nothing. Here it is counted what waits, and
//! since when, for `connection` to end those that make no progress.

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

use crate::net::timeouts::UnderWay;

/// Answers that may wait for their clients on all connections. Each holds some 4 KiB besides its text. An answer that is
/// taken at once, as nearly all are, counts for microseconds.
const MAX_UNTAKEN: usize = 8_192;

/// So many of a connection may wait all the same: who asks little does not suffer from those who ask for all.
const ALWAYS: usize = 8;

/// What waits on one connection.
pub(crate) struct Untaken {
    /// On all connections.
    all: Arc<AtomicUsize>,
    own: AtomicUsize,
    started: Instant,
    /// When the client last took some, or the first began to wait; in milliseconds after `started`.
    since: AtomicU64,
}

impl Untaken {
    pub(crate) fn new(all: &Arc<AtomicUsize>) -> Arc<Self> {
        Arc::new(Self {
            all: Arc::clone(all),
            own: AtomicUsize::new(0),
            started: Instant::now(),
            since: AtomicU64::new(0),
        })
    }

    /// Whether one more would be too much.
    pub(crate) fn is_full(&self) -> bool {
        self.own.load(Ordering::Relaxed) >= ALWAYS
            && self.all.load(Ordering::Relaxed) >= MAX_UNTAKEN
    }

    /// Since when the client has taken nothing of what waits; `None` when nothing does.
    pub(crate) fn since(&self) -> Option<Instant> {
        let waits = self.own.load(Ordering::Relaxed) > 0;
        waits.then(|| self.started + Duration::from_millis(self.since.load(Ordering::Relaxed)))
    }

    fn progress(&self) {
        let elapsed = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.since.store(elapsed, Ordering::Relaxed);
    }
}

/// One piece of an answer that waits, for as long as this lives.
struct Waits(Arc<Untaken>);

impl Waits {
    fn begin(untaken: &Arc<Untaken>) -> Self {
        if untaken.own.load(Ordering::Relaxed) == 0 {
            untaken.progress();
        }
        untaken.own.fetch_add(1, Ordering::Relaxed);
        untaken.all.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(untaken))
    }
}

impl Drop for Waits {
    fn drop(&mut self) {
        self.0.progress();
        self.0.own.fetch_sub(1, Ordering::Relaxed);
        self.0.all.fetch_sub(1, Ordering::Relaxed);
    }
}

/// An answer's body on its way to the client.
pub(crate) struct Outgoing {
    body: Body,
    /// The request is under way until the body has come into being.
    _under_way: Option<UnderWay>,
    /// Where it is counted; only in HTTP/2.
    untaken: Option<Arc<Untaken>>,
}

impl Outgoing {
    pub(crate) fn new(
        body: Body,
        under_way: Option<UnderWay>,
        untaken: Option<Arc<Untaken>>,
    ) -> Self {
        Self { body, _under_way: under_way, untaken }
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
            frame.map_data(|bytes| Piece { bytes, waits: self.untaken.as_ref().map(Waits::begin) })
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
