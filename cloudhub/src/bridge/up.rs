//! From nodes to the API server.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use broker::event::{Command, Response};
use serde_json::{Value, json};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{
    Bridge, Input, Node, Outcome, Report,
    cluster::{CallError, STRATEGIC},
    fixed,
    json::{digest, text, version},
    node::{self, Link},
    pod,
    source::{self, Said},
    watch::Watched,
    work::{Task, Work},
};

/// Keys of enrolments in `sys`.
pub(super) const IDENTITY: &str = "identity/";
/// Where a node says what it is.
const NODE: &str = "node";
const POD: &str = "pod/";
/// A link may come back at once, after a restart of either side: so long nobody is told.
const DOWN_AFTER: Duration = Duration::from_secs(10);

impl Bridge {
    pub(super) fn on_enrolled(&mut self, said: Option<Said>) {
        let Some(said) = said else {
            self.enrolled = true;
            self.look_at_all_nodes();
            return;
        };
        let Some(name) = said.key.strip_prefix(IDENTITY) else { return };
        let name: Arc<str> = name.into();
        let linked = self.linked.get(&name).copied();
        let node = self.nodes.entry(Arc::clone(&name)).or_insert_with(not_enrolled);
        match (said.value.is_some(), node.enrolled) {
            (true, false) => {
                node.enrolled = true;
                node.link = linked.map_or(Link::Down, Link::Up);
                node.gone = CancellationToken::new();
                if linked.is_some() && self.hub.leases {
                    let at = self.leases.on_linked(&name);
                    self.swift.put_at(Task::Lease(Arc::clone(&name)), at);
                }
                if let Some(out) = self.inputs.clone() {
                    let (broker, gone) = (self.broker.clone(), node.gone.clone());
                    let origin = Arc::clone(&name);
                    let say = {
                        let origin = Arc::clone(&name);
                        move |said| Input::Reported(Arc::clone(&origin), said)
                    };
                    self.tasks.spawn("reports of a node for the bridge", async move {
                        tokio::select! {
                            biased;
                            () = gone.cancelled() => {}
                            () = source::follow_state(broker, origin, "status", "", out, say) => {}
                        }
                    });
                }
                if self.listed.contains(&Watched::Pods) {
                    self.swift.put(Task::Pods(Arc::clone(&name)));
                }
            }
            (false, true) => {
                node.enrolled = false;
                node.gone.cancel();
                for key in self.pods_of.get(&name).cloned().unwrap_or_default() {
                    self.forget_pod(&key);
                }
                self.unused.insert(super::down::node_key(&name));
                self.leases.forget(&name);
                self.swift.drop_due(&Task::Lease(Arc::clone(&name)));
            }
            _ => return,
        }
        self.dirty.insert(Arc::clone(&name));
        self.look_at_node(&name);
    }

    pub(super) fn on_linked(&mut self, linked: BTreeMap<Arc<str>, &'static str>) {
        let before = std::mem::replace(&mut self.linked, linked);
        let changed = |name: &&Arc<str>| before.get(*name) != self.linked.get(*name);
        let names: Vec<Arc<str>> = before.keys().chain(self.linked.keys()).filter(changed).cloned().collect();
        for name in names {
            let Some(node) = self.nodes.get_mut(&name) else { continue };
            let task = Task::Node(Arc::clone(&name));
            match self.linked.get(&name) {
                Some(kind) => {
                    node.link = Link::Up(kind);
                    self.work.put(task);
                    if self.hub.leases {
                        let at = self.leases.on_linked(&name);
                        self.swift.put_at(Task::Lease(Arc::clone(&name)), at);
                    }
                }
                None => {
                    node.link = Link::Down;
                    node.down_since = Instant::now();
                    self.work.put_at(task, Instant::now() + DOWN_AFTER);
                    self.swift.drop_due(&Task::Lease(Arc::clone(&name)));
                }
            }
            self.apply_policies_of(&name);
        }
    }

