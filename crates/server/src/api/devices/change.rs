//! Reads what to change about a device, from the bodies of `PATCH` and `PUT`, and from the rows of a roster.

use pisync_core::{GroupName, Timestamp, Violation, ViolationCode, text::check_text};
use serde::Deserialize;
use serde_json::Value;
use utoipa::ToSchema;

use crate::{
    api::{
        fleet::level::{self, Paused, PolicyBody, Update},
        wire::fields::{Fields, text},
    },
    store::DeviceChange,
};

const MAX_NAME: usize = 255;

/// The longest tag, in characters.
pub(crate) const MAX_TAG: usize = 50;

/// The most tags of a device.
const MOST_TAGS: usize = 20;

/// The changes. Absent fields stay unchanged, and null clears a field. Unknown fields are refused.
#[derive(ToSchema, Deserialize)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({"name": "Library, north wall", "group": "school-17", "tags": ["indoor"]}))]
#[expect(dead_code, reason = "describes the body, is never made")]
pub(super) struct DeviceUpdate {
    /// A name for people.
    #[schema(min_length = 1, max_length = 255, pattern = r"^[^\u0000-\u001F\u007F-\u009F]+$")]
    name: Option<String>,
    /// The group of the device.
    #[schema(min_length = 1, max_length = 100, pattern = r"^[^\u0000-\u001F\u007F-\u009F]+$")]
    group: Option<String>,
    /// Up to 20 tags of 1 to 50 characters.
    #[schema(value_type = Tags, required = false)]
    tags: Option<Vec<String>>,
    /// A note for people.
    #[schema(min_length = 1, max_length = 1000, pattern = r"^[^\u0000-\u001F\u007F-\u009F]+$")]
    note: Option<String>,
    #[schema(value_type = PolicyBody, required = false)]
    policy: Option<Value>,
    /// True puts the device on the roster: it is expected to report. With false nothing is expected of it. Null takes
    /// back what was said.
    expected: Option<bool>,
    #[schema(value_type = Paused, required = false)]
    paused: Option<Value>,
}

/// Tags in a request.
pub(super) struct Tags;

impl utoipa::PartialSchema for Tags {
    fn schema() -> utoipa::openapi::RefOr<utoipa::openapi::schema::Schema> {
        level::one_of(&serde_json::json!([{"type": "null"}, {
            "type": "array",
            "maxItems": MOST_TAGS,
            "items": {
                "type": "string",
                "minLength": 1,
                "maxLength": MAX_TAG,
                "pattern": r"^[^\u0000-\u001F\u007F-\u009F]+$",
            },
        }]))
    }
}

impl ToSchema for Tags {}

/// Reads the fields of a body.
pub(crate) fn device_change(
    mut fields: Fields,
    update: Update,
    now: Timestamp,
) -> Result<DeviceChange, Vec<Violation>> {
    let mut change = described(&mut fields);
    change.policy = level::policy(&mut fields, update);
    change.expected = expected(&mut fields);
    change.pause = level::paused(&mut fields, now);
    let violations = fields.into_violations();
    if violations.is_empty() { Ok(change) } else { Err(violations) }
}

/// Reads the fields that a roster has, too.
pub(super) fn described(fields: &mut Fields) -> DeviceChange {
    DeviceChange {
        name: fields.nullable("name", text(MAX_NAME)),
        group: fields.nullable("group", GroupName::new),
        tags: tags(fields),
        note: level::note(fields),
        ..DeviceChange::default()
    }
}

/// The field `tags`, in byte-wise order and each once.
fn tags(fields: &mut Fields) -> Option<Vec<String>> {
    let value = fields.take("tags")?;
    let sent = match &value {
        Value::Null => return Some(Vec::new()),
        Value::Array(tags) if tags.len() > MOST_TAGS => {
            let rule = format!("must contain less than or equal to {MOST_TAGS} items");
            fields.refuse("tags", ViolationCode::Length, &rule, Some(value));
            return None;
        }
        Value::Array(tags) => tags,
        _ => {
            fields.refuse("tags", ViolationCode::Type, "must be an array", Some(value));
            return None;
        }
    };
    let (mut tags, mut violations) = (Vec::with_capacity(sent.len()), Vec::new());
    for (index, tag) in sent.iter().enumerate() {
        let mut refuse = |code, rule: &str| {
            let field = format!("tags[{index}]");
            violations.push(Violation::of(field, code, rule, Some(tag.clone())));
        };
        match tag.as_str().map(|tag| check_text(tag, MAX_TAG).map(|()| tag.to_owned())) {
            None => refuse(ViolationCode::Type, "must be a string"),
            Some(Err(error)) => refuse(error.code(), &error.to_string()),
            Some(Ok(tag)) => tags.push(tag),
        }
    }
    if !violations.is_empty() {
        fields.add(violations);
        return None;
    }
    tags.sort_unstable();
    tags.dedup();
    Some(tags)
}

/// The field `expected`.
fn expected(fields: &mut Fields) -> Option<Option<bool>> {
    let value = fields.take("expected")?;
    match value {
        Value::Null => Some(None),
        Value::Bool(expected) => Some(Some(expected)),
        _ => {
            fields.refuse("expected", ViolationCode::Type, "must be a boolean", Some(value));
            None
        }
    }
}
