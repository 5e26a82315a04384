//! Where it is said what there must be: the node's part of `fleet`, and a folder of static pods.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use broker::{
    Handle, Stopped, clock,
    event::{Command, Event, Front, Output, Response, SessionOpen, StateEvent},
    handle::Outbox,
};
use bytes::Bytes;
use k8s_openapi::api::core::v1::Pod;
use sha2::{Digest as _, Sha256};
use tokio::{task::JoinHandle, time::Interval};

use super::table::{self, CONFIG_MAPS, NODES, Name, SECRETS, TOKENS};

const PODS: &str = "obj/core/pods/";
const FLEET: &str = "fleet";
/// How often the folder of static pods is looked at.
const SCAN: Duration = Duration::from_secs(5);
/// The largest file of a static pod.
const FILE_MAX: u64 = 1 << 20;
/// The most files that are read of the folder.
const FILES_MAX: usize = 256;
/// Until the store has a space that is not there yet.
const UNKNOWN_SPACE: Duration = Duration::from_secs(1);

/// Something that must be, or must not be any more.
#[derive(Debug)]
pub(crate) enum Change {
    Pod(Name, Option<Arc<Pod>>),
    /// A key of `fleet` that is no pod.
    Object(String, Option<Bytes>),
    /// Of the folder.
    Static(Name, Option<Arc<Pod>>),
    /// Everything that must be has been said.
    Synced,
}

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Source {
    node: String,
    handle: Handle,
    watch: Option<Outbox>,
    queue: VecDeque<Output>,
    owed: usize,
    ready: VecDeque<Change>,
    /// Keys that are there, as far as was said.
    known: BTreeSet<String>,
    /// Keys that a list shows again, until it is complete.
    listed: Option<BTreeSet<String>>,
    folder: Option<PathBuf>,
    scans: Interval,
    scan: Option<JoinHandle<BTreeMap<Name, Arc<Pod>>>>,
    statics: BTreeMap<Name, Arc<Pod>>,
}

impl Source {
    /// Nothing is asked for before [`next`](Self::next).
    pub(crate) fn new(node: &str, handle: Handle, folder: Option<PathBuf>) -> Self {
        Self {
            node: node.to_owned(),
            handle,
            watch: None,
            queue: VecDeque::new(),
            owed: 0,
            ready: VecDeque::new(),
            known: BTreeSet::new(),
            listed: None,
            folder,
            scans: clock::every(SCAN),
            scan: None,
            statics: BTreeMap::new(),
        }
    }

    /// The next change. Cancel safe.
    ///
    /// # Errors
    /// The broker has stopped.
    pub(crate) async fn next(&mut self) -> Result<Change, Stopped> {
        loop {
            if let Some(change) = self.ready.pop_front() {
                return Ok(change);
            }
            if self.watch.is_none() {
                self.open().await?;
            }
            if let Some(output) = self.queue.pop_front() {
                self.take(output).await?;
                continue;
            }
            if self.owed > 0
                && let Some(outbox) = &self.watch
            {
                let session = outbox.session();
                let bytes = std::mem::take(&mut self.owed);
                self.handle.send(Event::Sent { session, bytes }, 0).await?;
            }
            let Some(outbox) = &mut self.watch else { continue };
            tokio::select! {
                () = outbox.recv(&mut self.queue) => {}
                scanned = scanned(&mut self.scan), if self.scan.is_some() => {
                    self.scan = None;
                    if let Some(found) = scanned {
                        self.compare(found);
                    }
                }
                _ = self.scans.tick(), if self.scan.is_none() && self.folder.is_some() => {
                    if let Some(folder) = self.folder.clone() {
                        let node = self.node.clone();
                        self.scan = Some(tokio::task::spawn_blocking(move || read_folder(&folder, &node)));
                    }
                }
            }
        }
    }

    /// Ends the watch.
    pub(crate) async fn close(self) {
        if let Some(outbox) = self.watch {
            let closed = Event::SessionClosed { session: outbox.session(), clean: true };
            if self.handle.send(closed, 0).await.is_err() {
                tracing::debug!("the broker stopped before the watch of pods was closed");
            }
        }
    }

