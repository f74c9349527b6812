//! How requests are read and answers are written, whatever they are about: bodies, query strings, the envelope, errors,
//! and the figures that several answers show.

pub(crate) mod charset;
pub(crate) mod decompress;
pub(crate) mod envelope;
pub(crate) mod error;
pub(crate) mod extract;
pub(crate) mod fields;
pub(crate) mod figures;
pub(crate) mod large;
pub(crate) mod page;
pub mod query;
pub(crate) mod routes;
pub(crate) mod window;
