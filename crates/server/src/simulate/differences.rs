//! What a server answered otherwise than it must. `sender` and `compare` find differences; the command shows them.

use serde_json::{Map, Value};

/// The number of differences that are kept; all are counted.
const KEPT: usize = 1_000;

/// Something that the server answered otherwise than it must.
#[derive(Debug)]
pub struct Difference {
    /// Whose figure it is.
    pub place: String,
    /// Which figure.
    pub figure: String,
    /// What the server told.
    pub told: Value,
    /// What it must be.
    pub expected: Value,
}

/// All of them, of which the first are kept.
#[derive(Debug, Default)]
pub struct Differences {
    /// How many there are.
    pub count: u64,
    /// The first of them.
    pub kept: Vec<Difference>,
}

impl Differences {
    pub(super) fn push(&mut self, place: String, figure: &str, told: Value, expected: Value) {
        self.count += 1;
        if self.kept.len() < KEPT {
            self.kept.push(Difference { place, figure: figure.to_owned(), told, expected });
        }
    }

    /// Compares the fields that are expected; the server may tell more.
    pub(super) fn compare(&mut self, place: &str, told: &Value, expected: &Map<String, Value>) {
        for (field, expected) in expected {
            let told = &told[field.as_str()];
            if !is_same(told, expected) {
                self.push(place.to_owned(), field, told.clone(), expected.clone());
            }
        }
    }

    pub(super) fn append(&mut self, other: Self) {
        let room = KEPT.saturating_sub(self.kept.len());
        self.count += other.count;
        self.kept.extend(other.kept.into_iter().take(room));
    }
}

/// Whether two values mean the same. 12 and 12.0 do.
fn is_same(told: &Value, expected: &Value) -> bool {
    match (told.as_f64(), expected.as_f64()) {
        (Some(told), Some(expected)) => (told - expected).abs() < 1e-9,
        _ => told == expected,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn only_expected_fields_are_compared() {
        let mut found = Differences::default();
        let told = json!({"a": 12, "b": 0.5, "c": null, "further": "field"});
        let expected = json!({"a": 12.0, "b": 0.5, "c": null});
        found.compare("x", &told, expected.as_object().unwrap());
        assert_eq!(found.count, 0);
        let expected = json!({"a": 11, "b": 0.51, "c": 0, "missing": true});
        found.compare("x", &told, expected.as_object().unwrap());
        let figures: Vec<_> = found.kept.iter().map(|one| one.figure.as_str()).collect();
        assert_eq!((found.count, figures), (4, vec!["a", "b", "c", "missing"]));
        assert_eq!((&found.kept[1].told, &found.kept[1].expected), (&json!(0.5), &json!(0.51)));
    }

    #[test]
    fn all_are_counted_and_the_first_are_kept() {
        let mut found = Differences::default();
        for number in 0..KEPT + 5 {
            found.push(number.to_string(), "a", Value::Null, Value::Null);
        }
        let mut all = Differences::default();
        all.push("first".into(), "a", Value::Null, Value::Null);
        all.append(found);
        assert_eq!((all.count, all.kept.len()), (KEPT as u64 + 6, KEPT));
        assert_eq!(all.kept[0].place, "first");
    }
}
