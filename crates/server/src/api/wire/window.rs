//! The query parameter `window` in the OpenAPI document. The resources that have one use it.

use utoipa::{PartialSchema, ToSchema, openapi};

/// A window by its name; [`crate::api::wire::query::QueryString::window`] reads it.
pub(crate) struct WindowName;

impl PartialSchema for WindowName {
    fn schema() -> openapi::RefOr<openapi::schema::Schema> {
        openapi::ObjectBuilder::new()
            .schema_type(openapi::schema::Type::String)
            .enum_values(Some(["24h", "7d", "30d"]))
            .into()
    }
}

impl ToSchema for WindowName {}
