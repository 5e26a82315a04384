//! Logs as the core keeps them: what policy removes and what it says about it, reading, cursors.

mod cursors;
mod harness;
mod history;
mod offline;
mod policy;
