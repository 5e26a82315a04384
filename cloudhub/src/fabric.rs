//! The primitives across the tier.

pub mod nats;