    pub(super) fn on_report(&mut self, name: &Arc<str>, said: Said) {
        if said.key == NODE {
            return self.look_at_node(name);
        }
        if let Some(place) = said.key.strip_prefix(fixed::STATIC) {
            return self.on_static(name, place, said.value.is_some());
        }
        let Some(place) = said.key.strip_prefix(POD) else { return };
        let Some((namespace, pod)) = place.split_once('/') else { return };
        let key = pod::key_of("pods", namespace, pod);
        let Some(value) = said.value else {
            if self.reports.get(&key).is_some_and(|report| report.node == *name) {
                self.reports.remove(&key);
            }
            return;
        };
        let Ok(value) = serde_json::from_slice::<Value>(&value) else { return };
        let uid: Arc<str> = text(&value, "uid").into();
        // Another node may have had a pod of this name before: what says something of the pod that there is counts.
        let other = self.reports.get(&key).is_some_and(|held| {
            held.node != *name && self.pods.get(&key).is_some_and(|pod| pod.node == held.node)
        });
        if other {
            return;
        }
        let same = |held: &Report| held.uid == uid && held.node == *name;
        let written = self.reports.get(&key).filter(|held| same(held)).and_then(|held| held.written);
        let status = digest(&pod::said_by_node(value.get("status").unwrap_or(&Value::Null)));
        let finished = value.get("finished").and_then(Value::as_bool).unwrap_or(false);
        self.reports
            .insert(Arc::clone(&key), Report { node: Arc::clone(name), uid, status, finished, written });
        self.compare(&key);
    }

    /// Whether a pod's node says anything of it that the API does not.
    pub(super) fn compare(&mut self, key: &Arc<str>) {
        let (Some(pod), Some(report)) = (self.pods.get(key), self.reports.get(key)) else { return };
        if report.node != pod.node || !pod.is(&report.uid) {
            return;
        }
        // As the API shows it, what was written may read otherwise for ever.
        let shown = report.written == Some((report.status, pod.status));
        if report.status != pod.status && !shown {
            self.work.put(Task::Status(Arc::clone(key)));
        } else if pod.ending && report.finished {
            self.work.put(Task::Delete(Arc::clone(key)));
        }
    }

    pub(super) fn look_at_node(&mut self, name: &str) {
        if self.enrolled && self.listed.contains(&Watched::Nodes) {
            self.work.put(Task::Node(name.into()));
        }
    }

    pub(super) fn look_at_all_nodes(&mut self) {
        for name in self.nodes.keys().cloned().collect::<Vec<_>>() {
            self.look_at_node(&name);
        }
    }

    /// Starts what is due, unless there is nothing to do any more.
    pub(super) fn begin(&mut self, task: Task) {
        match &task {
            Task::Node(name) => {
                let name = Arc::clone(name);
                self.begin_node(task, &name);
            }
            Task::Fetch(key) => {
                let (cluster, path) = (self.cluster.clone(), path_of(key));
                let resource = match key.split('/').nth(2) {
                    Some("secrets") => "secrets",
                    Some("configmaps") => "configmaps",
                    _ => "serviceaccounts",
                };
                self.swift.start(task, async move { Outcome::Object(cluster.get(resource, &path).await) });
            }
            Task::Pods(name) => {
                let cluster = self.cluster.clone();
                let path = format!("/api/v1/pods?fieldSelector=spec.nodeName%3D{name}");
                self.swift.start(task, async move {
                    Outcome::Object(cluster.list("pods", &path, false).await.map(Some))
                });
            }
            Task::Token(key) => {
                let key = Arc::clone(key);
                self.request_token(task, &key);
            }
            Task::Status(key) => {
                let key = Arc::clone(key);
                self.begin_status(task, &key);
            }
            Task::Delete(key) => {
                let Some(pod) = self.pods.get(key).filter(|pod| pod.ending) else { return };
                let options = json!({"kind": "DeleteOptions", "apiVersion": "v1", "gracePeriodSeconds": 0,
                    "preconditions": {"uid": &*pod.uid}});
                let (cluster, path) = (self.cluster.clone(), path_of(key));
                self.work.start(task, async move {
                    Outcome::Object(cluster.delete("pods", &path, &options).await.map(|()| None))
                });
            }
            Task::Tolerate(key) => {
                let key = Arc::clone(key);
                self.begin_tolerate(task, &key);
            }
            Task::Evict(key) => {
                let key = Arc::clone(key);
                self.begin_evict(task, &key);
            }
            Task::Static(key) => {
                let key = Arc::clone(key);
                self.begin_static(task, &key);
            }
            Task::Lease(name) => {
                let name = Arc::clone(name);
                self.begin_lease(task, &name);
            }
            Task::Event(id) => {
                let id = *id;
                self.begin_event(task, id);
            }
        }
    }

