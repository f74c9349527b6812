//! Replays what the server's fuzz target has found, with the same checks. Those of the core crate are
//! replayed by its own tests.

#[path = "../../../../fuzz/properties/corpus.rs"]
mod corpus;
#[path = "../../../../fuzz/properties/query_string.rs"]
mod query_string;

#[test]
fn query_strings() {
    corpus::replay("query_string", query_string::check);
}
