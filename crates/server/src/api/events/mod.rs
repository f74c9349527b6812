//! What devices report: one event in a request, or many.

pub(super) mod many;
pub(super) mod one;
