//! Keeps what a node's API shows equal to what the node's store holds.
//!
//! Level-triggered: it lists both spaces, follows them, and for each key that may have changed writes what should
//! be shown, if that differs from what is. When a watch falls behind it lists again, and only differences are
//! written. What a list leaves out is gone: a replica of `fleet` drops an object because its owner said so or the
//! node's `want` did, and never because it has not arrived.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    hash::{DefaultHasher, Hash as _, Hasher as _},
    sync::Arc,
    time::Duration,
};

use broker::{
    Handle, Outbox, Stopped,
    event::{Command, Event, Front, Output, Response, SessionOpen, StateEntry, StateEvent},
    seal::{self, SealKey},
};
use bytes::Bytes;
use serde_json::Value;
use tokio::time::sleep;

use super::{Local, LocalOptions, merge};
use crate::{
    api::Api,
    json, limits,
    store::{StoreError, Write},
};

const OBJECTS: &str = "obj/";
const TOKENS: &str = "obj/octobus.io/tokens/";
const SECRETS: &str = "obj/core/secrets/";
/// What the node's API shows: resources of the core group, and their kinds.
const SHOWN: [(&str, &str); 5] = [
    ("pods", "Pod"),
    ("nodes", "Node"),
    ("configmaps", "ConfigMap"),
    ("secrets", "Secret"),
    ("serviceaccounts", "ServiceAccount"),
];
/// How long until a space is looked for again that is not there yet, or could not be followed.
const AGAIN: Duration = Duration::from_secs(1);

/// See the module's documentation.
pub(super) struct Mirror {
    broker: Handle,
    node: Arc<str>,
    secrets: Arc<dyn Fn() -> Option<SealKey> + Send + Sync>,
    api: Arc<Api>,
    local: Arc<Local>,
    /// As the node's store has them; the bytes are the store's own.
    fleet: BTreeMap<String, Bytes>,
    status: BTreeMap<String, Bytes>,
    /// Revision and hash of what is shown, by key.
    shown: BTreeMap<String, (u64, u64)>,
}

/// A change of one of the two spaces.
enum Seen {
    Fleet(String, Option<Bytes>),
    Status(String, Option<Bytes>),
}

impl Mirror {
    pub(super) fn new(options: &LocalOptions, api: &Arc<Api>, local: &Arc<Local>) -> Self {
        Self {
            broker: options.broker.clone(),
            node: Arc::clone(&options.node),
            secrets: Arc::clone(&options.secrets),
            api: Arc::clone(api),
            local: Arc::clone(local),
            fleet: BTreeMap::new(),
            status: BTreeMap::new(),
            shown: BTreeMap::new(),
        }
    }

    /// Until the node's broker stops.
    pub(super) async fn run(mut self) {
        loop {
            match self.list_and_follow().await {
                StoreError::Stopped(_) => return,
                StoreError::TooOld { .. } => {}
                error => {
                    tracing::debug!(%error, "the node's API looks again at what the node has");
                    sleep(AGAIN).await;
                }
            }
        }
    }

    async fn list_and_follow(&mut self) -> StoreError {
        match self.list().await {
            Ok((fleet, status)) => {
                let failed = Box::pin(self.follow(fleet, status)).await;
                failed.err().unwrap_or(StoreError::Stopped(Stopped))
            }
            Err(error) => error,
        }
    }

    /// Takes over everything; the revisions from which to follow.
    async fn list(&mut self) -> Result<(u64, u64), StoreError> {
        let fleet = Space { broker: &self.broker, origin: "".into(), name: "fleet" };
        let status = Space { broker: &self.broker, origin: Arc::clone(&self.node), name: "status" };
        let (objects, at) = fleet.all(OBJECTS).await?;
        let (reported, since) = status.all("").await?;
        let before: BTreeSet<String> =
            self.fleet.keys().chain(self.shown.keys()).cloned().chain(self.local.accounts.keys()).collect();
        self.fleet = objects;
        self.status = reported;
        let now = self.fleet.keys().cloned();
        let of_status = self.status.keys().filter_map(|key| shown_for(key, &self.node));
        let keys: BTreeSet<String> = before.into_iter().chain(now).chain(of_status).collect();
        for key in keys {
            self.converge(&key).await?;
        }
        self.local.ready.send_replace(true);
        Ok((at, since))
    }

