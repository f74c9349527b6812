#![no_main]

#[path = "../properties/single_body.rs"]
mod single_body;

libfuzzer_sys::fuzz_target!(|input: &[u8]| single_body::check(input));
