//! How requests are read and responses are written, for all resources: bodies, query strings, the envelope, errors, and
//! shared figures. The resources call it. Nothing here may know a resource.

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
pub(crate) mod weights;
pub(crate) mod window;
