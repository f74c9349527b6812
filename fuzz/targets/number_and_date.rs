#![no_main]

#[path = "../properties/number_and_date.rs"]
mod number_and_date;

libfuzzer_sys::fuzz_target!(|input: &[u8]| number_and_date::check(input));
