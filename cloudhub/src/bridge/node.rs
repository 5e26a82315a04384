//! Node objects: what a node says of itself, and what the hub knows of it.
//!
//! | in the Node | comes from |
//! |---|---|
//! | capacity, allocatable, nodeInfo, images, conditions | the node's report; kept as they are while it is away |
//! | addresses | the hub's, as InternalIP or InternalDNS: there logs and exec are answered; the node's own as ExternalIP |
//! | condition `Linked` | its link |
//! | condition `Ready` | its report while it is linked. Away: `Unknown`, said by the bridge where no Leases are kept (the embedded API), else by the cluster's own controller |

use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

use serde_json::{Map, Value, json};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use super::json::{at, digest, list, text, version};

/// Every node of the tier has it; what the bridge watches by.
pub(super) const ROLE: &str = "node-role.kubernetes.io/edge";
/// Annotation: which tier the node is of. A Node without it is none of ours.
pub(super) const TIER: &str = "octobus.io/tier";
const LINKED: &str = "Linked";
/// Conditions that nobody can vouch for while a node is away.
const VOUCHED: [&str; 5] = ["Ready", "MemoryPressure", "DiskPressure", "PIDPressure", "NetworkUnavailable"];

/// What the hub adds to every node.
#[derive(Debug, Clone, Default)]
pub(super) struct Hub {
    /// Addresses at which the hub answers for its nodes.
    pub(super) addresses: Vec<String>,
    /// The port there.
    pub(super) port: Option<u16>,
    /// Readiness follows Leases, which the cluster's own controller looks at.
    pub(super) leases: bool,
}

/// A Node as the API has it: what is needed to see a difference.
#[derive(Debug, Clone)]
pub(super) struct Object {
    pub(super) uid: Arc<str>,
    pub(super) version: u64,
    /// It is of this tier.
    pub(super) ours: bool,
    /// Type, status and last transition of each condition.
    conditions: BTreeMap<String, (String, String)>,
    labels: BTreeMap<String, String>,
    status: u64,
    conditions_only: u64,
}

impl Object {
    pub(super) fn read(object: &Value, tier: &str) -> Self {
        let status = at(object, "status").unwrap_or(&Value::Null);
        let held = list(status, "conditions").iter().map(|condition| {
            let said = |field| text(condition, field).to_owned();
            (said("type"), (said("status"), said("lastTransitionTime")))
        });
        let labels = at(object, "metadata.labels").and_then(Value::as_object).into_iter().flatten();
        let labels =
            labels.map(|(name, value)| (name.clone(), value.as_str().unwrap_or_default().to_owned()));
        let notes = at(object, "metadata.annotations");
        Self {
            uid: text(object, "metadata.uid").into(),
            version: version(object),
            ours: notes.and_then(|notes| notes.get(TIER)).and_then(Value::as_str) == Some(tier),
            conditions: held.collect(),
            labels: labels.collect(),
            status: digest(&comparable(status, true)),
            conditions_only: digest(&comparable(status, false)),
        }
    }
}

/// What of a Node's status the bridge decides, all of it or what it decides of a node that is away.
fn comparable(status: &Value, whole: bool) -> Value {
    let mut shown = json!({});
    let fields = ["capacity", "allocatable", "nodeInfo", "images", "addresses", "daemonEndpoints"];
    for field in fields.into_iter().filter(|_| whole) {
        shown[field] = status.get(field).cloned().unwrap_or_default();
    }
    let conditions = list(status, "conditions").iter();
    let conditions = conditions.filter(|held| whole || text(held, "type") == LINKED);
    let mut conditions: Vec<Value> = conditions.cloned().collect();
    for condition in &mut conditions {
        // A heartbeat is no news; when it turned follows from what it turned to.
        super::json::remove(condition, "", "lastHeartbeatTime");
        super::json::remove(condition, "", "lastTransitionTime");
    }
    conditions.sort_by(|a, b| text(a, "type").cmp(text(b, "type")));
    shown["conditions"] = conditions.into();
    shown
}

/// How a node is linked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Link {
    /// By this transport, or through a relay.
    Up(&'static str),
    Down,
}

/// What a node's object should be.
#[derive(Debug)]
pub(super) struct Desired {
    status: Value,
    labels: Map<String, Value>,
    /// Without the report of a node that is away, where others say that it is away: only its link.
    whole: bool,
}

/// The Node of a node that has none yet. Its status follows.
pub(super) fn new(name: &str, tier: &str, labels: &Map<String, Value>) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name, "labels": labels, "annotations": {TIER: tier}},
    })
}