    async fn open(&mut self) -> Result<(), Stopped> {
        loop {
            let (session, outbox) = self.handle.open_session();
            let open = SessionOpen {
                session,
                front: Front::Internal,
                client_id: "".into(),
                clean_start: true,
                expiry_s: 0,
                receive_max: u16::MAX,
                will: None,
            };
            self.handle.send(Event::SessionOpened(open), 0).await?;
            let prefixes = [PODS, CONFIG_MAPS, SECRETS, TOKENS, NODES];
            let command = Command::StateWatch {
                session,
                origin: "".into(),
                space: FLEET.into(),
                prefixes: prefixes.iter().map(|prefix| (*prefix).to_owned()).collect(),
                from: None,
                with_previous: false,
            };
            if let Response::Done = self.handle.call(command).await? {
                self.watch = Some(outbox);
                self.listed = Some(BTreeSet::new());
                return Ok(());
            }
            // Until the first link nobody has told this node of the space.
            let closed = Event::SessionClosed { session, clean: true };
            self.handle.send(closed, 0).await?;
            tokio::time::sleep(UNKNOWN_SPACE).await;
        }
    }

    async fn take(&mut self, output: Output) -> Result<(), Stopped> {
        self.owed += output.cost();
        match output {
            Output::State(StateEvent::Put { entry, .. }) => {
                if let Some(listed) = &mut self.listed {
                    listed.insert(entry.key.clone());
                }
                self.known.insert(entry.key.clone());
                let value = entry.value();
                self.set(&entry.key, Some(value));
            }
            Output::State(StateEvent::Deleted { key, .. }) => {
                self.known.remove(&key);
                if let Some(listed) = &mut self.listed {
                    listed.remove(&key);
                }
                self.set(&key, None);
            }
            Output::State(StateEvent::Synced { .. }) => {
                // What an earlier watch said and this one did not is gone.
                let listed = self.listed.take().unwrap_or_default();
                let gone: Vec<String> = self.known.difference(&listed).cloned().collect();
                for key in gone {
                    self.known.remove(&key);
                    self.set(&key, None);
                }
                self.ready.push_back(Change::Synced);
            }
            Output::State(StateEvent::TooOld { .. }) => {
                self.queue.clear();
                self.owed = 0;
                if let Some(outbox) = self.watch.take() {
                    let closed = Event::SessionClosed { session: outbox.session(), clean: true };
                    self.handle.send(closed, 0).await?;
                }
            }
            Output::Close(_) => return Err(Stopped),
            _ => {}
        }
        Ok(())
    }

    fn set(&mut self, key: &str, value: Option<Bytes>) {
        let Some(name) = key.strip_prefix(PODS) else {
            return self.ready.push_back(Change::Object(key.to_owned(), value));
        };
        let Some((namespace, name)) = name.split_once('/') else { return };
        let name = (namespace.to_owned(), name.to_owned());
        // A pod that cannot be read is not one that is gone.
        let pod = match value {
            Some(value) => match table::parsed(key, &value) {
                Some(pod) => Some(pod),
                None => return,
            },
            None => None,
        };
        self.ready.push_back(Change::Pod(name, pod));
    }

    fn compare(&mut self, found: BTreeMap<Name, Arc<Pod>>) {
        for name in self.statics.keys().filter(|name| !found.contains_key(*name)) {
            self.ready.push_back(Change::Static(name.clone(), None));
        }
        for (name, pod) in &found {
            if self.statics.get(name) != Some(pod) {
                self.ready.push_back(Change::Static(name.clone(), Some(Arc::clone(pod))));
            }
        }
        self.statics = found;
    }
}

async fn scanned(
    scan: &mut Option<JoinHandle<BTreeMap<Name, Arc<Pod>>>>,
) -> Option<BTreeMap<Name, Arc<Pod>>> {
    match scan {
        Some(scan) => scan.await.inspect_err(|error| tracing::error!(%error, "static pods")).ok(),
        None => None,
    }
}

