//! The fields of a sync event on the wire, in the order in which they are written and documented. Whatever else lists
//! them, such as the OpenAPI document, the columns of CSV and the docs, is derived from this list or tested against it.

/// What a field holds in JSON.
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
    /// Its name.
    pub name: &'static str,
    /// What it holds.
    pub kind: FieldKind,
    /// Whether an event without it is refused.
    pub is_required: bool,
}

const fn required(name: &'static str, kind: FieldKind) -> EventField {
    EventField { name, kind, is_required: true }
}

const fn optional(name: &'static str, kind: FieldKind) -> EventField {
    EventField { name, kind, is_required: false }
}

/// All of them.
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

/// The field of this name, which is told apart by capital letters, too.
#[must_use]
pub fn event_field(name: &str) -> Option<&'static EventField> {
    EVENT_FIELDS.iter().find(|field| field.name == name)
}
