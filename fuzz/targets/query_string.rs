#![no_main]

#[path = "../properties/query_string.rs"]
mod query_string;

libfuzzer_sys::fuzz_target!(|input: &[u8]| query_string::check(input));