    async fn follow(&mut self, fleet: u64, status: u64) -> Result<(), StoreError> {
        let (broker, node) = (self.broker.clone(), Arc::clone(&self.node));
        let space = Space { broker: &broker, origin: "".into(), name: "fleet" };
        let mut fleet = space.watch(OBJECTS, fleet).await?;
        let space = Space { broker: &broker, origin: node, name: "status" };
        let mut status = match space.watch("", status).await {
            Ok(watch) => watch,
            Err(error) => {
                fleet.close().await;
                return Err(error);
            }
        };
        let failed = loop {
            let seen = tokio::select! {
                seen = fleet.next() => seen.map(|(key, value)| Seen::Fleet(key, value)),
                seen = status.next() => seen.map(|(key, value)| Seen::Status(key, value)),
            };
            let seen = match seen {
                Ok(seen) => seen,
                Err(error) => break error,
            };
            if let Err(error) = self.take(seen).await {
                break error;
            }
        };
        fleet.close().await;
        status.close().await;
        Err(failed)
    }

    async fn take(&mut self, seen: Seen) -> Result<(), StoreError> {
        match seen {
            Seen::Fleet(key, value) => {
                set(&mut self.fleet, &key, value);
                self.converge(&key).await
            }
            Seen::Status(key, value) => {
                let concerns = shown_for(&key, &self.node);
                set(&mut self.status, &key, value);
                match concerns {
                    Some(key) => self.converge(&key).await,
                    None => Ok(()),
                }
            }
        }
    }

    /// Shows at a key of `fleet` what should be shown there.
    async fn converge(&mut self, key: &str) -> Result<(), StoreError> {
        if key.starts_with(TOKENS) {
            let token = self.fleet.get(key).and_then(|value| self.opened(key, value));
            self.local.accounts.set(key, token.as_ref());
            return Ok(());
        }
        let Some(path) = key.strip_prefix(OBJECTS) else { return Ok(()) };
        let Some((resource, place)) = path.strip_prefix("core/").and_then(|path| path.split_once('/')) else {
            return Ok(());
        };
        let Some((_, kind)) = SHOWN.iter().find(|(shown, _)| *shown == resource) else { return Ok(()) };
        let wanted = self.wanted(key, resource, place).map(|mut object| {
            json::set(&mut object, "apiVersion", "v1");
            json::set(&mut object, "kind", *kind);
            object
        });
        let cloud = wanted.as_ref().map(|object| json::text(object, "metadata.resourceVersion").to_owned());
        let hash = wanted.as_ref().map(|object| hash_of(&object.to_string()));
        let held = self.shown.get(key).copied();
        let write = match (&wanted, held) {
            (None, None) => return Ok(()),
            (Some(_), Some((_, was))) if hash == Some(was) => return Ok(()),
            (Some(object), None) => Write::create(path.to_owned(), object),
            (Some(object), Some((revision, _))) => Write::update(path.to_owned(), object, revision),
            (None, Some((revision, _))) => Ok(Write::delete(path.to_owned(), revision)),
        };
        let write = write.map_err(|status| StoreError::Refused(status.message))?;
        let revisions = self.api.store.write(vec![write]).await?;
        let revision = revisions.first().copied().unwrap_or_default();
        match hash {
            Some(hash) => {
                self.shown.insert(key.to_owned(), (revision, hash));
                self.local.known.set(path, revision, cloud.as_deref().unwrap_or_default());
            }
            None => {
                self.shown.remove(key);
                self.local.known.forget(path);
            }
        }
        Ok(())
    }

    /// The object of a resource at `namespace/name` as it should be shown.
    fn wanted(&self, key: &str, resource: &str, place: &str) -> Option<Value> {
        let object = self.fleet.get(key).and_then(|value| self.opened(key, value));
        let report = |key: &str| self.status.get(key).and_then(|value| json::read(value).ok());
        match resource {
            "pods" => match object {
                Some(pod) => Some(merge::pod(pod, report(&format!("pod/{place}")).as_ref())),
                None => {
                    let pod = merge::static_pod(report(&format!("static/{place}"))?, &self.node);
                    Some(merge::pod(pod, report(&format!("pod/{place}")).as_ref()))
                }
            },
            "nodes" => Some(merge::node(object?, report("node").as_ref())),
            "configmaps" => Some(merge::config_map(object?, &self.api.ca_pem)),
            _ => object,
        }
    }

    /// An object of `fleet`. A secret without the key that opens it is not shown.
    fn opened(&self, key: &str, value: &Bytes) -> Option<Value> {
        if !seal::is_sealed(value) {
            // Secrets are sealed before they get here. One that is not was not put there by the tier's bridge.
            return (!key.starts_with(SECRETS) && !key.starts_with(TOKENS))
                .then(|| json::read(value).ok())?;
        }
        let opened = (self.secrets)().and_then(|secrets| seal::open(&secrets, key, value));
        if opened.is_none() {
            tracing::warn!(key, "a secret cannot be opened with the key that this node has of its tier");
        }
        json::read(&opened?).ok()
    }
}

