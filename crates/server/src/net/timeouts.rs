//! The clocks that end a stalled connection. `connection` wraps its streams in them. They do not limit the time of
//! bodies: handlers do.
//!
//! There are three separate clocks. The *idle* clock runs while no request is in flight and none has begun. The *head*
//! clock starts with the first byte of a request's head. It must be shorter, because an incomplete head holds memory.
//! The *write* clock runs while data waits to be sent and the client reads nothing.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::Sleep,
};

use super::http2_frames::Frames;

/// How many bytes the incomplete heads of all connections may hold, not counting heads up to [`SMALL_HEAD`]. A head
/// usually arrives in one piece and is never counted. Thousands that trickle in are an attack.
const INCOMPLETE_HEADS_BYTES: usize = 16 << 20;

/// Heads up to this size are not counted. An ordinary client on a bad link must succeed even during an attack. They fit
/// the 8 KiB that hyper's first read allocates for every connection anyway.
const SMALL_HEAD: usize = 4 << 10;

/// A smaller write is not counted as part of a response. HTTP/2 replies to pings are that small, and they must not
/// restart the idle clock.
const PROGRESS_BYTES: usize = 1 << 10;

/// The activity on one connection, for the idle clock.
pub(crate) struct Activity {
    started: Instant,
    /// Requests whose response is not complete.
    in_progress: AtomicUsize,
    /// The number of complete heads since the connection began.
    begun: AtomicUsize,
    /// When the last response was complete, or the client last read some of one. In milliseconds after `started`.
    quiet_since: AtomicU64,
    /// True while the head clock runs instead of the idle clock.
    reads_head: AtomicBool,
}