    fn begin_status(&mut self, task: Task, key: &Arc<str>) {
        let (Some(pod), Some(report)) = (self.pods.get(key), self.reports.get(key)) else { return };
        if report.node != pod.node || !pod.is(&report.uid) || report.status == pod.status {
            return;
        }
        let (cluster, broker, path) = (self.cluster.clone(), self.broker.clone(), path_of(key));
        let (origin, uid, said_uid) = (Arc::clone(&pod.node), Arc::clone(&pod.uid), Arc::clone(&report.uid));
        let place = key.strip_prefix("obj/core/pods/").unwrap_or_default();
        let said = format!("{POD}{place}");
        self.work.start(task, async move {
            // The newest word, not the one that made this due.
            let Some(value) = report_of(&broker, origin, said).await else { return Outcome::Nothing };
            if text(&value, "uid") != &*said_uid {
                return Outcome::Nothing;
            }
            let patch = pod::status_patch(&uid, value.get("status").unwrap_or(&Value::Null));
            let path = format!("{path}/status");
            Outcome::Object(cluster.patch("pods/status", &path, STRATEGIC, &patch).await.map(Some))
        });
    }

    fn begin_node(&mut self, task: Task, name: &Arc<str>) {
        let Some(node) = self.nodes.get(name) else { return };
        let path = format!("/api/v1/nodes/{name}");
        let (cluster, broker) = (self.cluster.clone(), self.broker.clone());
        if !node.enrolled {
            let Some(object) = node.object.as_ref().filter(|object| object.ours) else { return };
            let options =
                json!({"kind": "DeleteOptions", "apiVersion": "v1", "preconditions": {"uid": &*object.uid}});
            self.work.start(task, async move {
                Outcome::Object(cluster.delete("nodes", &path, &options).await.map(|()| None))
            });
            return;
        }
        // A link that is down is told only once it stays so; in between the node is as it was.
        let waits = DOWN_AFTER.saturating_sub(node.down_since.elapsed());
        if node.link == Link::Down && node.object.is_some() && !waits.is_zero() {
            let at = Instant::now() + waits;
            return self.work.put_at(task, at);
        }
        let (held, link, hub, tier) =
            (node.object.clone(), node.link.clone(), self.hub.clone(), self.tier.clone());
        let (name, written) = (Arc::clone(name), node.written);
        self.work.start(task, async move {
            let report = report_of(&broker, Arc::clone(&name), NODE.to_owned()).await;
            let Some(held) = held else {
                let labels = node::labels(&name, report.as_ref().unwrap_or(&Value::Null));
                let new = node::new(&name, &tier, &labels);
                return Outcome::Object(cluster.create("nodes", "/api/v1/nodes", &new).await.map(Some));
            };
            if !held.ours {
                return Outcome::Nothing;
            }
            let desired = node::desired(&name, report.as_ref(), &link, &hub, Some(&held), &node::now());
            let mut last = Outcome::Nothing;
            if let Some(patch) = desired.labels_lacking(&held) {
                match cluster.patch("nodes", &path, STRATEGIC, &patch).await {
                    Ok(object) => last = Outcome::Object(Ok(Some(object))),
                    Err(error) => return Outcome::Object(Err(error)),
                }
            }
            if desired.differs(&held) && written != Some((desired.digest(), desired.shown(&held))) {
                let patch = desired.patch(&held.uid);
                let path = format!("{path}/status");
                let patched = cluster.patch("nodes/status", &path, STRATEGIC, &patch).await;
                return match patched {
                    Ok(object) => {
                        let shown = desired.shown(&node::Object::read(&object, &tier));
                        Outcome::Node { object, written: (desired.digest(), shown) }
                    }
                    Err(error) => Outcome::Object(Err(error)),
                };
            }
            last
        });
    }

    /// Where a task is done: what waits for a write's turn holds up neither reads nor Leases.
    fn line(&mut self, task: &Task) -> &mut Work<Outcome> {
        match task {
            Task::Fetch(_) | Task::Pods(_) | Task::Lease(_) => &mut self.swift,
            _ => &mut self.work,
        }
    }

    /// Takes in what became of a task.
    pub(super) fn done(&mut self, task: Task, outcome: Outcome) {
        let object = match outcome {
            Outcome::Nothing => {
                self.line(&task).succeeded(&task);
                return;
            }
            Outcome::Node { object, written } => {
                if let Task::Node(name) = &task
                    && let Some(node) = self.nodes.get_mut(name)
                {
                    node.written = Some(written);
                }
                Some(object)
            }
            Outcome::Object(Ok(object)) => object,
            Outcome::Object(Err(error)) => return self.on_failure(task, &error),
        };
        self.line(&task).succeeded(&task);
        match (&task, object) {
            (Task::Node(_), Some(object)) => {
                let newer = self.nodes.get(text(&object, "metadata.name")).is_none_or(|node| {
                    node.object.as_ref().is_none_or(|held| {
                        held.version <= version(&object) || *held.uid != *text(&object, "metadata.uid")
                    })
                });
                if newer {
                    self.on_update(Watched::Nodes, super::watch::Update::Seen(object));
                }
            }
            (Task::Fetch(key), object) => self.on_fetched(key, object),
            (Task::Pods(_), Some(mut list)) => {
                if let Some(Value::Array(items)) = list.get_mut("items").map(Value::take) {
                    for item in items {
                        self.on_update(Watched::Pods, super::watch::Update::Seen(item));
                    }
                }
            }
            (Task::Token(key), Some(answer)) => self.on_token(key, &answer),
            (Task::Status(key), Some(object)) => self.on_status_written(key, &object),
            (Task::Tolerate(key), _) => self.on_tolerated(key, false),
            (Task::Event(id), _) => self.on_event_written(*id),
            (Task::Lease(name), _) => {
                let at = self.leases.on_renewed(name);
                self.swift.put_at(task, at);
            }
            _ => {}
        }
    }

