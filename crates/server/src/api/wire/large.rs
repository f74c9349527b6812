//! Limits the memory of large responses until their clients have read them. The limit holds for all of them together. A
//! response beyond it is refused; a batch is refused before any of it is stored. Handlers and the middleware call it.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use axum::{
    body::{Body, Bytes, HttpBody},
    extract::State,
    response::{IntoResponse, Response},
};
use hyper::body::{Frame, SizeHint};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::{api::wire::error::ApiError, middleware::admission::Slot};

/// Smaller responses are not counted, because the buffers of a connection hold as much anyway.
const LARGE: usize = 16 << 10;

/// The memory of a gzip encoder while a response passes through it, roughly.
pub(crate) const ENCODER_BYTES: usize = 320 << 10;

/// Bytes are counted in units of this size.
const UNIT: usize = 1 << 10;

/// The shared limit. Cheap to clone.
#[derive(Clone)]
pub(crate) struct LargeAnswers(Arc<Semaphore>);

impl LargeAnswers {
    /// All large responses together may hold `bytes` bytes.
    pub(crate) fn new(bytes: usize) -> Self {
        Self(Arc::new(Semaphore::new(bytes / UNIT)))
    }

    /// Reserves memory for a response of this size; `None` when it is small.
    ///
    /// # Errors
    /// [`ApiError::Overloaded`] when there is not enough.
    pub(crate) fn reserve(&self, bytes: usize) -> Result<Option<Held>, ApiError> {
        if bytes <= LARGE {
            return Ok(None);
        }
        let permit = Arc::clone(&self.0).try_acquire_many_owned(units(bytes));
        permit.map(|permit| Some(Held(Arc::new(permit)))).map_err(|_| ApiError::Overloaded)
    }

    /// Waits for memory of this size; `None` after `patience`.
    pub(crate) async fn wait_for(&self, bytes: usize, patience: Duration) -> Option<Held> {
        let permit = Arc::clone(&self.0).acquire_many_owned(units(bytes));
        let permit = tokio::time::timeout(patience, permit).await.ok()?.ok()?;
        Some(Held(Arc::new(permit)))
    }
}

fn units(bytes: usize) -> u32 {
    u32::try_from(bytes.div_ceil(UNIT)).unwrap_or(u32::MAX)
}

/// Reserved memory, which is released when this is dropped. As an extension of a response, it is the memory of that
/// response.
#[derive(Clone)]
pub(crate) struct Held(Arc<OwnedSemaphorePermit>);

impl Held {
    /// Releases what exceeds `bytes`.
    fn shrink_to(&mut self, bytes: usize) {
        if let Some(permit) = Arc::get_mut(&mut self.0) {
            let excess = permit.num_permits().saturating_sub(bytes.div_ceil(UNIT));
            drop(permit.split(excess));
        }
    }

    /// Makes a text whose memory stays reserved while any part of it exists.
    pub(crate) fn with(mut self, text: String) -> Bytes {
        self.shrink_to(text.len());
        let keep = Arc::new(Keep { _held: Some(self), _slot: None });
        Bytes::from_owner(Kept { bytes: text.into(), _keep: keep })
    }
}

/// The layer between handlers and compression, which reserves memory for large responses. It is for reads only: a
/// read can still be refused after its handler has run.
pub(crate) async fn count(State(answers): State<LargeAnswers>, mut response: Response) -> Response {
    let size = response.body().size_hint().exact().and_then(|size| usize::try_from(size).ok());
    // This layer does not know whether the response will be compressed.
    let with_encoder = size.filter(|size| *size > LARGE).map_or(0, |size| size + ENCODER_BYTES);
    match answers.reserve(with_encoder) {
        Ok(Some(held)) => {
            response.extensions_mut().insert(held);
        }
        Ok(None) => {}
        Err(error) => return error.into_response(),
    }
    response
}

/// Releases a response's memory and slot after its client has read all of it. A small response counts as read at once.
/// The outermost layer calls it.
pub(crate) fn hold(mut response: Response, slot: Option<Slot>) -> Response {
    let size = response.body().size_hint().exact();
    if size.is_some_and(|size| size <= LARGE as u64) {
        return response;
    }
    let mut held = response.extensions_mut().remove::<Held>();
    if slot.is_none() && held.is_none() {
        return response;
    }
    if let (Some(held), Some(size)) = (&mut held, size) {
        held.shrink_to(usize::try_from(size).unwrap_or(usize::MAX));
    }
    let keep = Arc::new(Keep { _held: held, _slot: slot });
    response.map(|body| Body::new(Keeping { body, keep }))
}

/// What is released with a response.
struct Keep {
    _held: Option<Held>,
    _slot: Option<Slot>,
}

/// A body that keeps something until all its pieces are dropped. Connections hold pieces even after the end of the
/// body.
struct Keeping {
    body: Body,
    keep: Arc<Keep>,
}

impl HttpBody for Keeping {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let frame = Pin::new(&mut self.body).poll_frame(context);
        frame.map_ok(|frame| {
            frame.map_data(|bytes| Bytes::from_owner(Kept { bytes, _keep: Arc::clone(&self.keep) }))
        })
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// A piece of such a body.
struct Kept {
    bytes: Bytes,
    _keep: Arc<Keep>,
}

impl AsRef<[u8]> for Kept {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt as _;

    use super::*;

    const MAX_BYTES: usize = 10 << 20;

    fn left(answers: &LargeAnswers) -> usize {
        answers.0.available_permits() * UNIT
    }

    #[tokio::test]
    async fn what_is_counted_until_when() {
        let answers = LargeAnswers::new(MAX_BYTES);
        assert!(answers.reserve(LARGE).unwrap().is_none());
        // A large response needs only its own bytes, once it is known that nothing compresses it.
        let response = count(State(answers.clone()), "x".repeat(1 << 20).into_response()).await;
        assert_eq!(left(&answers), MAX_BYTES - (1 << 20) - ENCODER_BYTES);
        let mut body = hold(response, None).into_body();
        assert_eq!(body.size_hint().exact(), Some(1 << 20));
        let mut piece = body.frame().await.unwrap().unwrap().into_data().unwrap();
        drop(body);
        drop(piece.split_to(1 << 19));
        assert_eq!(left(&answers), MAX_BYTES - (1 << 20));
        drop(piece);
        assert_eq!(left(&answers), MAX_BYTES);
        // A streamed response needs everything that was reserved.
        let held = answers.reserve(1 << 20).unwrap();
        let mut response =
            Body::from_stream(futures_util::stream::empty::<Result<Bytes, axum::Error>>())
                .into_response();
        response.extensions_mut().insert(held.unwrap());
        let response = hold(response, None);
        assert_eq!(left(&answers), MAX_BYTES - (1 << 20));
        drop(response);
        // Beyond that, nothing is available.
        let all = answers.reserve(MAX_BYTES).unwrap();
        assert!(matches!(answers.reserve(LARGE + 1), Err(ApiError::Overloaded)));
        let refused = count(State(answers.clone()), "x".repeat(1 << 20).into_response()).await;
        assert_eq!(refused.status(), 503);
        assert!(answers.wait_for(1, Duration::from_millis(1)).await.is_none());
        drop(all);
        let text = answers.wait_for(1 << 20, Duration::from_millis(1)).await.unwrap();
        let text = text.with("x".repeat(10));
        assert_eq!((left(&answers), text.len()), (MAX_BYTES - UNIT, 10));
    }
}
