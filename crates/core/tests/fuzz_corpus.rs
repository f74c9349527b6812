//! Replays what the fuzz targets of this crate have found, with the same checks.

#![expect(clippy::expect_used, reason = "a test that cannot go on fails by panicking")]

#[path = "../../../fuzz/properties/corpus.rs"]
mod corpus;
#[path = "../../../fuzz/properties/event_stream.rs"]
mod event_stream;
#[path = "../../../fuzz/properties/number_and_date.rs"]
mod number_and_date;
#[path = "../../../fuzz/properties/single_body.rs"]
mod single_body;

#[test]
fn single_bodies() {
    corpus::replay("single_body", single_body::check);
}

#[test]
fn event_streams() {
    corpus::replay("event_stream", event_stream::check);
}

#[test]
fn numbers_and_dates() {
    corpus::replay("number_and_date", number_and_date::check);
}
