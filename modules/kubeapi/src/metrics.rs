//! `metrics.k8s.io`: what nodes and pods use, asked of the nodes when somebody asks.
//!
//! A node's `/stats/summary` is read over a Stream, kept for [`FRESH`], and read once however many ask meanwhile. Nobody
//! asks, nothing is read. A node that does not answer is left out: a list shows what is known now.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex},
    time::Duration,
};

use serde_json::{Value, json as value};
use tokio::{
    sync::Semaphore,
    task::JoinSet,
    time::{Instant, timeout, timeout_at},
};

use crate::{
    api::{
        Api, Ask, Done,
        list::{List, Query},
    },
    clock, json,
    nodes::forward::Forwarder,
    registry::built_in_resource,
    status::Status,
};

/// API group.
pub(crate) const GROUP: &str = "metrics.k8s.io";

/// A measurement answers everybody who asks within this.
const FRESH: Duration = Duration::from_secs(10);
/// A measurement that nobody asked for again is forgotten after this.
const KEPT: Duration = Duration::from_secs(300);
/// How long a node may take to answer.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);
/// How long a list may take: whoever has not answered by then is left out.
const LIST_WITHIN: Duration = Duration::from_secs(15);
/// Nodes that are asked at a time.
const ASKED_AT_ONCE: usize = 32;
/// Largest answer of a node.
const SUMMARY_MAX: usize = 2 << 20;

/// What nodes said last.
#[derive(Debug)]
pub(crate) struct Metrics {
    forwarder: Forwarder,
    places: Arc<Semaphore>,
    nodes: Mutex<BTreeMap<String, Slot>>,
}

/// What one node said. Locked while it is asked: whoever else wants to know waits for that answer.
type Slot = Arc<tokio::sync::Mutex<Asked>>;

#[derive(Debug, Default)]
struct Asked {
    at: Option<Instant>,
    /// `None`: it did not answer.
    said: Option<Arc<Summary>>,
}

/// What a node and its containers use.
#[derive(Debug, Default, PartialEq)]
struct Summary {
    time: String,
    node: Counted,
    pods: BTreeMap<(String, String), Pod>,
}

#[derive(Debug, Default, PartialEq)]
struct Pod {
    uid: String,
    containers: BTreeMap<String, Counted>,
}

/// CPU and memory of one thing.
#[derive(Debug, Default, Clone, PartialEq)]
struct Counted {
    /// When, in nanoseconds since 1970; 0 if it was not said.
    at_ns: i128,
    /// CPU time since the beginning.
    core_ns: Option<u64>,
    /// Billionths of a processor now.
    nano_cores: Option<u64>,
    /// Bytes that cannot be given back.
    memory: Option<u64>,
}

impl Metrics {
    pub(crate) fn new(forwarder: Forwarder) -> Self {
        let places = Arc::new(Semaphore::new(ASKED_AT_ONCE));
        Self { forwarder, places, nodes: Mutex::default() }
    }

    /// One node or pod.
    pub(crate) async fn get(self: &Arc<Self>, api: &Api, ask: &Ask) -> Result<Done, Status> {
        let found = api.cache.get(built_in_resource("", &ask.resource.plural), &ask.namespace, &ask.name);
        let measured = self.measured(ask, found.as_slice()).await;
        measured.into_iter().next().map(Done::ok).ok_or_else(|| ask.not_found())
    }

    /// Those of them that answer.
    pub(crate) async fn list(self: &Arc<Self>, api: &Api, ask: &Ask, query: &Query) -> List {
        let mut all = api.cache.list(built_in_resource("", &ask.resource.plural), &ask.namespace);
        all.retain(|object| query.labels.select(object) && query.fields.select(object));
        List { items: self.measured(ask, &all).await, revision: api.cache.revision(), next: None }
    }

