//! Leases of nodes on a real cluster: its controllers take a node whose Lease is not renewed for 40 s for gone.
//!
//! Each linked node's Lease is renewed once in [`PERIOD`], at a moment that follows from its name, so that the
//! API server sees the same few renewals each second however many nodes link at once. A node that comes back
//! does not wait for its moment, but such first renewals are spread too.

use std::{
    collections::HashMap,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    sync::Arc,
    time::Duration,
};

use serde_json::json;
use time::OffsetDateTime;
use tokio::time::Instant;

use super::{
    Bridge, Outcome,
    cluster::{CallError, Cluster},
    node::Link,
    work::Task,
};

/// Between two renewals of one Lease.
const PERIOD: Duration = Duration::from_secs(30);
/// What a Lease says: after this long without a renewal its node is not well.
const LEASE_SECONDS: u64 = 40;
/// Between two first renewals.
const FIRST_EVERY: Duration = Duration::from_millis(5);

/// When each node's Lease is renewed.
#[derive(Debug)]
pub(super) struct Leases {
    begun: Instant,
    renewed: HashMap<Arc<str>, Instant>,
    /// When the next first renewal may be.
    first: Instant,
}

impl Leases {
    pub(super) fn new() -> Self {
        Self { begun: Instant::now(), renewed: HashMap::new(), first: Instant::now() }
    }

    /// When a node that has just linked is due.
    pub(super) fn on_linked(&mut self, node: &Arc<str>) -> Instant {
        let now = Instant::now();
        let fresh = self.renewed.get(node).is_some_and(|renewed| renewed.elapsed() < PERIOD);
        if fresh {
            return self.moment_after(node, now);
        }
        self.first = self.first.max(now) + FIRST_EVERY;
        self.first
    }

    /// When a node whose Lease has just been renewed is due again.
    pub(super) fn on_renewed(&mut self, node: &Arc<str>) -> Instant {
        let now = Instant::now();
        self.renewed.insert(Arc::clone(node), now);
        // What was done a little before its moment is not done again at it.
        self.moment_after(node, now + PERIOD / 10)
    }

    pub(super) fn forget(&mut self, node: &str) {
        self.renewed.remove(node);
    }

    fn moment_after(&self, node: &Arc<str>, after: Instant) -> Instant {
        let mut hasher = DefaultHasher::new();
        node.hash(&mut hasher);
        let period = u64::try_from(PERIOD.as_millis()).expect("half a minute");
        let share = Duration::from_millis(hasher.finish() % period);
        // The first moment is within the first period, not after it.
        let rounds = after.checked_duration_since(self.begun + share).map_or(0, |since| {
            u32::try_from(since.as_millis() / PERIOD.as_millis()).unwrap_or(u32::MAX - 1) + 1
        });
        self.begun + share + PERIOD * rounds
    }
}

impl Bridge {
    pub(super) fn begin_lease(&mut self, task: Task, name: &Arc<str>) {
        let Some(node) = self.nodes.get(name) else { return };
        let (true, Some(object)) = (matches!(node.link, Link::Up(_)), &node.object) else { return };
        let (cluster, name, uid) = (self.cluster.clone(), Arc::clone(name), Arc::clone(&object.uid));
        self.swift
            .start(task, async move { Outcome::Object(renew(&cluster, &name, &uid).await.map(|()| None)) });
    }
}

async fn renew(cluster: &Cluster, node: &str, uid: &str) -> Result<(), CallError> {
    let all = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases";
    let spec = json!({"holderIdentity": node, "leaseDurationSeconds": LEASE_SECONDS, "renewTime": micros()});
    match cluster.renew(&format!("{all}/{node}"), &json!({"spec": spec})).await {
        Err(error) if error.is(404) => {
            let owner = json!({"apiVersion": "v1", "kind": "Node", "name": node, "uid": uid});
            let lease = json!({"apiVersion": "coordination.k8s.io/v1", "kind": "Lease",
                "metadata": {"name": node, "ownerReferences": [owner]}, "spec": spec});
            cluster.create("leases", all, &lease).await.map(drop)
        }
        other => other.map(drop),
    }
}

/// The wall clock as a MicroTime.
fn micros() -> String {
    let nanos = i128::from(broker::clock::wall_us()) * 1_000;
    let at = OffsetDateTime::from_unix_timestamp_nanos(nanos).unwrap_or(OffsetDateTime::UNIX_EPOCH);
    let (date, time) = (at.date(), at.time());
    format!(
        "{:04}-{:02}-{:02}T{:02}:{:02}:{:02}.{:06}Z",
        date.year(),
        u8::from(date.month()),
        date.day(),
        time.hour(),
        time.minute(),
        time.second(),
        time.microsecond()
    )
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::{
        super::work::{Next, Work},
        *,
    };

    #[tokio::test(start_paused = true)]
    async fn three_thousand_nodes_that_link_at_once_are_renewed_evenly_and_once_in_thirty_seconds() {
        let begun = Instant::now();
        let mut leases = Leases::new();
        let mut work = Work::<()>::new();
        for node in 0..3_000 {
            let node: Arc<str> = format!("edge-{node}").into();
            work.put_at(Task::Lease(Arc::clone(&node)), leases.on_linked(&node));
        }
        let (mut seconds, mut times) =
            (BTreeMap::<u64, u32>::new(), HashMap::<Arc<str>, Vec<Instant>>::new());
        while begun.elapsed() < Duration::from_secs(300) {
            match work.next().await {
                Next::Due(task) => work.start(task, tokio::time::sleep(Duration::from_millis(5))),
                Next::Done(Task::Lease(node), ()) => {
                    *seconds.entry(begun.elapsed().as_secs()).or_default() += 1;
                    times.entry(Arc::clone(&node)).or_default().push(Instant::now());
                    work.put_at(Task::Lease(Arc::clone(&node)), leases.on_renewed(&node));
                }
                Next::Done(..) => unreachable!("leases alone are put"),
            }
        }
        assert!(seconds.range(..20).all(|(_, count)| *count <= 350), "{seconds:?}");
        assert!(seconds.range(60..300).all(|(_, count)| (50..=160).contains(count)), "{seconds:?}");
        let total: u32 = seconds.range(60..300).map(|(_, count)| count).sum();
        assert!((23_500..=24_100).contains(&total), "once in 30 s each: {total}");
        for (node, times) in times {
            let longest = times.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap();
            assert!(longest < Duration::from_secs(LEASE_SECONDS), "{node} waits {longest:?}");
        }
    }
}
