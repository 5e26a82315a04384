//! Simulated fleets: thousands of nodes per process, each the agent's own link and session code.
//!
//! ```text
//!  director ──orders──▶ worker (a process) ── nodes ── sockets ══QUIC══▶ hub(s)
//!     │    ◀──news────   one core driver for all (broker::fleet)          ▲
//!     └── enrols, kills and starts hubs, asks them what arrived ──────────┘
//! ```
//!
//! The director is the process that a person starts. It takes no part in the traffic: nodes run in processes
//! of their own, so that the memory and CPU of a node can be told from everything else. A worker does what a
//! line on its standard input says and answers with lines on its standard output ([`wire`]).
//!
//! It aims only at addresses that it was given, or at hubs that it started itself; those end with it ([`guard`]).

pub mod check;
pub mod crew;
pub mod director;
mod endure;
pub mod gate;
pub mod guard;
pub mod hub;
pub mod line;
pub mod mark;
pub mod nats;
pub mod node;
pub mod pki;
pub mod plot;
pub mod process;
pub mod progress;
pub mod publish;
pub mod report;
pub mod scenario;
mod steps;
pub mod tier;
mod traffic;
pub mod wire;
pub mod worker;
pub mod workers;
