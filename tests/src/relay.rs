//! Bad networks: what stands between two processes and loses, delays, doubles, reorders or cuts.

mod line;
mod tcp;
mod udp;

pub use line::Line;
pub use tcp::TcpRelay;
pub use udp::{Faults, UdpRelay};
