//! What the tests are made of: processes, relays, clients and networks, all from the outside.
//!
//! Nothing here looks into a broker. The binaries are started as a user would start them; the protocols
//! are spoken either by stock clients (`mosquitto_pub`, nats-py, paho) or by small clients written here
//! from the specifications, because a test that speaks through the code under test proves little.
//!
//! Every random choice comes from a seed that is printed; `TEST_SEED=<n>` repeats it.

pub mod clock;
pub mod log;
pub mod mqtt;
pub mod nats;
pub mod netns;
pub mod octobus;
pub mod process;
pub mod procfs;
pub mod relay;
pub mod script;
pub mod seed;
pub mod servers;
pub mod stock;
pub mod tier;
