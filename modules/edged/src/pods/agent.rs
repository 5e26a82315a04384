//! Which pods there must be, and a worker for each.
//!
//! One task owns this: what `fleet` and the folder of static pods say comes in, workers are told. Of one name there
//! is one pod at a time: another of the same name (another uid) waits until nothing is left of the first. What the
//! runtime or the node's folders have of pods that nobody wants is ended only after `Synced`.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
    time::Duration,
};

use broker::{
    Handle, Stopped, Tasks, clock,
    event::{Command, Response},
};
use bytes::Bytes;
use k8s_openapi::{
    api::core::v1::{Pod, PodSpec, PodStatus},
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use serde::Deserialize;
use tokio::{
    sync::{mpsc, watch},
    task::{Id, JoinSet},
    time::sleep,
};

use super::{
    admit,
    hands::{Context, Hands},
    report::{Reporter, SPACE},
    seen::{self, Sandbox, Seen},
    source::{Change, Source},
    spec,
    status::Facts,
    table::{Changed, Name, Table},
    worker::{Begin, Clock, Desired, Tell, Worker},
};
use crate::{
    make::qos,
    runtime::{Hint, RuntimeError},
};

/// Messages that wait for one worker. One that does not keep up is told to look at everything instead.
const INBOX: usize = 64;
/// How often everything that the runtime shows is compared with what was seen of it.
const RELIST: Duration = Duration::from_secs(10);
/// Between attempts to reach a runtime that does not answer.
const UNREACHED: Duration = Duration::from_secs(2);
/// How many keys of `status` are read at a time.
const PAGE: usize = 1_000;

/// What the agent needs to know of its node.
#[derive(Debug, Clone)]
pub(crate) struct Settings {
    pub(crate) node: String,
    pub(crate) host_ips: Vec<String>,
    pub(crate) limits: admit::Limits,
    pub(crate) clock: Clock,
}

/// A pod that has a worker.
#[derive(Debug)]
struct Slot {
    uid: String,
    desired: watch::Sender<Desired>,
    told: mpsc::Sender<Tell>,
    task: Id,
}

impl Slot {
    fn pod(&self) -> Arc<Pod> {
        Arc::clone(&self.desired.borrow().pod)
    }

    fn is_gone(&self) -> bool {
        self.desired.borrow().gone
    }
}

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Agent {
    settings: Settings,
    hands: Arc<Hands>,
    table: Arc<Table>,
    report: Reporter,
    runtime_name: String,
    fleet: BTreeMap<Name, Arc<Pod>>,
    statics: BTreeMap<Name, Arc<Pod>>,
    slots: HashMap<Name, Slot>,
    workers: JoinSet<()>,
    /// What the runtime shows of pods that have no worker yet, by uid.
    found: HashMap<String, Found>,
    /// As they were written before this process.
    priors: BTreeMap<Name, Prior>,
    synced: bool,
    collected: bool,
}

/// What the runtime shows of a pod.
#[derive(Debug, Default)]
struct Found {
    name: Name,
    seen: Seen,
}

/// A value of `status`.
#[derive(Debug, Deserialize)]
struct Prior {
    uid: String,
    status: PodStatus,
}

impl Agent {
    pub(crate) fn new(settings: Settings, hands: Arc<Hands>) -> Self {
        let (table, report) = (Arc::clone(&hands.table), hands.report.clone());
        Self {
            settings,
            hands,
            table,
            report,
            runtime_name: String::new(),
            fleet: BTreeMap::new(),
            statics: BTreeMap::new(),
            slots: HashMap::new(),
            workers: JoinSet::new(),
            found: HashMap::new(),
            priors: BTreeMap::new(),
            synced: false,
            collected: false,
        }
    }

    /// Until the broker stops or the tasks are asked to. Containers stay as they are.
    pub(crate) async fn run(mut self, handle: Handle, mut source: Source, tasks: Tasks) {
        let stopped = tasks.stopped();
        tokio::select! {
            biased;
            () = stopped.cancelled() => {}
            ended = self.serve(&handle, &mut source) => {
                if let Err(Stopped) = ended {
                    tracing::debug!("the broker stopped: pods are left as they are");
                }
            }
        }
        source.close().await;
    }

    async fn serve(&mut self, handle: &Handle, source: &mut Source) -> Result<(), Stopped> {
        self.read_priors(handle).await?;
        self.list_all().await;
        let mut hints = None;
        let mut relist = clock::every(RELIST);
        relist.reset();
        loop {
            if hints.is_none() {
                hints = self.hands.runtime.hints().await.ok();
            }
            tokio::select! {
                change = source.next() => self.changed(change?),
                hint = next_hint(&mut hints), if hints.is_some() => match hint {
                    Some(hint) => self.hinted(&hint),
                    None => {
                        // The runtime went away: whatever happens from now on is found by listing.
                        hints = None;
                        sleep(Duration::from_millis(200)).await;
                        self.relist().await;
                    }
                },
                Some(ended) = self.workers.join_next_with_id() => {
                    let id = match &ended {
                        Ok((id, ())) => *id,
                        Err(error) => error.id(),
                    };
                    if let Err(error) = ended {
                        tracing::error!(%error, "a pod's worker");
                    }
                    self.ended(id);
                }
                _ = relist.tick() => {
                    self.relist().await;
                    for changed in self.table.open_waiting() {
                        self.object_changed(&changed);
                    }
                }
            }
            self.collect();
        }
    }

    /// What was said of pods before this process: restart counts, phases, times.
    async fn read_priors(&mut self, handle: &Handle) -> Result<(), Stopped> {
        let mut after = None;
        loop {
            let list = Command::StateList {
                origin: self.settings.node.as_str().into(),
                space: SPACE.into(),
                prefix: "pod/".to_owned(),
                after: after.clone(),
                limit: PAGE,
                at: None,
            };
            let Response::Entries { entries, more, .. } = handle.call(list).await? else { return Ok(()) };
            for entry in &entries {
                let name = entry.key.strip_prefix("pod/").and_then(|rest| rest.split_once('/'));
                let prior = serde_json::from_slice(&entry.value());
                if let (Some((namespace, name)), Ok(prior)) = (name, prior) {
                    self.priors.insert((namespace.to_owned(), name.to_owned()), prior);
                }
            }
            after = entries.last().map(|entry| entry.key.clone());
            if !more || after.is_none() {
                return Ok(());
            }
        }
    }

    /// Lists everything in the runtime, however long that takes: no pod can be judged before.
    async fn list_all(&mut self) {
        let mut said = false;
        loop {
            match self.try_list().await {
                Ok(()) => return,
                Err(error) => {
                    if !std::mem::replace(&mut said, true) {
                        tracing::warn!(%error, "waiting for the container runtime");
                        self.report.of_node(true, "ContainerRuntimeUnavailable", error.to_string());
                    }
                    sleep(UNREACHED).await;
                }
            }
        }
    }

    async fn try_list(&mut self) -> Result<(), RuntimeError> {
        let runtime = &self.hands.runtime;
        self.runtime_name = runtime.version().await?.runtime_name;
        let mut found: HashMap<String, Found> = HashMap::new();
        for sandbox in runtime.sandboxes().await? {
            let Some(uid) = seen::uid_of(&sandbox.labels, &self.settings.node) else { continue };
            let entry = found.entry(uid.to_owned()).or_default();
            let metadata = sandbox.metadata.clone().unwrap_or_default();
            entry.name = (metadata.namespace, metadata.name);
            match runtime.sandbox_status(&sandbox.id).await {
                Ok(status) => entry.seen.merge_sandbox(Sandbox::of(&status)),
                Err(RuntimeError::NotFound(_)) => {}
                Err(error) => return Err(error),
            }
        }
        for container in runtime.containers().await? {
            let Some(uid) = seen::uid_of(&container.labels, &self.settings.node) else { continue };
            let entry = found.entry(uid.to_owned()).or_default();
            let label = |key: &str| container.labels.get(key).cloned().unwrap_or_default();
            if entry.name.1.is_empty() {
                entry.name = (label("io.kubernetes.pod.namespace"), label("io.kubernetes.pod.name"));
            }
            let context =
                Context { pod: Arc::new(ghost(uid, &entry.name)), ips: Vec::new(), known: BTreeSet::new() };
            match self.hands.container(&context, &container.id, &container.pod_sandbox_id).await {
                Ok(seen) => entry.seen.merge_container(seen),
                Err(RuntimeError::NotFound(_)) => {}
                Err(error) => return Err(error),
            }
        }
        self.found = found;
        Ok(())
    }

    /// Compares what the runtime shows now with what was seen; workers of what differs look.
    async fn relist(&mut self) {
        let runtime = &self.hands.runtime;
        let (Ok(sandboxes), Ok(containers)) = (runtime.sandboxes().await, runtime.containers().await) else {
            return tracing::debug!("the container runtime does not answer");
        };
        let mut digests: HashMap<&str, BTreeSet<(&str, i32)>> = HashMap::new();
        let mut names: HashMap<&str, Name> = HashMap::new();
        for sandbox in &sandboxes {
            let Some(uid) = seen::uid_of(&sandbox.labels, &self.settings.node) else { continue };
            digests.entry(uid).or_default().insert((&sandbox.id, sandbox.state));
            let metadata = sandbox.metadata.clone().unwrap_or_default();
            names.insert(uid, (metadata.namespace, metadata.name));
        }
        for container in &containers {
            let Some(uid) = seen::uid_of(&container.labels, &self.settings.node) else { continue };
            digests.entry(uid).or_default().insert((&container.id, container.state));
        }
        let with_worker: BTreeSet<&str> = self.slots.values().map(|slot| slot.uid.as_str()).collect();
        for slot in self.slots.values() {
            let listed = digests.get(slot.uid.as_str()).cloned().unwrap_or_default();
            let listed = listed.into_iter().map(|(id, state)| (id.to_owned(), state)).collect();
            tell(slot, Tell::Compare(listed));
        }
        // What a lost answer or an earlier agent left of pods that have no worker.
        let left: Vec<(String, Name)> = names
            .into_iter()
            .filter(|(uid, _)| !with_worker.contains(uid))
            .map(|(uid, name)| (uid.to_owned(), name))
            .collect();
        for (uid, name) in left {
            self.found.entry(uid).or_insert_with(|| Found { name, seen: Seen::default() });
            self.collected = false;
        }
    }

    fn hinted(&mut self, hint: &Hint) {
        for slot in self.slots.values() {
            tell(slot, if hint.id.is_empty() { Tell::Look } else { Tell::Changed(hint.id.clone()) });
        }
    }

    fn changed(&mut self, change: Change) {
        match change {
            Change::Pod(name, pod) => {
                match pod.filter(|pod| runs_here(pod, &self.settings.node)) {
                    Some(pod) => drop(self.fleet.insert(name.clone(), pod)),
                    None => drop(self.fleet.remove(&name)),
                }
                self.reconcile(&name);
            }
            Change::Static(name, pod) => {
                let key = format!("static/{}/{}", name.0, name.1);
                match pod {
                    Some(pod) => {
                        match serde_json::to_vec(&*pod) {
                            Ok(value) => self.report.put(key, Bytes::from(value)),
                            Err(error) => tracing::error!(%error, "a static pod that cannot be shown"),
                        }
                        self.statics.insert(name.clone(), pod);
                    }
                    None => {
                        self.report.delete(key);
                        self.statics.remove(&name);
                    }
                }
                self.reconcile(&name);
            }
            Change::Object(key, value) => {
                let changed = self.table.set(&key, value.as_ref());
                self.object_changed(&changed);
            }
            Change::Synced => self.synced = true,
        }
    }

    fn object_changed(&mut self, changed: &Changed) {
        for slot in self.slots.values().filter(|slot| changed.concerns(&slot.pod())) {
            tell(slot, Tell::Objects);
        }
    }

    /// Sees to it that the pod of this name is the one that is wanted.
    fn reconcile(&mut self, name: &Name) {
        let wanted = self.statics.get(name).or_else(|| self.fleet.get(name)).cloned();
        match (self.slots.get(name), wanted) {
            (Some(slot), Some(pod)) if slot.uid == spec::uid(&pod) && !slot.is_gone() => {
                slot.desired.send_replace(Desired { pod, gone: false });
            }
            (Some(slot), _) => {
                // When nothing is left of it, the one that is wanted begins.
                slot.desired.send_modify(|desired| desired.gone = true);
            }
            (None, Some(pod)) => {
                if let Some(other) = self.other_of_name(name, spec::uid(&pod)) {
                    return self.begin_orphan(&other);
                }
                self.begin(name, pod);
            }
            (None, None) => {}
        }
    }

    /// Uid of another pod of this name of which something is left.
    fn other_of_name(&self, name: &Name, uid: &str) -> Option<String> {
        let other = |(held, found): &(&String, &Found)| found.name == *name && held.as_str() != uid;
        self.found.iter().find(other).map(|(uid, _)| uid.clone())
    }

    fn begin(&mut self, name: &Name, pod: Arc<Pod>) {
        let uid = spec::uid(&pod).to_owned();
        let prior = self.priors.remove(name).filter(|prior| prior.uid == uid).map(|prior| prior.status);
        let seen = self.found.remove(&uid).map(|found| found.seen).unwrap_or_default();
        let known = prior.is_some() || seen != Seen::default();
        // What ran here before goes on; what is new must fit.
        let reject = if known || spec::is_deleted(&pod) {
            None
        } else {
            let others: Vec<Arc<Pod>> =
                self.slots.values().filter(|slot| !slot.is_gone()).map(Slot::pod).collect();
            let others = others.iter().map(|pod| &**pod);
            let node = self.table.node();
            admit::check(&pod, others, node.as_deref(), &self.settings.limits).err()
        };
        let begin = Begin { pod, seen, prior: prior.unwrap_or_default(), gone: false, reject };
        self.spawn(name.clone(), begin);
    }

    /// Ends what is left of a pod that nobody wants.
    fn begin_orphan(&mut self, uid: &str) {
        let Some(Found { name, seen }) = self.found.remove(uid) else { return };
        if self.slots.contains_key(&name) {
            // Its name is taken: it is found again by listing, once that has ended.
            return;
        }
        tracing::info!(
            namespace = name.0,
            pod = name.1,
            uid,
            "ending a pod that is not wanted here any more"
        );
        let pod = Arc::new(ghost(uid, &name));
        let begin = Begin { pod, seen, prior: PodStatus::default(), gone: true, reject: None };
        self.spawn(name, begin);
    }

    fn spawn(&mut self, name: Name, begin: Begin) {
        let (told, inbox) = mpsc::channel(INBOX);
        let (pod, gone) = (Arc::clone(&begin.pod), begin.gone);
        let facts = Facts {
            host_ips: self.settings.host_ips.clone(),
            runtime: self.runtime_name.clone(),
            qos: qos::qos(&pod).as_str(),
        };
        let uid = spec::uid(&pod).to_owned();
        let (desired, follows) = watch::channel(Desired { pod, gone });
        let worker = Worker::new(Arc::clone(&self.hands), self.settings.clock, facts, begin, follows, inbox);
        let task = self.workers.spawn(worker.run()).id();
        let slot = Slot { uid, desired, told, task };
        if gone {
            // What was found of it is from a list that may have been of names alone.
            tell(&slot, Tell::Look);
        }
        self.slots.insert(name, slot);
    }

    /// A worker ended: nothing is left of its pod.
    fn ended(&mut self, task: Id) {
        let Some(name) = self.slots.iter().find(|(_, slot)| slot.task == task).map(|(name, _)| name.clone())
        else {
            return;
        };
        self.slots.remove(&name);
        self.table.hide(&name);
        self.report.delete(format!("pod/{}/{}", name.0, name.1));
        self.reconcile(&name);
    }

    /// Once everything that is wanted is known: what is not wanted goes.
    fn collect(&mut self) {
        if !self.synced || self.collected {
            return;
        }
        self.collected = true;
        let all = self.fleet.values().chain(self.statics.values());
        let wanted: BTreeSet<String> = all.map(|pod| spec::uid(pod).to_owned()).collect();
        let orphans: Vec<String> = self.found.keys().filter(|uid| !wanted.contains(*uid)).cloned().collect();
        for uid in orphans {
            self.begin_orphan(&uid);
        }
        for (namespace, name) in std::mem::take(&mut self.priors).into_keys() {
            let key = (namespace, name);
            if !self.fleet.contains_key(&key) && !self.statics.contains_key(&key) {
                self.report.delete(format!("pod/{}/{}", key.0, key.1));
            }
        }
        let live: BTreeSet<String> =
            self.slots.values().map(|slot| slot.uid.clone()).chain(self.found.keys().cloned()).collect();
        let maker = Arc::clone(&self.hands.maker);
        self.workers.spawn_blocking(move || {
            for uid in maker.uids().into_iter().filter(|uid| !live.contains(uid) && !wanted.contains(uid)) {
                if let Err(error) = maker.tear_down(&uid) {
                    tracing::warn!(uid, %error, "the folder of a pod that is gone stays");
                }
            }
        });
    }
}

async fn next_hint(hints: &mut Option<mpsc::Receiver<Hint>>) -> Option<Hint> {
    match hints {
        Some(hints) => hints.recv().await,
        None => None,
    }
}

/// What a worker that does not keep up is not told, it finds by the next list.
fn tell(slot: &Slot, what: Tell) {
    if let Err(mpsc::error::TrySendError::Full(what)) = slot.told.try_send(what) {
        tracing::warn!(uid = slot.uid, ?what, "a pod's worker does not keep up");
    }
}

/// A pod of this node that is not only the shadow of a static one.
fn runs_here(pod: &Pod, node: &str) -> bool {
    let mirror =
        pod.metadata.annotations.as_ref().is_some_and(|all| all.contains_key("kubernetes.io/config.mirror"));
    let bound = pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref());
    !mirror && bound == Some(node)
}

/// What stands for a pod whose object is gone: its name, and no containers.
fn ghost(uid: &str, name: &Name) -> Pod {
    Pod {
        metadata: ObjectMeta {
            namespace: Some(name.0.clone()),
            name: Some(name.1.clone()),
            uid: Some(uid.to_owned()),
            ..ObjectMeta::default()
        },
        spec: Some(PodSpec::default()),
        status: None,
    }
}

#[cfg(test)]
mod tests;
