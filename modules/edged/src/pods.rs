//! Pods on this node: what becomes of each, and what is said of it.
//!
//! ```text
//!  fleet, folder of static pods --source--> agent: which pods there must be --> a worker for each
//!  worker: life (sans-IO) --actions--> hands: runtime, volumes --seen--> life --status--> report
//! ```
//!
//! | file | subject |
//! |---|---|
//! | `source` | what must be: the node's part of `fleet`, static pods |
//! | `agent` | which pods there are; orphans; the runtime's hints and lists |
//! | `admit` | whether a pod may run here |
//! | `worker` | the task of one pod |
//! | `life` | the state machine of one pod |
//! | `status` | what is said of it |
//! | `seen` | what the runtime shows of it |
//! | `backoff` | when an ended container is started again |
//! | `spec` | what its specification says |
//! | `hands` | performs actions |
//! | `maker`, `workshop` | folders, volumes and configurations, as `hands` needs them |
//! | `probing` | the probes of one pod |
//! | `table` | what pods share: objects, and what each shows to the server |
//! | `images` | which images go when their disk is nearly full |
//! | `report` | writes statuses and events |

mod admit;
mod agent;
mod backoff;
mod hands;
pub(crate) mod images;
mod life;
mod maker;
mod probing;
mod report;
mod seen;
mod source;
mod spec;
mod status;
mod table;
mod worker;
mod workshop;

pub use self::report::EVENT_TOPIC;
pub(crate) use self::{
    admit::Limits,
    agent::{Agent, Settings},
    hands::Hands,
    maker::Maker,
    report::Reporter,
    source::Source,
    table::Table,
    worker::Clock,
    workshop::Workshop,
};
