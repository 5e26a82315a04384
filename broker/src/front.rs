//! Where clients come in: MQTT and NATS.

pub mod auth;
pub mod mqtt;
pub mod nats;
