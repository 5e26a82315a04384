//! What all pods of the node share: the objects that they use, and what each shows to others.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, MutexGuard},
};

use broker::seal::{self, SealKey};
use bytes::Bytes;
use k8s_openapi::api::core::v1::{ConfigMap, Node, Pod, Secret};
use serde_json::Value;

use super::spec;
use crate::{
    objects::{self, Objects, Token},
    server::{PodView, Pods},
};

/// Where a key of `fleet` that is no pod belongs.
pub(crate) const CONFIG_MAPS: &str = "obj/core/configmaps/";
pub(crate) const SECRETS: &str = "obj/core/secrets/";
pub(crate) const TOKENS: &str = "obj/octobus.io/tokens/";
pub(crate) const NODES: &str = "obj/core/nodes/";

/// The key that secrets are sealed with, once the node has it.
pub(crate) type Unsealer = Arc<dyn Fn() -> Option<SealKey> + Send + Sync>;

/// Namespace and name.
pub(crate) type Name = (String, String);

/// See the module's documentation.
pub(crate) struct Table {
    unsealer: Unsealer,
    inner: Mutex<Inner>,
}

impl std::fmt::Debug for Table {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Table").field("pods", &self.inner().views.len()).finish_non_exhaustive()
    }
}

#[derive(Default)]
struct Inner {
    config_maps: HashMap<Name, Arc<ConfigMap>>,
    secrets: HashMap<Name, Arc<Secret>>,
    /// By namespace, and pod name with volume.
    tokens: HashMap<Name, Arc<Token>>,
    /// Sealed with a key that is not here yet.
    sealed: BTreeMap<String, Bytes>,
    node: Option<Arc<Node>>,
    views: BTreeMap<Name, (PodView, Value)>,
}

/// Which pods see a changed object.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Changed {
    ConfigMap(Name),
    Secret(Name),
    /// Namespace, and pod name with volume.
    Token(Name),
    Nothing,
}

impl Changed {
    /// Whether this pod names it.
    pub(crate) fn concerns(&self, pod: &Pod) -> bool {
        let named = |found: &BTreeMap<String, bool>, (namespace, name): &Name| {
            namespace == spec::namespace(pod) && found.contains_key(name)
        };
        match self {
            Self::ConfigMap(name) => named(&objects::references(pod).config_maps, name),
            Self::Secret(name) => named(&objects::references(pod).secrets, name),
            Self::Token((namespace, name)) => {
                namespace == spec::namespace(pod)
                    && name.strip_prefix(spec::name(pod)).is_some_and(|rest| rest.starts_with('.'))
            }
            Self::Nothing => false,
        }
    }
}

impl Table {
    pub(crate) fn new(unsealer: Unsealer) -> Self {
        Self { unsealer, inner: Mutex::default() }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().expect("no panic under this lock")
    }

    /// What a pod names, as far as it is here.
    pub(crate) fn objects_of(&self, pod: &Pod) -> Objects {
        let references = objects::references(pod);
        let namespace = spec::namespace(pod);
        let key = |name: &str| (namespace.to_owned(), name.to_owned());
        let inner = self.inner();
        let mut found = Objects::default();
        for name in references.config_maps.keys() {
            found
                .config_maps
                .extend(inner.config_maps.get(&key(name)).map(|held| (name.clone(), Arc::clone(held))));
        }
        for name in references.secrets.keys() {
            found.secrets.extend(inner.secrets.get(&key(name)).map(|held| (name.clone(), Arc::clone(held))));
        }
        for volume in references.tokens.keys() {
            let held = inner.tokens.get(&key(&format!("{}.{volume}", spec::name(pod))));
            found.tokens.extend(held.map(|held| (volume.clone(), Arc::clone(held))));
        }
        found
    }

    /// A key of `fleet` has this value now, or none.
    pub(crate) fn set(&self, key: &str, value: Option<&Bytes>) -> Changed {
        let opened = match value {
            Some(value) if seal::is_sealed(value) => {
                let opened = (self.unsealer)().and_then(|with| seal::open(&with, key, value));
                match opened {
                    Some(opened) => {
                        self.inner().sealed.remove(key);
                        Some(Bytes::from(opened))
                    }
                    None => {
                        tracing::debug!(key, "sealed with a key that this node does not have yet");
                        self.inner().sealed.insert(key.to_owned(), value.clone());
                        return Changed::Nothing;
                    }
                }
            }
            Some(value) => Some(value.clone()),
            None => {
                self.inner().sealed.remove(key);
                None
            }
        };
        let parts = |rest: &str| rest.split_once('/').map(|(ns, name)| (ns.to_owned(), name.to_owned()));
        let mut inner = self.inner();
        if let Some(name) = key.strip_prefix(CONFIG_MAPS).and_then(parts) {
            put(&mut inner.config_maps, key, name.clone(), opened.as_ref());
            return Changed::ConfigMap(name);
        }
        if let Some(name) = key.strip_prefix(SECRETS).and_then(parts) {
            put(&mut inner.secrets, key, name.clone(), opened.as_ref());
            return Changed::Secret(name);
        }
        if let Some(name) = key.strip_prefix(TOKENS).and_then(parts) {
            put(&mut inner.tokens, key, name.clone(), opened.as_ref());
            return Changed::Token(name);
        }
        if key.starts_with(NODES) {
            inner.node = opened.and_then(|value| parsed(key, &value));
        }
        Changed::Nothing
    }

    /// Opens what waits for the key, if that is here by now.
    pub(crate) fn open_waiting(&self) -> Vec<Changed> {
        let waiting = self.inner().sealed.clone();
        waiting.iter().map(|(key, value)| self.set(key, Some(value))).collect()
    }

    /// The node's own object.
    pub(crate) fn node(&self) -> Option<Arc<Node>> {
        self.inner().node.clone()
    }

    /// What a pod shows.
    pub(crate) fn show(&self, name: Name, view: PodView, object: Value) {
        self.inner().views.insert(name, (view, object));
    }

    /// A pod shows nothing any more.
    pub(crate) fn hide(&self, name: &Name) {
        self.inner().views.remove(name);
    }
}

impl Pods for Table {
    fn pod(&self, namespace: &str, name: &str) -> Option<PodView> {
        let key = (namespace.to_owned(), name.to_owned());
        self.inner().views.get(&key).map(|(view, _)| view.clone())
    }

    fn pods(&self) -> Vec<PodView> {
        self.inner().views.values().map(|(view, _)| view.clone()).collect()
    }

    fn objects(&self) -> Vec<Value> {
        self.inner().views.values().map(|(_, object)| object.clone()).collect()
    }
}

fn put<T: serde::de::DeserializeOwned>(
    into: &mut HashMap<Name, Arc<T>>,
    key: &str,
    name: Name,
    value: Option<&Bytes>,
) {
    match value.and_then(|value| parsed(key, value)) {
        Some(value) => drop(into.insert(name, value)),
        None => drop(into.remove(&name)),
    }
}

/// An object of the API, or what the log says.
pub(crate) fn parsed<T: serde::de::DeserializeOwned>(key: &str, value: &[u8]) -> Option<Arc<T>> {
    serde_json::from_slice(value)
        .inspect_err(|error| tracing::warn!(key, %error, "an object that cannot be read"))
        .ok()
        .map(Arc::new)
}
