//! The envelope of successful JSON responses. Handlers return it, except those of `/`, `/api` and `/health`.

use axum::{
    Json,
    http::StatusCode,
    response::{IntoResponse, Response},
};
use serde::Serialize;
use utoipa::ToSchema;

/// A successful response.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Success<T> {
    /// Always true.
    success: bool,
    /// What was done, for people to read.
    message: &'static str,
    /// The requested data.
    data: T,
}

impl<T> Success<T> {
    pub(crate) fn new(message: &'static str, data: T) -> Self {
        Self { success: true, message, data }
    }

    /// The response with a status other than 200.
    pub(crate) fn with_status(self, status: StatusCode) -> Response
    where
        T: Serialize,
    {
        (status, Json(self)).into_response()
    }
}

impl<T: Serialize> IntoResponse for Success<T> {
    fn into_response(self) -> Response {
        Json(self).into_response()
    }
}