/// The pods that files of this folder describe. Names that begin with a dot are not looked at.
fn read_folder(folder: &Path, node: &str) -> BTreeMap<Name, Arc<Pod>> {
    let Ok(entries) = std::fs::read_dir(folder) else { return BTreeMap::new() };
    let mut files: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    files.sort();
    let hidden = |path: &Path| path.file_name().is_none_or(|name| name.to_string_lossy().starts_with('.'));
    let mut found = BTreeMap::new();
    for path in files.iter().filter(|path| !hidden(path) && path.is_file()).take(FILES_MAX) {
        let small = path.metadata().is_ok_and(|metadata| metadata.len() <= FILE_MAX);
        let text = if small { std::fs::read_to_string(path).ok() } else { None };
        let Some(text) = text else {
            tracing::warn!(path = %path.display(), "not a static pod: unreadable, or larger than 1 MiB");
            continue;
        };
        match static_pod(&text, node) {
            Ok((name, pod)) => drop(found.insert(name, Arc::new(pod))),
            Err(error) => tracing::warn!(path = %path.display(), error, "not a static pod"),
        }
    }
    found
}

/// A static pod as a kubelet makes it of its file: named for its node, its uid follows from what is written.
fn static_pod(text: &str, node: &str) -> Result<(Name, Pod), String> {
    let budget = serde_saphyr::budget! { max_depth: 64, max_nodes: 100_000 };
    let options = serde_saphyr::options! { budget: budget };
    let mut pod: Pod =
        serde_saphyr::from_str_with_options(text, options).map_err(|error| error.to_string())?;
    let name = pod.metadata.name.clone().filter(|name| !name.is_empty()).ok_or("it has no metadata.name")?;
    if pod.spec.as_ref().is_none_or(|spec| spec.containers.is_empty()) {
        return Err("it has no spec.containers".to_owned());
    }
    let digest = Sha256::new().chain_update(node).chain_update([0]).chain_update(text).finalize();
    let hash: String = digest[..16].iter().map(|byte| format!("{byte:02x}")).collect();
    let name = format!("{name}-{node}");
    let namespace = pod.metadata.namespace.clone().filter(|namespace| !namespace.is_empty());
    let namespace = namespace.unwrap_or_else(|| "default".to_owned());
    pod.metadata.name = Some(name.clone());
    pod.metadata.namespace = Some(namespace.clone());
    pod.metadata.uid = Some(hash.clone());
    let annotations = pod.metadata.annotations.get_or_insert_default();
    annotations.insert("kubernetes.io/config.source".to_owned(), "file".to_owned());
    annotations.insert("kubernetes.io/config.hash".to_owned(), hash);
    if let Some(spec) = &mut pod.spec {
        spec.node_name = Some(node.to_owned());
    }
    pod.status = None;
    Ok(((namespace, name), pod))
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = "apiVersion: v1\nkind: Pod\nmetadata:\n  name: web\nspec:\n  containers:\n  - name: c\n    image: i\n";

    #[test]
    fn a_static_pod_is_named_for_its_node_and_its_uid_follows_from_its_file() {
        let (name, pod) = static_pod(FILE, "edge-1").unwrap();
        assert_eq!(name, ("default".to_owned(), "web-edge-1".to_owned()));
        assert_eq!(pod.spec.as_ref().unwrap().node_name.as_deref(), Some("edge-1"));
        let (_, same) = static_pod(FILE, "edge-1").unwrap();
        assert_eq!(pod, same);
        let (_, changed) = static_pod(&FILE.replace("image: i", "image: j"), "edge-1").unwrap();
        assert_ne!(pod.metadata.uid, changed.metadata.uid);
    }

    #[test]
    fn a_file_that_is_no_pod_is_refused_with_a_reason() {
        assert!(static_pod("metadata: {}", "n").is_err());
        assert!(static_pod("metadata: {name: a}\nspec: {containers: []}", "n").is_err());
        assert!(static_pod("[", "n").is_err());
    }
}
