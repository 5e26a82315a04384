//! The broker: routing core, store, fronts, links. The deep crate, used on both sides.

pub mod clock;
pub mod core;
pub mod driver;
pub mod enroll;
pub mod fleet;
pub mod front;
pub mod handle;
pub mod instance;
pub mod limits;
pub mod link;
pub mod private;
pub mod seal;
pub mod store;
pub mod tasks;

pub use crate::{
    core::event,
    handle::{Handle, Outbox, Stopped},
    tasks::Tasks,
};