/// What a node's object should be, by its report, its link and what is held.
pub(super) fn desired(
    name: &str,
    report: Option<&Value>,
    link: &Link,
    hub: &Hub,
    held: Option<&Object>,
    now: &str,
) -> Desired {
    let absent = Value::Null;
    let report = report.unwrap_or(&absent);
    let mut status =
        at(report, "status").filter(|status| status.is_object()).cloned().unwrap_or_else(|| json!({}));
    let mut conditions: Vec<Value> =
        list(&status, "conditions").iter().filter(|held| is_condition(held)).cloned().collect();
    let away = *link == Link::Down;
    if !conditions.iter().any(|held| text(held, "type") == "Ready") {
        conditions.push(json!({"type": "Ready", "status": "False", "reason": "NodeStatusNeverUpdated",
            "message": "The node has not reported that it runs pods."}));
    }
    if away {
        for condition in &mut conditions {
            if VOUCHED.contains(&text(condition, "type")) {
                condition["status"] = "Unknown".into();
                condition["reason"] = "NodeStatusUnknown".into();
                condition["message"] = "The node's link is down.".into();
                super::json::remove(condition, "", "lastTransitionTime");
            }
        }
    }
    conditions.push(match link {
        Link::Up(kind) => json!({"type": LINKED, "status": "True", "reason": kind,
            "message": "The node is linked to its hub."}),
        Link::Down => json!({"type": LINKED, "status": "False", "reason": "LinkDown",
            "message": "The node is not linked; what runs there goes on."}),
    });
    for condition in &mut conditions {
        let ty = text(condition, "type").to_owned();
        let turned = held.and_then(|held| held.conditions.get(&ty));
        let since = turned.filter(|(status, _)| status == text(condition, "status")).map(|(_, since)| since);
        if let Some(since) = since.filter(|since| !since.is_empty()) {
            condition["lastTransitionTime"] = since.as_str().into();
        } else if condition.get("lastTransitionTime").is_none() {
            condition["lastTransitionTime"] = now.into();
        }
    }
    status["conditions"] = conditions.into();
    status["addresses"] = addresses(name, report, hub);
    if let Some(port) = hub.port {
        status["daemonEndpoints"] = json!({"kubeletEndpoint": {"Port": port}});
    }
    Desired { labels: labels(name, report), status, whole: !(away && hub.leases) }
}

/// What a node may say; whatever else stands in its list is none.
fn is_condition(said: &Value) -> bool {
    said.is_object() && ![LINKED, ""].contains(&text(said, "type"))
}

/// Labels that every node has, and those that it says itself.
pub(super) fn labels(name: &str, report: &Value) -> Map<String, Value> {
    let mut labels = Map::new();
    let said = at(report, "labels").and_then(Value::as_object).into_iter().flatten();
    labels.extend(
        said.filter(|(_, value)| value.is_string()).map(|(name, value)| (name.clone(), value.clone())),
    );
    labels.insert(ROLE.to_owned(), "".into());
    labels.insert("kubernetes.io/hostname".to_owned(), name.into());
    for (label, field) in [
        ("kubernetes.io/os", "status.nodeInfo.operatingSystem"),
        ("kubernetes.io/arch", "status.nodeInfo.architecture"),
    ] {
        let value = text(report, field);
        if !value.is_empty() {
            labels.insert(label.to_owned(), value.into());
        }
    }
    labels
}

fn addresses(name: &str, report: &Value, hub: &Hub) -> Value {
    let mut addresses = Vec::new();
    for address in &hub.addresses {
        let ty = if address.parse::<IpAddr>().is_ok() { "InternalIP" } else { "InternalDNS" };
        addresses.push(json!({"type": ty, "address": address}));
    }
    let own = list(report, "addresses").iter().filter_map(Value::as_str);
    addresses.extend(own.map(|address| json!({"type": "ExternalIP", "address": address})));
    addresses.push(json!({"type": "Hostname", "address": name}));
    addresses.into()
}

impl Desired {
    /// Labels that the object lacks or has otherwise.
    pub(super) fn labels_lacking(&self, held: &Object) -> Option<Value> {
        let lacking = self
            .labels
            .iter()
            .filter(|(name, value)| held.labels.get(*name).map(String::as_str) != value.as_str());
        let lacking: Map<String, Value> =
            lacking.map(|(name, value)| (name.clone(), value.clone())).collect();
        (!lacking.is_empty()).then(|| json!({"metadata": {"uid": &*held.uid, "labels": lacking}}))
    }

    /// To compare with what was written before.
    pub(super) fn digest(&self) -> u64 {
        digest(&comparable(&self.status, self.whole))
    }

    /// Whether the object's status is not this.
    pub(super) fn differs(&self, held: &Object) -> bool {
        self.digest() != self.shown(held)
    }

    /// The same of what is held.
    pub(super) fn shown(&self, held: &Object) -> u64 {
        if self.whole { held.status } else { held.conditions_only }
    }

    /// The strategic merge patch of the status.
    pub(super) fn patch(&self, uid: &str) -> Value {
        let conditions = list(&self.status, "conditions").iter();
        let conditions: Vec<Value> =
            conditions.filter(|held| self.whole || text(held, "type") == LINKED).cloned().collect();
        let mut status = if self.whole { self.status.clone() } else { json!({}) };
        status["conditions"] = conditions.into();
        for field in ["capacity", "allocatable"] {
            if let Some(map) = status.get_mut(field).and_then(Value::as_object_mut) {
                map.insert("$patch".to_owned(), "replace".into());
            }
        }
        if let Some(addresses) = status.get_mut("addresses").and_then(Value::as_array_mut) {
            addresses.insert(0, json!({"$patch": "replace"}));
        }
        json!({"metadata": {"uid": uid}, "status": status})
    }
}