    /// The API shows a status after it was written.
    fn on_status_written(&mut self, key: &Arc<str>, object: &Value) {
        let shown = digest(&pod::said_by_node(object.get("status").unwrap_or(&Value::Null)));
        let Some(pod) = self.pods.get_mut(key) else { return };
        if *pod.uid != *text(object, "metadata.uid") {
            return;
        }
        if version(object) >= pod.version {
            pod.status = shown;
            pod.version = version(object);
        }
        if let Some(report) = self.reports.get_mut(key) {
            report.written = Some((report.status, shown));
        }
        self.compare(key);
    }

    fn on_failure(&mut self, task: Task, error: &CallError) {
        tracing::debug!(?task, %error, "a request of the bridge failed");
        match &task {
            // What is gone, or another object by now, will be shown by the watch.
            Task::Status(_) if error.is(404) || error.is(409) => self.work.succeeded(&task),
            Task::Tolerate(key) if error.is(404) || error.is(409) => {
                self.on_tolerated(key, true);
                self.work.succeeded(&task);
            }
            Task::Event(id) if !error.is_passing() => {
                tracing::debug!(%error, "the Kubernetes API does not take an event");
                self.on_event_refused(*id);
                self.work.succeeded(&task);
            }
            Task::Static(key) if !error.is_passing() => {
                // Its namespace may come yet.
                tracing::warn!(%key, %error, "a static pod cannot be shown");
                self.work.failed(task);
            }
            Task::Tolerate(key) if !error.is_passing() => {
                tracing::warn!(%key, %error, "a pod cannot be made to stay at a node that is away");
                self.on_tolerated(key, false);
                self.work.succeeded(&task);
            }
            Task::Node(name) if error.is(409) => {
                tracing::warn!(node = %name, "the Kubernetes API has another Node of this name");
                self.work.failed(task);
            }
            Task::Fetch(key) if !error.is_passing() => {
                tracing::warn!(%key, %error, "what a pod names may not be read");
                let key = Arc::clone(key);
                self.swift.succeeded(&task);
                self.on_fetched(&key, None);
            }
            Task::Status(key) if !error.is_passing() => {
                tracing::warn!(%key, %error, "the Kubernetes API does not take what a node says of a pod");
                if let (Some(report), Some(pod)) = (self.reports.get_mut(key), self.pods.get(key)) {
                    report.written = Some((report.status, pod.status));
                }
                self.work.succeeded(&task);
            }
            Task::Token(key) if !error.is_passing() => {
                tracing::warn!(%key, %error, "no token for a pod");
                if let Some((_, pod, _)) = self.token(key) {
                    self.dirty.insert(Arc::clone(&pod.node));
                }
                self.work.failed(task);
            }
            _ => self.line(&task.clone()).failed(task),
        }
    }
}

/// A name of which only its Node, if anything, is known.
pub(super) fn not_enrolled() -> Node {
    Node {
        object: None,
        enrolled: false,
        link: Link::Down,
        down_since: Instant::now(),
        written: None,
        gone: CancellationToken::new(),
    }
}

/// What a node says under a key of its space of statuses.
pub(super) async fn report_of(broker: &broker::Handle, origin: Arc<str>, key: String) -> Option<Value> {
    let command = Command::StateGet { origin, space: "status".into(), key };
    match broker.call(command).await {
        Ok(Response::Entry(Some(entry))) => serde_json::from_slice(&entry.value()).ok(),
        _ => None,
    }
}

/// Where the API has what stands in `fleet` under a key.
pub(super) fn path_of(key: &str) -> String {
    let mut parts = key.splitn(5, '/').skip(2);
    let mut part = || parts.next().unwrap_or_default();
    let (resource, namespace, name) = (part(), part(), part());
    format!("/api/v1/namespaces/{namespace}/{resource}/{name}")
}