    /// What is known of these nodes or pods, in their order.
    async fn measured(self: &Arc<Self>, ask: &Ask, objects: &[Arc<Value>]) -> Vec<Value> {
        let of_nodes = ask.resource.plural == "nodes";
        let node_of = |object: &Value| {
            json::text(object, if of_nodes { "metadata.name" } else { "spec.nodeName" }).to_owned()
        };
        let nodes = objects.iter().map(|object| node_of(object)).filter(|node| !node.is_empty());
        let summaries = self.summaries(nodes.collect()).await;
        let shown = objects.iter().filter_map(|object| {
            let summary = summaries.get(&node_of(object))?;
            let mut measured = if of_nodes { of_node(summary)? } else { of_pod(summary, object)? };
            json::set(&mut measured, "apiVersion", ask.resource.api_version());
            json::set(&mut measured, "kind", ask.resource.kind.clone());
            json::set(&mut measured, "timestamp", summary.time.clone());
            json::set(&mut measured, "window", format!("{}s", FRESH.as_secs()));
            for name in ["name", "namespace", "labels"] {
                let path = format!("metadata.{name}");
                if let Some(held) = json::at(object, &path) {
                    json::set(&mut measured, &path, held.clone());
                }
            }
            json::set(&mut measured, "metadata.creationTimestamp", clock::now());
            Some(measured)
        });
        shown.collect()
    }

    /// What nodes say, those that answer in time.
    async fn summaries(self: &Arc<Self>, nodes: BTreeSet<String>) -> BTreeMap<String, Arc<Summary>> {
        let deadline = Instant::now() + LIST_WITHIN;
        self.forget();
        let mut asking = JoinSet::new();
        for node in nodes {
            let metrics = Arc::clone(self);
            asking.spawn(async move {
                let _place = metrics.places.acquire().await.ok()?;
                let said = metrics.ask(&node).await?;
                Some((node, said))
            });
        }
        let mut summaries = BTreeMap::new();
        while let Ok(Some(asked)) = timeout_at(deadline, asking.join_next()).await {
            summaries.extend(asked.ok().flatten());
        }
        summaries
    }

    async fn ask(&self, node: &str) -> Option<Arc<Summary>> {
        let slot = {
            let mut nodes = self.nodes.lock().expect("no panic under this lock");
            Arc::clone(nodes.entry(node.to_owned()).or_default())
        };
        let mut held = slot.lock().await;
        if held.at.is_some_and(|at| at.elapsed() < FRESH) {
            return held.said.clone();
        }
        let reading = self.forwarder.read(node, "/stats/summary", SUMMARY_MAX);
        let said = match timeout(ANSWER_WITHIN, reading).await {
            Ok(Ok(bytes)) => json::read(&bytes).ok().map(|said| summary(&said, held.said.as_deref())),
            Ok(Err(error)) => {
                tracing::debug!(%error, "no metrics of a node");
                None
            }
            Err(_elapsed) => None,
        };
        *held = Asked { at: Some(Instant::now()), said: said.map(Arc::new) };
        held.said.clone()
    }

    /// Lets go of what nobody asked for of late.
    fn forget(&self) {
        let mut nodes = self.nodes.lock().expect("no panic under this lock");
        nodes.retain(|_, slot| {
            slot.try_lock().map_or(true, |held| held.at.is_some_and(|at| at.elapsed() < KEPT))
        });
    }
}

/// Reads what a node says. What it does not say itself of its processors follows from what it said before.
fn summary(said: &Value, before: Option<&Summary>) -> Summary {
    let node = said.get("node").unwrap_or(&Value::Null);
    let pods = json::list(said, "pods").iter().map(|pod| {
        let text = |path| json::text(pod, path).to_owned();
        let key = (text("podRef.namespace"), text("podRef.name"));
        let uid = text("podRef.uid");
        let old = before.and_then(|before| before.pods.get(&key)).filter(|old| old.uid == uid);
        let containers = json::list(pod, "containers").iter().map(|container| {
            let name = json::text(container, "name").to_owned();
            let old = old.and_then(|old| old.containers.get(&name));
            (name, counted(container, old))
        });
        (key, Pod { uid, containers: containers.collect() })
    });
    let time = json::text(node, "cpu.time");
    Summary {
        time: clock::normalized(time, false).unwrap_or_else(clock::now),
        node: counted(node, before.map(|before| &before.node)),
        pods: pods.collect(),
    }
}

