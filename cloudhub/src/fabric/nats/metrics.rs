//! The tier as metrics.

use std::sync::{Arc, atomic::Ordering::Relaxed};

use ops::metrics::{Collect, Kind, Text};

use super::{Tier, store::Told};

/// Metrics of what a replica's store writes, to be registered once.
#[must_use]
pub fn store(told: Told) -> Collect {
    Arc::new(move |text: &mut Text| {
        let counts = told.counts();
        for (name, help, value) in [
            ("batches", "Messages of Logs that were written.", counts.batches),
            ("records", "Records in them.", counts.records),
            ("entries", "Entries of nodes' State that were written.", counts.entries),
            ("repeated", "Records that turned out to be there.", counts.repeated),
            ("conflicts", "Writes that found another message than expected.", counts.conflicts),
            ("unknown", "Writes of which nobody knew at first whether they happened.", counts.unknown),
            ("unfit", "Nodes that were let go because their Logs did not fit.", counts.fenced),
            ("full", "Writes that met a full stream.", counts.full),
            ("letters", "Records that NATS can never hold.", counts.letters),
        ] {
            let name = format!("octobus_tier_{name}_total");
            text.family(&name, Kind::Counter, help);
            text.sample(&name, &[], value);
        }
    })
}

impl Tier {
    /// Metrics of this replica's part of the tier, to be registered once.
    #[must_use]
    pub fn metrics(&self) -> Collect {
        let tier = self.clone();
        Arc::new(move |text: &mut Text| tier.write_metrics(text))
    }

    fn write_metrics(&self, text: &mut Text) {
        let mut counter = |name: &str, help: &str, value: u64| {
            text.family(name, Kind::Counter, help);
            text.sample(name, &[], value);
        };
        let nats = self.connection.counters();
        counter(
            "octobus_nats_requests_total",
            "Requests to the tier's NATS servers.",
            nats.requests.load(Relaxed),
        );
        counter(
            "octobus_nats_failures_total",
            "Of those, refused or not answered.",
            nats.failures.load(Relaxed),
        );
        counter("octobus_nats_connects_total", "Connections to a NATS server.", nats.connects.load(Relaxed));
        counter(
            "octobus_nats_slow_total",
            "Times that messages were dropped unread.",
            nats.slow.load(Relaxed),
        );
        let claims = self.claims.counters();
        counter(
            "octobus_claims_granted_total",
            "Nodes that this replica took.",
            claims.granted.load(Relaxed),
        );
        counter("octobus_claims_refused_total", "Refused: another instance.", claims.refused.load(Relaxed));
        counter(
            "octobus_claims_fenced_total",
            "Sessions that a newer one ended.",
            claims.fenced.load(Relaxed),
        );
        counter(
            "octobus_claims_operations_total",
            "NATS operations that claims took: one for each connect, unless replicas race for a node.",
            claims.operations.load(Relaxed),
        );
        counter(
            "octobus_lease_lost_total",
            "Times that this replica let go of all its nodes, because it could not renew its lease.",
            claims.given_up.load(Relaxed),
        );
        counter("octobus_tier_repairs_total", "Buckets that were put back.", self.mirror.repairs());
        if let Some(live) = self.live.get() {
            let live = live.counters();
            counter("octobus_up_published_total", "Messages published for users.", live.up.load(Relaxed));
            counter("octobus_up_dropped_total", "Too large to publish.", live.up_dropped.load(Relaxed));
            counter("octobus_down_requests_total", "Requests to nodes.", live.requests.load(Relaxed));
            counter("octobus_down_offline_total", "Of those, to no node.", live.offline.load(Relaxed));
            counter("octobus_down_appended_total", "Messages kept for nodes.", live.appended.load(Relaxed));
            counter(
                "octobus_down_dropped_total",
                "Messages to nodes not kept.",
                live.down_dropped.load(Relaxed),
            );
        }
        let name = "octobus_nodes_owned";
        text.family(name, Kind::Gauge, "Nodes that this replica has.");
        text.sample(name, &[], self.claims.count() as u64);
        let name = "octobus_mirror_revision";
        text.family(name, Kind::Gauge, "How far this replica has read the tier's State.");
        for space in ["sys", "fleet"] {
            text.sample(name, &[("space", space)], self.mirror.reached(space).revision);
        }
    }
}
