//! The network: the sockets that clients connect to, TLS, and connections with their time-outs. `app` starts it; what
//! a request asks for is none of its business.

mod connection;
mod listeners;
mod serve;
mod timeouts;
mod tls;
mod untaken;

pub use self::{
    listeners::Listeners,
    serve::{ConnectionSettings, serve},
    tls::Tls,
};
