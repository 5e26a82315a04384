//! The node agent for pods: what a kubelet is in a cluster, over the node's own broker.
//!
//! It watches the node's part of space `fleet` (the pods it must run and the objects they use), acts through a
//! container runtime, and writes what became of them to the node's space `status`. All of that is durable on the
//! node: it starts pods again after a reboot with no hub in reach.

pub mod cgroups;
pub mod containerd;
pub mod cri;
pub mod env;
pub mod fake;
pub mod logs;
pub mod make;
pub mod node;
mod node_agent;
pub mod objects;
mod pods;
pub mod probes;
pub mod quantity;
pub mod runtime;
pub mod server;
pub mod stats;
pub mod volumes;

pub use node_agent::{Choice, Edged, Options};
pub use pods::EVENT_TOPIC;