fn counted(said: &Value, before: Option<&Counted>) -> Counted {
    let number = |path| json::at(said, path).and_then(Value::as_u64);
    let core_ns = number("cpu.usageCoreNanoSeconds");
    let at_ns = clock::nanos(json::text(said, "cpu.time")).unwrap_or(0);
    let since = || {
        let before = before?;
        let (passed, used) = (at_ns - before.at_ns, core_ns?.checked_sub(before.core_ns?)?);
        let rate = i128::from(used).checked_mul(1_000_000_000)?.checked_div(passed)?;
        (passed > 0 && before.at_ns > 0).then(|| u64::try_from(rate).unwrap_or(u64::MAX))
    };
    Counted {
        at_ns,
        core_ns,
        nano_cores: number("cpu.usageNanoCores").or_else(since),
        memory: number("memory.workingSetBytes"),
    }
}

fn usage(counted: &Counted) -> Option<Value> {
    let (cores, memory) = (counted.nano_cores?, counted.memory?);
    Some(value!({"cpu": format!("{cores}n"), "memory": format!("{}Ki", memory / 1024)}))
}

fn of_node(summary: &Summary) -> Option<Value> {
    Some(value!({"usage": usage(&summary.node)?}))
}

/// Of a pod all containers or nothing: a sum of some is no sum.
fn of_pod(summary: &Summary, pod: &Value) -> Option<Value> {
    let key = (json::text(pod, "metadata.namespace").to_owned(), json::text(pod, "metadata.name").to_owned());
    let measured = summary.pods.get(&key)?;
    let uid = json::text(pod, "metadata.uid");
    let mirror = json::map(pod, "metadata.annotations")
        .is_some_and(|held| held.contains_key("kubernetes.io/config.mirror"));
    if !mirror && !measured.uid.is_empty() && measured.uid != uid {
        return None;
    }
    let containers: Option<Vec<Value>> = measured
        .containers
        .iter()
        .map(|(name, counted)| Some(value!({"name": name, "usage": usage(counted)?})))
        .collect();
    Some(value!({"containers": containers.filter(|all| !all.is_empty())?}))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(second: u32, core_ns: u64, nano_cores: Option<u64>) -> Value {
        let mut cpu =
            value!({"time": format!("2026-01-02T03:04:{second:02}.5Z"), "usageCoreNanoSeconds": core_ns});
        if let Some(cores) = nano_cores {
            cpu["usageNanoCores"] = value!(cores);
        }
        let part = value!({"cpu": cpu, "memory": {"workingSetBytes": 3 << 20}});
        let mut container = part.clone();
        container["name"] = value!("c");
        let pod = value!({"podRef": {"namespace": "fx", "name": "p", "uid": "u"}, "containers": [container]});
        value!({"node": part, "pods": [pod]})
    }

    #[test]
    fn processors_are_measured_by_the_node_or_between_two_answers_of_it() {
        let first = summary(&said(0, 1_000_000_000, None), None);
        assert_eq!(of_node(&first), None, "one look at a counter says nothing");
        let second = summary(&said(10, 2_000_000_000, None), Some(&first));
        assert_eq!(of_node(&second), Some(value!({"usage": {"cpu": "100000000n", "memory": "3072Ki"}})));
        let own = summary(&said(0, 5, Some(7)), None);
        assert_eq!(of_node(&own).unwrap()["usage"]["cpu"], "7n");
        let restarted = summary(&said(20, 5, None), Some(&second));
        assert_eq!(of_node(&restarted), None, "its counter began anew");
    }

    #[test]
    fn a_pod_is_measured_whole_and_not_in_the_place_of_another_of_its_name() {
        let summary = summary(&said(0, 5, Some(7)), None);
        let pod = |uid: &str| value!({"metadata": {"namespace": "fx", "name": "p", "uid": uid}});
        let shown = of_pod(&summary, &pod("u")).unwrap();
        assert_eq!(
            shown,
            value!({"containers": [{"name": "c", "usage": {"cpu": "7n", "memory": "3072Ki"}}]})
        );
        assert_eq!(of_pod(&summary, &pod("v")), None);
    }
}
