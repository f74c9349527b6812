//! What differs between the incidents of two replays: those that came of one alone.

use pisync_core::Timestamp;

use crate::store::Incident;

/// Two lists of incidents, compared.
#[derive(Debug)]
pub struct Comparison<'a> {
    /// Those that only the first list has.
    pub only_first: Vec<&'a Incident>,
    /// Those that only the second list has.
    pub only_second: Vec<&'a Incident>,
    /// How many both have.
    pub both: usize,
}

impl<'a> Comparison<'a> {
    /// Compares two lists in the order in which incidents opened. An incident is in both when each has one about the same
    /// problem of the same device, group or fleet, and there is a time at which both were open.
    #[must_use]
    pub fn new(first: &'a [Incident], second: &'a [Incident]) -> Self {
        let mut only_second: Vec<_> = second.iter().collect();
        let mut only_first = Vec::new();
        let mut both = 0;
        for incident in first {
            match only_second.iter().position(|other| is_same(incident, other)) {
                Some(found) => {
                    only_second.remove(found);
                    both += 1;
                }
                None => only_first.push(incident),
            }
        }
        Self { only_first, only_second, both }
    }
}

fn is_same(left: &Incident, right: &Incident) -> bool {
    let end = |incident: &Incident| incident.resolved_at.unwrap_or(Timestamp::MAX);
    left.scope == right.scope
        && left.subject == right.subject
        && left.kind == right.kind
        && left.opened_at <= end(right)
        && right.opened_at <= end(left)
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    fn incident(subject: &str, opened: i64, resolved: Option<i64>) -> Incident {
        let at = |second: i64| Timestamp::from_millisecond(second * 1000).unwrap();
        Incident {
            id: opened,
            scope: "device".to_owned(),
            subject: subject.to_owned(),
            kind: "silent".to_owned(),
            severity: "warning".to_owned(),
            since: at(opened),
            opened_at: at(opened),
            resolved_at: resolved.map(at),
            resolution: None,
            acknowledgement: None,
            reopened: 0,
            flapping_since: None,
            summary: Value::Null,
        }
    }

    #[test]
    fn incidents_are_the_same_when_they_were_open_at_the_same_time() {
        let first = [incident("a", 1, Some(5)), incident("b", 1, Some(2)), incident("a", 10, None)];
        let second = [incident("a", 4, Some(6)), incident("b", 3, None), incident("c", 1, None)];
        let found = Comparison::new(&first, &second);
        let names = |list: &[&Incident]| {
            list.iter().map(|one| format!("{}{}", one.subject, one.id)).collect::<Vec<_>>()
        };
        assert_eq!(names(&found.only_first), ["b1", "a10"]);
        assert_eq!(names(&found.only_second), ["b3", "c1"]);
        assert_eq!(found.both, 1);
    }
}
