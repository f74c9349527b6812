//! `GET /api/device/{device_id}/explain`: why a device is in its state, and until when it is waited for.

use axum::extract::State;
use utoipa_axum::routes;

use crate::{
    api::{
        SharedState,
        wire::{
            envelope::Success,
            error::{AnyTime, ApiError, ErrorBody, OfDevice},
            extract::{DevicePath, DevicePathParameter, NoQuery},
            routes::Routes,
        },
    },
    fleet::explain::Explanation,
    middleware::route_policy::RoutePolicy,
};

pub(crate) fn routes() -> Routes {
    Routes::new(routes!(explain_device), RoutePolicy::API)
}

/// Why a device is in its state
///
/// Evaluates the device now, whatever the last sweep has found. The sentences say what is known, what is waited for, until
/// when, and what made a deadline later.
#[utoipa::path(
    get,
    path = "/api/device/{device_id}/explain",
    tag = "Devices",
    security(("key" = ["read"])),
    params(DevicePathParameter),
    responses(
        (status = 200, description = "The explanation.", body = Success<Explanation>),
        (status = 400, description = "Not a possible device id, or a query parameter.", body = ErrorBody),
        OfDevice,
        AnyTime,
    ),
)]
async fn explain_device(
    State(state): State<SharedState>,
    _: NoQuery,
    DevicePath(device_id): DevicePath,
) -> Result<Success<Explanation>, ApiError> {
    let now = state.clock.now();
    let examination = state.store.examine_device(device_id.as_str(), now).await?;
    let examination = examination.ok_or(ApiError::NotFound("Device"))?;
    Ok(Success::new("Device explained successfully", Explanation::new(&examination, now)))
}
