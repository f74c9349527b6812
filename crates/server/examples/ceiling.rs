//! The ceiling that ingest is measured against: axum parses the same JSON and answers the same 201,
//! and stores nothing. `bench/run` drives it beside the real server. Whatever is posted to `/messages` it takes, as a receiver of
//! messages does.
//!
//! Usage: `ceiling PORT`

use std::error::Error;

use axum::{Json, Router, body::Bytes, http::StatusCode, routing::post};
use serde::{Deserialize, Serialize};

#[derive(Deserialize)]
struct Event {
    device_id: String,
    event_id: Option<String>,
    timestamp: String,
    total_files_synced: u32,
    total_errors: u32,
    internet_speed: Option<f64>,
}

#[derive(Serialize)]
struct Created {
    success: bool,
    message: &'static str,
    data: Data,
}

#[derive(Serialize)]
struct Data {
    id: i64,
    device_id: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    event_id: Option<String>,
    timestamp: String,
    total_files_synced: u32,
    total_errors: u32,
    internet_speed: Option<f64>,
    created_at: &'static str,
}

async fn create(Json(event): Json<Event>) -> (StatusCode, Json<Created>) {
    let data = Data {
        id: 1,
        device_id: event.device_id,
        event_id: event.event_id,
        timestamp: event.timestamp,
        total_files_synced: event.total_files_synced,
        total_errors: event.total_errors,
        internet_speed: event.internet_speed,
        created_at: "2026-11-22T14:58:14.481Z",
    };
    let message = "Sync event processed successfully";
    (StatusCode::CREATED, Json(Created { success: true, message, data }))
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let port: u16 = std::env::args().nth(1).ok_or("usage: ceiling PORT")?.parse()?;
    let listener = tokio::net::TcpListener::bind(("127.0.0.1", port)).await?;
    let router = Router::new()
        .route("/api/sync-event", post(create))
        .route("/messages", post(async |_: Bytes| StatusCode::NO_CONTENT));
    axum::serve(listener, router).await?;
    Ok(())
}
