//! The fields of a sync event on the wire, in the order in which they are written and documented. Every other list of
//! them is derived from this one or tested against it: the OpenAPI document, the CSV columns, the docs.

/// The JSON type of a field.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FieldKind {
    /// A string.
    Text,
    /// A number.
    Number,
    /// An object.
    Object,
}

/// A field of a sync event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EventField {
    /// The field's name on the wire.
    pub name: &'static str,
    /// The JSON type of its value.
    pub kind: FieldKind,
    /// True if an event without the field is refused.
    pub is_required: bool,
}

const fn required(name: &'static str, kind: FieldKind) -> EventField {
    EventField { name, kind, is_required: true }
}

const fn optional(name: &'static str, kind: FieldKind) -> EventField {
    EventField { name, kind, is_required: false }
}

/// All fields.
pub const EVENT_FIELDS: [EventField; 11] = [
    required("device_id", FieldKind::Text),
    optional("event_id", FieldKind::Text),
    required("timestamp", FieldKind::Text),
    optional("clock", FieldKind::Text),
    required("total_files_synced", FieldKind::Number),
    required("total_errors", FieldKind::Number),
    optional("internet_speed", FieldKind::Number),
    optional("job", FieldKind::Text),
    optional("duration_seconds", FieldKind::Number),
    optional("bytes_synced", FieldKind::Number),
    optional("metadata", FieldKind::Object),
];

/// Finds a field by its exact name; upper and lower case are different.
#[must_use]
pub fn event_field(name: &str) -> Option<&'static EventField> {
    EVENT_FIELDS.iter().find(|field| field.name == name)
}