/// The wall clock as Kubernetes writes it.
pub(super) fn now() -> String {
    written(broker::clock::wall_us() / 1_000_000)
}

/// A time in seconds since 1970 as Kubernetes writes it.
pub(super) fn written(seconds: u64) -> String {
    let at = OffsetDateTime::from_unix_timestamp(i64::try_from(seconds).unwrap_or(i64::MAX));
    let at = at.unwrap_or(OffsetDateTime::UNIX_EPOCH);
    at.format(&Rfc3339).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Value {
        json!({"labels": {"zone": "a"}, "addresses": ["192.168.1.7"], "status": {
            "capacity": {"cpu": "2"}, "nodeInfo": {"operatingSystem": "linux", "architecture": "arm64"},
            "conditions": [{"type": "Ready", "status": "True", "reason": "KubeletReady"}, {"type": "ClockTrusted", "status": "True"}]}})
    }

    fn hub(leases: bool) -> Hub {
        Hub { addresses: vec!["10.0.0.5".to_owned(), "hub.example".to_owned()], port: Some(10250), leases }
    }

    fn condition<'a>(status: &'a Value, ty: &str) -> &'a Value {
        list(status, "conditions").iter().find(|held| text(held, "type") == ty).unwrap()
    }

    #[test]
    fn a_report_that_is_none_makes_a_node_that_is_not_ready_and_harms_nobody() {
        let odd = [
            json!(7),
            json!({"status": [1]}),
            json!({"status": {"conditions": ["x", 7, {}], "addresses": 3}, "labels": 1}),
        ];
        for report in odd {
            let desired = desired("edge-1", Some(&report), &Link::Up("QUIC"), &hub(false), None, "now");
            assert_eq!(condition(&desired.status, "Ready")["status"], "False", "{report}");
            desired.patch("u1");
        }
    }

    #[test]
    fn the_hubs_addresses_are_internal_and_the_nodes_own_are_external() {
        let desired = desired("edge-1", Some(&report()), &Link::Up("QUIC"), &hub(false), None, "now");
        let shown: Vec<(&str, &str)> = list(&desired.status, "addresses")
            .iter()
            .map(|address| (text(address, "type"), text(address, "address")))
            .collect();
        let expected = [
            ("InternalIP", "10.0.0.5"),
            ("InternalDNS", "hub.example"),
            ("ExternalIP", "192.168.1.7"),
            ("Hostname", "edge-1"),
        ];
        assert_eq!(shown, expected);
        assert_eq!(desired.labels["kubernetes.io/arch"], "arm64");
        assert_eq!(desired.labels["zone"], "a");
        assert_eq!(desired.labels[ROLE], "");
    }

    #[test]
    fn with_no_leases_the_bridge_says_itself_that_a_node_is_away() {
        let away = desired("edge-1", Some(&report()), &Link::Down, &hub(false), None, "now");
        assert_eq!(condition(&away.status, "Ready")["status"], "Unknown");
        assert_eq!(condition(&away.status, "ClockTrusted")["status"], "True", "it is the node's own matter");
        assert_eq!(condition(&away.status, LINKED)["status"], "False");
    }

    #[test]
    fn with_leases_only_the_link_of_a_node_that_is_away_is_written() {
        let away = desired("edge-1", Some(&report()), &Link::Down, &hub(true), None, "now");
        let patch = away.patch("u1");
        assert_eq!(list(&patch, "status.conditions").len(), 1);
        assert_eq!(patch["status"]["capacity"], Value::Null);
        // Whatever the cluster's controller says of Ready by then is its own.
        let held = json!({"metadata": {"uid": "u1"}, "status": {"conditions": [
            {"type": "Ready", "status": "Unknown", "reason": "x"}, condition(&away.status, LINKED)]}});
        assert!(!away.differs(&Object::read(&held, "t")));
    }

    #[test]
    fn a_heartbeat_alone_is_no_difference_and_a_condition_keeps_when_it_turned() {
        let up = Link::Up("QUIC");
        let first = desired("edge-1", Some(&report()), &up, &hub(false), None, "2026-01-01T00:00:00Z");
        let mut status = first.status;
        status["conditions"][0]["lastHeartbeatTime"] = "2026-01-01T00:05:00Z".into();
        let held = Object::read(&json!({"metadata": {"uid": "u1"}, "status": status}), "t");
        let later = desired("edge-1", Some(&report()), &up, &hub(false), Some(&held), "2026-01-01T00:10:00Z");
        assert!(!later.differs(&held));
        assert_eq!(condition(&later.status, "Ready")["lastTransitionTime"], "2026-01-01T00:00:00Z");
        let away =
            desired("edge-1", Some(&report()), &Link::Down, &hub(false), Some(&held), "2026-01-01T00:10:00Z");
        assert!(away.differs(&held));
        assert_eq!(condition(&away.status, "Ready")["lastTransitionTime"], "2026-01-01T00:10:00Z");
    }
}
