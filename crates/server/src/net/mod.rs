//! The network: listening sockets, TLS, and connections with their time-outs. `app` starts it. It must not depend on
//! what a request asks for.

mod connection;
mod http2_frames;
mod listeners;
mod serve;
mod timeouts;
mod tls;
mod unread;

pub use self::{
    listeners::Listeners,
    serve::{ConnectionSettings, serve},
    tls::Tls,
};