/// At which key of `fleet` something is shown that a key of `status` tells more of.
fn shown_for(key: &str, node: &str) -> Option<String> {
    if key == "node" {
        return Some(format!("{OBJECTS}core/nodes/-/{node}"));
    }
    let place = key.strip_prefix("pod/").or_else(|| key.strip_prefix("static/"))?;
    Some(format!("{OBJECTS}core/pods/{place}"))
}

fn set(map: &mut BTreeMap<String, Bytes>, key: &str, value: Option<Bytes>) {
    match value {
        Some(value) => drop(map.insert(key.to_owned(), value)),
        None => drop(map.remove(key)),
    }
}

fn hash_of(text: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    text.hash(&mut hasher);
    hasher.finish()
}

/// A space of the node's broker.
struct Space<'a> {
    broker: &'a Handle,
    origin: Arc<str>,
    name: &'static str,
}

impl Space<'_> {
    /// All entries under a prefix, and a revision behind which every later change stands.
    async fn all(&self, prefix: &str) -> Result<(BTreeMap<String, Bytes>, u64), StoreError> {
        let (mut all, mut after, mut first) = (BTreeMap::new(), None, None);
        loop {
            let command = Command::StateList {
                origin: Arc::clone(&self.origin),
                space: self.name.into(),
                prefix: prefix.to_owned(),
                after,
                limit: limits::PAGE,
                at: None,
            };
            let Response::Entries { entries, revision, more } = self.broker.call(command).await? else {
                return Err(StoreError::Refused(format!("space {} cannot be listed", self.name)));
            };
            let since = *first.get_or_insert(revision);
            after = entries.last().map(|entry: &StateEntry| entry.key.clone());
            all.extend(entries.into_iter().map(|entry| (entry.key.clone(), entry.value())));
            if !more {
                return Ok((all, since));
            }
        }
    }

    async fn watch(&self, prefix: &str, after: u64) -> Result<Follow, StoreError> {
        let (session, outbox) = self.broker.open_session();
        let open = SessionOpen {
            session,
            front: Front::Internal,
            client_id: "".into(),
            clean_start: true,
            expiry_s: 0,
            receive_max: u16::MAX,
            will: None,
        };
        self.broker.send(Event::SessionOpened(open), 0).await?;
        let follow = Follow { broker: self.broker.clone(), outbox, queue: VecDeque::new(), owed: 0 };
        let command = Command::StateWatch {
            session,
            origin: Arc::clone(&self.origin),
            space: self.name.into(),
            prefixes: vec![prefix.to_owned()],
            from: Some(after + 1),
            with_previous: false,
        };
        let refused = match self.broker.call(command).await? {
            Response::Done => return Ok(follow),
            Response::TooOld { oldest } => StoreError::TooOld { oldest },
            Response::Refused(reason) => StoreError::Refused(reason),
            _ => StoreError::Refused(format!("space {} cannot be watched", self.name)),
        };
        follow.close().await;
        Err(refused)
    }
}

/// A watch of one space.
struct Follow {
    broker: Handle,
    outbox: Outbox,
    queue: VecDeque<Output>,
    owed: usize,
}

impl Follow {
    /// The next key that changed, and its value now. Cancel safe.
    async fn next(&mut self) -> Result<(String, Option<Bytes>), StoreError> {
        loop {
            while let Some(output) = self.queue.pop_front() {
                self.owed += output.cost();
                match output {
                    Output::State(StateEvent::Put { entry, .. }) => {
                        let value = entry.value();
                        return Ok((entry.key, Some(value)));
                    }
                    Output::State(StateEvent::Deleted { key, .. }) => return Ok((key, None)),
                    Output::State(StateEvent::TooOld { oldest }) => {
                        return Err(StoreError::TooOld { oldest });
                    }
                    Output::Close(_) => return Err(Stopped.into()),
                    _ => {}
                }
            }
            if self.owed > 0 {
                let sent = Event::Sent { session: self.outbox.session(), bytes: self.owed };
                self.broker.send(sent, 0).await?;
                self.owed = 0;
            }
            self.outbox.recv(&mut self.queue).await;
        }
    }

    async fn close(self) {
        let closed = Event::SessionClosed { session: self.outbox.session(), clean: true };
        if self.broker.send(closed, 0).await.is_err() {
            tracing::debug!("the broker stopped before a watch was closed");
        }
    }
}
