//! What director and workers say to each other: one JSON object a line.

use std::{collections::BTreeMap, net::SocketAddr, time::Duration};

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

use crate::{pki::Kept, scenario::Scenario};

/// What a worker is to do.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "do")]
pub enum Order {
    /// Be this part of the fleet. The first order; answered by [`News::Ready`].
    Plan(Box<Plan>),
    /// Link all nodes.
    Ramp,
    /// Publish durable messages from every node, so many in a second each, until told otherwise (0: no more).
    Publish {
        /// Of each node.
        per_s: f64,
        /// Bytes of each.
        size: u32,
    },
    /// Let nodes leave and come back, so many in a second, until told otherwise (0: no more).
    Churn {
        /// Of this worker's nodes.
        per_s: f64,
    },
    /// Answer every message from the hub with one to it, at topic `loadtest/ack`.
    Answer,
    /// Forget the times that were measured so far.
    Forget,
    /// Say what was measured: [`News::Numbers`].
    Tell,
    /// End every link in an orderly way, then the process.
    Stop,
}

/// A worker's part of the fleet, and how its nodes behave.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// Number of its first node.
    pub first: u32,
    /// How many nodes it has.
    pub nodes: u32,
    /// UDP sockets that it dials from.
    pub sockets: u32,
    /// Links begun per second; 0: no bound.
    pub rate: f64,
    /// Links on their way to Welcome.
    pub in_flight: u32,
    /// Where the hubs are, in the order of the fleet; each node begins with one by its number.
    pub hubs: Vec<SocketAddr>,
    /// Certificates.
    pub kept: Kept,
    /// Tells this run's messages from those of others.
    pub run: u64,
    /// The rest.
    pub scenario: Scenario,
}

/// What a worker says.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "is")]
pub enum News {
    /// The plan is understood, sockets are bound, nothing was sent.
    Ready {
        /// Resident memory now, bytes.
        rss: u64,
    },
    /// Several times a second.
    Tick(Counts),
    /// The answer to [`Order::Tell`].
    Numbers(Box<Numbers>),
    /// The worker gives up.
    Failed {
        /// Why.
        error: String,
    },
}

/// Where the nodes of a worker stand.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// Linked now.
    pub connected: u64,
    /// Times that a node was welcomed.
    pub welcomed: u64,
    /// Of these, with a session ticket.
    pub resumed: u64,
    /// Dials that came to nothing.
    pub failed: u64,
    /// Links that ended though nobody ended them.
    pub lost: u64,
    /// Links that were lost or whose path fell silent, each once.
    pub noticed: u64,
    /// Messages published.
    pub published: u64,
    /// Changes of State that arrived.
    pub changes: u64,
    /// Messages from the hub that arrived.
    pub downs: u64,
    /// Of these, before one that was sent earlier, or again.
    pub downs_disordered: u64,
    /// Times that a key of State went back to an older revision.
    pub backwards: u64,
}

impl Counts {
    /// Adds another worker's.
    pub fn add(&mut self, other: &Self) {
        self.connected += other.connected;
        self.welcomed += other.welcomed;
        self.resumed += other.resumed;
        self.failed += other.failed;
        self.lost += other.lost;
        self.noticed += other.noticed;
        self.published += other.published;
        self.changes += other.changes;
        self.downs += other.downs;
        self.downs_disordered += other.downs_disordered;
        self.backwards += other.backwards;
    }
}

/// Everything that a worker has measured.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Numbers {
    /// Where the nodes stand.
    pub counts: Counts,
    /// Resident memory, bytes.
    pub rss: u64,
    /// User and system time, microseconds.
    pub cpu_us: u64,
    /// From the dial to Welcome, microseconds.
    pub welcome: Times,
    /// Round trips of heartbeats, microseconds.
    pub heartbeat: Times,
    /// From the writing of State at the hub to the node, microseconds.
    pub change: Times,
    /// Messages published by each node.
    pub published: Vec<u32>,
    /// Numbers of the newest value that each node has: of the object that all want, and of its own.
    pub held: Vec<[u32; 2]>,
    /// Wall time at which the last message from the hub arrived, microseconds.
    pub last_down_us: u64,
    /// How links ended, and why dials came to nothing.
    pub ends: BTreeMap<String, u64>,
}

/// A histogram on its way: recorded values and how often, ascending.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Times(Vec<(u64, u64)>);

impl Times {
    /// The recorded values.
    #[must_use]
    pub fn of(histogram: &Histogram<u64>) -> Self {
        let recorded = histogram.iter_recorded();
        Self(recorded.map(|at| (at.value_iterated_to(), at.count_at_value())).collect())
    }

    /// Adds them to a histogram of [`histogram`].
    pub fn add_to(&self, histogram: &mut Histogram<u64>) {
        for (value, count) in &self.0 {
            histogram.saturating_record_n(*value, *count);
        }
    }
}

/// An empty histogram of microseconds: up to an hour, three digits.
#[must_use]
pub fn histogram() -> Histogram<u64> {
    let hour_us = u64::try_from(Duration::from_secs(3600).as_micros()).expect("an hour");
    Histogram::new_with_bounds(1, hour_us, 3).expect("bounds that hdrhistogram takes")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_histogram_arrives_as_it_was() {
        let mut one = histogram();
        (1..2000).for_each(|us| one.record(us * 37).unwrap());
        let sent = serde_json::to_string(&Times::of(&one)).unwrap();
        let mut other = histogram();
        serde_json::from_str::<Times>(&sent).unwrap().add_to(&mut other);
        for quantile in [0.0, 0.5, 0.99, 1.0] {
            assert_eq!(one.value_at_quantile(quantile), other.value_at_quantile(quantile));
        }
    }

    #[test]
    fn an_order_is_one_line() {
        let order = Order::Publish { per_s: 0.5, size: 256 };
        assert_eq!(serde_json::to_string(&order).unwrap(), r#"{"do":"publish","per_s":0.5,"size":256}"#);
    }
}