impl Activity {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self {
            started: Instant::now(),
            in_progress: AtomicUsize::new(0),
            begun: AtomicUsize::new(0),
            quiet_since: AtomicU64::new(0),
            reads_head: AtomicBool::new(false),
        })
    }

    fn touch(&self) {
        let elapsed = self.started.elapsed().as_millis();
        self.quiet_since.store(u64::try_from(elapsed).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// The start of the current idle time. `None` while a request is in flight or its head is arriving.
    pub(crate) fn idle_since(&self) -> Option<Instant> {
        if self.in_progress.load(Ordering::Relaxed) > 0 || self.reads_head.load(Ordering::Relaxed) {
            return None;
        }
        Some(self.started + Duration::from_millis(self.quiet_since.load(Ordering::Relaxed)))
    }
}

/// Marks a request as in flight until it is dropped.
pub(crate) struct InProgress(Arc<Activity>);

impl InProgress {
    pub(crate) fn begin(activity: Arc<Activity>) -> Self {
        activity.in_progress.fetch_add(1, Ordering::Relaxed);
        activity.begun.fetch_add(1, Ordering::Relaxed);
        activity.reads_head.store(false, Ordering::Relaxed);
        Self(activity)
    }
}

impl Drop for InProgress {
    fn drop(&mut self) {
        self.0.touch();
        self.0.in_progress.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The memory held by the incomplete heads of all connections.
#[derive(Default)]
pub(crate) struct IncompleteHeads {
    bytes: AtomicUsize,
}

/// One connection's part of [`IncompleteHeads`].
struct HeldHead {
    all: Arc<IncompleteHeads>,
    bytes: usize,
}

impl HeldHead {
    /// Replaces the counted size with `bytes`. Returns false when the total is then too large.
    fn set(&mut self, bytes: usize) -> bool {
        let bytes = if bytes <= SMALL_HEAD { 0 } else { bytes };
        if bytes == self.bytes {
            return true;
        }
        let grows = bytes > self.bytes;
        let before = self.all.bytes.fetch_add(bytes, Ordering::Relaxed);
        self.all.bytes.fetch_sub(self.bytes, Ordering::Relaxed);
        self.bytes = bytes;
        !grows || before + bytes <= INCOMPLETE_HEADS_BYTES
    }
}

impl Drop for HeldHead {
    fn drop(&mut self) {
        self.all.bytes.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// Finds heads in the received bytes.
enum Heads {
    /// HTTP/1: bytes that arrive while no request is in flight belong to a head.
    Http1 {
        /// The number of requests begun when the first byte of the head arrived.
        after: Option<usize>,
        bytes: usize,
    },
    Http2(Frames),
}

/// A stream of requests that limits the time and the memory of their heads.
pub(crate) struct HeadClock<S> {
    stream: S,
    activity: Arc<Activity>,
    limit: Duration,
    heads: Heads,
    held: HeldHead,
    /// The number of the incomplete head, and its timer.
    running: Option<(usize, Pin<Box<Sleep>>)>,
}

impl<S> HeadClock<S> {
    pub(crate) fn http1(
        stream: S,
        activity: &Arc<Activity>,
        limit: Duration,
        all: &Arc<IncompleteHeads>,
    ) -> Self {
        Self::new(stream, activity, limit, all, Heads::Http1 { after: None, bytes: 0 })
    }

    pub(crate) fn http2(
        stream: S,
        activity: &Arc<Activity>,
        limit: Duration,
        all: &Arc<IncompleteHeads>,
    ) -> Self {
        Self::new(stream, activity, limit, all, Heads::Http2(Frames::default()))
    }

    fn new(
        stream: S,
        activity: &Arc<Activity>,
        limit: Duration,
        all: &Arc<IncompleteHeads>,
        heads: Heads,
    ) -> Self {
        let held = HeldHead { all: Arc::clone(all), bytes: 0 };
        Self { stream, activity: Arc::clone(activity), limit, heads, held, running: None }
    }

    fn arrived(&mut self, bytes: &[u8]) {
        match &mut self.heads {
            Heads::Http2(frames) => frames.take(bytes),
            Heads::Http1 { after, .. } if self.activity.in_progress.load(Ordering::Relaxed) > 0 => {
                // A body, or a head sent before the response. The clock of such a head starts with its next byte.
                *after = None;
            }
            Heads::Http1 { after, bytes: so_far } => {
                let begun = self.activity.begun.load(Ordering::Relaxed);
                if after.replace(begun) != Some(begun) {
                    *so_far = 0;
                }
                *so_far += bytes.len();
            }
        }
    }

    /// The number of the incomplete head, unique on this connection, and its bytes so far.
    fn incomplete(&self) -> Option<(usize, usize)> {
        match &self.heads {
            Heads::Http2(frames) => {
                frames.is_incomplete().then_some((frames.complete, frames.bytes))
            }
            Heads::Http1 { after, bytes } => after
                .filter(|after| {
                    *after == self.activity.begun.load(Ordering::Relaxed)
                        && self.activity.in_progress.load(Ordering::Relaxed) == 0
                })
                .map(|after| (after, *bytes)),
        }
    }

    /// Called when nothing more has arrived for now. Fails if a head has taken too long or holds too much memory.
    fn wait(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let Some((number, bytes)) = self.incomplete() else {
            self.running = None;
            self.held.set(0);
            return Poll::Pending;
        };
        if !self.held.set(bytes) {
            return Poll::Ready(Err(io::Error::other(
                "the heads of requests hold too much memory",
            )));
        }
        // In HTTP/2 the idle clock keeps running, so that frames without requests cannot hold a connection for ever.
        let is_http1 = matches!(self.heads, Heads::Http1 { .. });
        self.activity.reads_head.store(is_http1, Ordering::Relaxed);
        let limit = self.limit;
        let running = self.running.take().filter(|(of, _)| *of == number);
        let (_, sleep) = self
            .running
            .insert(running.unwrap_or_else(|| (number, Box::pin(tokio::time::sleep(limit)))));
        ready!(sleep.as_mut().poll(context));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for HeadClock<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        match Pin::new(&mut self.stream).poll_read(context, buffer) {
            Poll::Pending => self.wait(context),
            Poll::Ready(result) => {
                self.arrived(&buffer.filled()[before..]);
                Poll::Ready(result)
            }
        }
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for HeadClock<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

/// A stream that limits how long the client may read nothing of what is written. Any progress restarts the limit,
/// because a slow link is not an attack.
pub(crate) struct WriteClock<S> {
    stream: S,
    activity: Arc<Activity>,
    limit: Duration,
    /// Runs while the client reads nothing.
    stalled: Option<Pin<Box<Sleep>>>,
}

impl<S> WriteClock<S> {
    pub(crate) fn new(stream: S, activity: &Arc<Activity>, limit: Duration) -> Self {
        Self { stream, activity: Arc::clone(activity), limit, stalled: None }
    }

    /// Handles the result of an attempt to write.
    fn written(
        &mut self,
        context: &mut Context<'_>,
        result: Poll<io::Result<usize>>,
    ) -> Poll<io::Result<usize>> {
        if let Poll::Ready(written) = &result {
            self.stalled = None;
            if written.as_ref().is_ok_and(|bytes| *bytes >= PROGRESS_BYTES) {
                self.activity.touch();
            }
            return result;
        }
        let stalled = self.stalled.get_or_insert_with(|| Box::pin(tokio::time::sleep(self.limit)));
        ready!(stalled.as_mut().poll(context));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for WriteClock<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for WriteClock<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.written(context, result)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.stream).poll_write_vectored(context, slices);
        self.written(context, result)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_heads_are_counted_together() {
        let all = Arc::new(IncompleteHeads::default());
        let mut many: Vec<_> =
            (0..2_000).map(|_| HeldHead { all: Arc::clone(&all), bytes: 0 }).collect();
        // Small heads are always admitted.
        assert!(many.iter_mut().all(|held| held.set(SMALL_HEAD)));
        let let_in = many.iter_mut().filter_map(|held| held.set(16 << 10).then_some(())).count();
        assert_eq!(let_in, INCOMPLETE_HEADS_BYTES / (16 << 10));
        many[0].set(0);
        drop(many);
        assert_eq!(all.bytes.load(Ordering::Relaxed), 0);
    }
}
