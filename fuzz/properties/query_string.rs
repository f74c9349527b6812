//! What holds of any query string. The fuzz target and the replay of its corpus both call [`check`].

use pisync::{
    api::wire::query::{MAX_OFFSET, QueryString, cursor_text},
    store::{HistoryPosition, Window},
};
use pisync_core::{JobName, Timestamp, Violation, decimal::parse_scaled};

/// The longest search text that is looked for here.
const MAX_SEARCH: usize = 255;

const SORTS: [(&str, u8); 2] = [("device_id", 1), ("-last_seen", 2)];

/// Panics when the query string is read as it must not be.
pub(crate) fn check(input: &[u8]) {
    // What is no text never gets here: HTTP refuses it in a request's target.
    let Ok(text) = std::str::from_utf8(input) else { return };
    let (read, outcome) = Parameters::read(text);
    read.check_bounds();
    match outcome {
        Ok(()) => {
            if read.limit.is_some() || read.offset > 0 {
                check_whole_numbers(text);
            }
            let written = read.written();
            assert_eq!(Parameters::read(&written), (read, Ok(())), "{text:?}, then {written:?}");
        }
        Err(violations) => {
            assert!(!violations.is_empty(), "refused without a word");
            for Violation { field, message, value, .. } in violations {
                assert!(message.starts_with(&format!("\"{field}\" ")), "{message}");
                let echo = value.map_or(String::new(), |value| value.to_string());
                // 256 characters and an ellipsis, of which an escaped one takes up to six.
                assert!(echo.chars().count() <= 6 * 257 + 2, "a long echo: {echo}");
            }
        }
    }
}

/// All parameters that any endpoint reads.
#[derive(Debug, PartialEq)]
struct Parameters {
    limit: Option<u32>,
    offset: u64,
    start_date: Option<Timestamp>,
    job: Option<JobName>,
    cursor: Option<HistoryPosition>,
    window: Option<&'static str>,
    window_value: Option<Window>,
    search: Option<String>,
    sort: Option<u8>,
    consecutive: bool,
}

impl Parameters {
    fn read(text: &str) -> (Self, Result<(), Vec<Violation>>) {
        let now = Timestamp::parse_iso8601("2026-01-01T00:00:00Z").expect("a date");
        let mut query = QueryString::parse(text);
        let window = query.window(now);
        let parameters = Self {
            limit: query.limit(),
            offset: query.offset(),
            start_date: query.timestamp("startDate"),
            job: query.job(),
            cursor: query.cursor(),
            window: window.map(|(name, _)| name),
            window_value: window.map(|(_, window)| window),
            search: query.text("q", MAX_SEARCH),
            sort: query.choice("sort", &SORTS),
            consecutive: query.boolean("consecutive"),
        };
        (parameters, query.finish_ignoring_others())
    }

    fn check_bounds(&self) {
        assert!(self.limit.is_none_or(|limit| (1..=1000).contains(&limit)));
        assert!(self.offset <= MAX_OFFSET);
        assert!(self.window_value.is_none_or(|window| window.from() < window.until()));
        let names = [
            (self.job.as_ref().map(JobName::as_str), JobName::MAX_CHARACTERS),
            (self.search.as_deref(), MAX_SEARCH),
        ];
        for (name, most) in names {
            let name = name.unwrap_or("fine");
            assert!((1..=most).contains(&name.chars().count()), "{name:?}");
            assert!(!name.chars().any(char::is_control), "{name:?}");
        }
    }

    /// A query string that says the same.
    fn written(&self) -> String {
        let mut query = form_urlencoded::Serializer::new(String::new());
        let mut pair = |name: &str, value: Option<String>| {
            if let Some(value) = value {
                query.append_pair(name, &value);
            }
        };
        pair("limit", self.limit.map(|limit| limit.to_string()));
        pair("offset", Some(self.offset.to_string()));
        pair("startDate", self.start_date.map(|date| date.to_string()));
        pair("job", self.job.as_ref().map(JobName::to_string));
        pair("cursor", self.cursor.map(cursor_text));
        pair("window", self.window.map(str::to_owned));
        pair("q", self.search.clone());
        pair("consecutive", Some(self.consecutive.to_string()));
        let sort = SORTS.iter().find(|(_, sort)| Some(*sort) == self.sort);
        pair("sort", sort.map(|(name, _)| (*name).to_owned()));
        query.finish()
    }
}

/// The numbers of an accepted query string were written as whole ones.
fn check_whole_numbers(text: &str) {
    for (name, value) in form_urlencoded::parse(text.as_bytes()) {
        if name == "limit" || name == "offset" {
            let number = parse_scaled(value.trim(), 0);
            assert!(number.is_some_and(|number| number.exact), "{name}={value}");
        }
    }
}
