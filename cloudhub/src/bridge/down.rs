//! From the API server to `fleet`.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use serde_json::{Value, json};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};
use tokio::time::Instant;

use super::{
    Bridge, Outcome, TokenHeld,
    json::{text, version},
    node,
    pod::{self, Pod, Token},
    watch::{Update, Watched},
    work::Task,
};
use crate::fabric::FabricError;

/// Keys of projected tokens.
pub(super) const TOKENS: &str = "obj/octobus.io/tokens/";
const NODES: &str = "obj/core/nodes/-/";
/// A node may be offline for long: tokens are asked for at least this long.
const TOKEN_SECONDS_MIN: u64 = 24 * 60 * 60;

impl Bridge {
    /// True once so much waits to be written that it should be.
    pub(super) fn on_update(&mut self, what: Watched, update: Update) -> bool {
        match update {
            Update::Begun => {
                self.listing.insert(what, std::collections::HashSet::new());
            }
            Update::Seen(object) => {
                let key = pod::key(what.resource(), &object);
                if let Some(seen) = self.listing.get_mut(&what) {
                    seen.insert(Arc::clone(&key));
                }
                return self.on_seen(what, key, object);
            }
            Update::Gone(object) => self.on_gone(what, &pod::key(what.resource(), &object)),
            Update::Complete => {
                let seen = self.listing.remove(&what).unwrap_or_default();
                for key in self.known(what) {
                    if !seen.contains(&key) {
                        self.on_gone(what, &key);
                    }
                }
                self.listed.insert(what);
                if what == Watched::Nodes {
                    self.look_at_all_nodes();
                }
            }
        }
        false
    }

    /// Keys of what is known of a kind.
    fn known(&self, what: Watched) -> Vec<Arc<str>> {
        let prefix = format!("obj/core/{}/", what.resource());
        let of_kind = |key: &&Arc<str>| key.starts_with(&prefix);
        match what {
            Watched::Pods => self.pods.keys().cloned().collect(),
            Watched::Nodes => {
                let there = self.nodes.iter().filter(|(_, node)| node.object.is_some());
                there.map(|(name, _)| node_key(name)).collect()
            }
            _ => self.metas.keys().filter(of_kind).cloned().collect(),
        }
    }

    fn on_seen(&mut self, what: Watched, key: Arc<str>, object: Value) -> bool {
        match what {
            Watched::Pods => self.on_pod(key, object),
            Watched::Nodes => self.on_node(key, object),
            Watched::Secrets | Watched::ConfigMaps | Watched::Accounts => {
                let meta = (text(&object, "metadata.uid").into(), version(&object));
                self.metas.insert(Arc::clone(&key), meta);
                self.need(&key);
                false
            }
        }
    }

    fn on_gone(&mut self, what: Watched, key: &Arc<str>) {
        match what {
            Watched::Pods => self.forget_pod(key),
            Watched::Nodes => {
                let name = key.strip_prefix(NODES).unwrap_or_default();
                if let Some(node) = self.nodes.get_mut(name) {
                    node.object = None;
                    node.written = None;
                    self.look_at_node(name);
                }
                self.unused.insert(Arc::clone(key));
            }
            Watched::Secrets | Watched::ConfigMaps | Watched::Accounts => {
                self.metas.remove(key);
                self.swift.drop_due(&Task::Fetch(Arc::clone(key)));
                self.let_go(key);
            }
        }
    }

    /// A key is not what a node should have any more, whoever names it.
    fn let_go(&mut self, key: &Arc<str>) {
        self.unused.insert(Arc::clone(key));
        self.dirty.extend(self.users.get(key).into_iter().flat_map(|nodes| nodes.keys().cloned()));
    }

    /// Fetches what pods name and what is not yet in `fleet` as it is.
    fn need(&mut self, key: &Arc<str>) {
        let Some((uid, version)) = self.metas.get(key).filter(|_| self.users.contains_key(key)) else {
            return;
        };
        if !self.mirror.is_current(key, uid, *version) {
            self.swift.put(Task::Fetch(Arc::clone(key)));
        }
    }

    fn on_node(&mut self, key: Arc<str>, object: Value) -> bool {
        let name: Arc<str> = text(&object, "metadata.name").into();
        let held = node::Object::read(&object, &self.tier);
        let ours = held.ours;
        let node = self.nodes.entry(Arc::clone(&name)).or_insert_with(super::up::not_enrolled);
        if node.object.as_ref().is_some_and(|known| known.uid != held.uid) {
            node.written = None;
        }
        node.object = Some(held);
        let enrolled = node.enrolled;
        self.look_at_node(&name);
        if !(ours && enrolled) {
            return false;
        }
        self.dirty.insert(name);
        self.mirror.put(&key, &pod::for_node(object))
    }

    fn on_pod(&mut self, key: Arc<str>, object: Value) -> bool {
        let read = Pod::read(&object).filter(|pod| self.is_ours(&pod.node));
        let Some(pod) = read else {
            self.forget_pod(&key);
            return false;
        };
        let node = Arc::clone(&pod.node);
        let for_node = pod.mirror.is_none().then(|| pod::for_node(object.clone()));
        let full = for_node.is_some_and(|object| self.mirror.put(&key, &object));
        let before = self.pods.insert(Arc::clone(&key), pod.clone());
        let named = before.as_ref().filter(|before| before.mirror.is_none());
        let named = named.map(|before| (Arc::clone(&before.node), before.references.clone()));
        if pod.mirror.is_none() {
            for reference in &pod.references {
                let users = self.users.entry(Arc::clone(reference)).or_default();
                *users.entry(Arc::clone(&node)).or_default() += 1;
                self.need(reference);
            }
            self.ask_for_tokens(&key, &pod);
        }
        if let Some((node, references)) = named {
            self.unname(&node, &references);
        }
        if let Some(before) = before {
            for token in before.tokens.iter().filter(|held| !pod.tokens.iter().any(|new| new.key == held.key))
            {
                self.forget_token(&token.key);
            }
        }
        self.pods_of.entry(Arc::clone(&node)).or_default().insert(Arc::clone(&key));
        self.dirty.insert(node);
        self.compare(&key);
        self.apply_policy(&key, &object);
        if pod.mirror.is_some() {
            self.work.put(Task::Static(key));
        }
        full
    }

    /// A pod is gone, or is no node's of ours.
    pub(super) fn forget_pod(&mut self, key: &Arc<str>) {
        let Some(pod) = self.pods.remove(key) else { return };
        if let Some(pods) = self.pods_of.get_mut(&pod.node) {
            pods.remove(key);
            if pods.is_empty() {
                self.pods_of.remove(&pod.node);
            }
        }
        if pod.mirror.is_none() {
            self.unname(&pod.node, &pod.references);
            for token in &pod.tokens {
                self.forget_token(&token.key);
            }
        }
        for task in [Task::Status, Task::Delete, Task::Tolerate, Task::Evict] {
            self.work.drop_due(&task(Arc::clone(key)));
        }
        self.tolerations.remove(key);
        if pod.mirror.is_some() && self.statics.contains_key(key) {
            self.work.put(Task::Static(Arc::clone(key)));
        }
        self.unused.insert(Arc::clone(key));
        self.dirty.insert(pod.node);
    }

    fn unname(&mut self, node: &Arc<str>, references: &BTreeSet<Arc<str>>) {
        for reference in references {
            let Some(users) = self.users.get_mut(reference) else { continue };
            if let Some(count) = users.get_mut(node) {
                *count -= 1;
                if *count == 0 {
                    users.remove(node);
                }
            }
            if users.is_empty() {
                self.users.remove(reference);
                self.swift.drop_due(&Task::Fetch(Arc::clone(reference)));
                self.unused.insert(Arc::clone(reference));
            }
        }
    }

    fn ask_for_tokens(&mut self, key: &Arc<str>, pod: &Pod) {
        for token in &pod.tokens {
            self.token_of.insert(Arc::clone(&token.key), Arc::clone(key));
            let held = self.tokens.get(&token.key);
            let held = held.filter(|held| held.uid == pod.uid && held.audience == token.audience);
            let task = Task::Token(Arc::clone(&token.key));
            match held {
                Some(held) => self.work.put_at(task, held.renew_at),
                None => self.work.put(task),
            }
        }
    }

    fn forget_token(&mut self, key: &Arc<str>) {
        self.token_of.remove(key);
        self.tokens.remove(key);
        self.work.drop_due(&Task::Token(Arc::clone(key)));
        self.unused.insert(Arc::clone(key));
    }

    /// A key was fetched, or is not there.
    pub(super) fn on_fetched(&mut self, key: &Arc<str>, object: Option<Value>) {
        match object {
            Some(object) if self.users.contains_key(key) => {
                // The metadata may be newer than what was fetched: it is fetched once more then.
                self.mirror.put(key, &pod::for_node(object));
                let users = self.users.get(key).into_iter().flat_map(|nodes| nodes.keys().cloned());
                self.dirty.extend(users);
            }
            Some(_) => {}
            None => self.let_go(key),
        }
    }

    /// What a token's request is made of: its pod's key, and the token.
    pub(super) fn token(&self, key: &str) -> Option<(&Arc<str>, &Pod, &Token)> {
        let pod_key = self.token_of.get(key)?;
        let pod = self.pods.get(pod_key)?;
        let token = pod.tokens.iter().find(|token| &*token.key == key)?;
        Some((pod_key, pod, token))
    }

    /// Asks for a token of the pod's account, bound to the pod.
    pub(super) fn request_token(&mut self, task: Task, key: &Arc<str>) {
        let Some((pod_key, pod, token)) = self.token(key) else { return };
        let name = pod_key.rsplit('/').next().unwrap_or_default();
        let path = format!("/api/v1/namespaces/{}/serviceaccounts/{}/token", pod.namespace, pod.account);
        let audiences: Vec<&str> =
            Some(token.audience.as_str()).filter(|name| !name.is_empty()).into_iter().collect();
        let request = json!({
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenRequest",
            "spec": {
                "audiences": audiences,
                "expirationSeconds": token.seconds.max(TOKEN_SECONDS_MIN),
                "boundObjectRef": {"apiVersion": "v1", "kind": "Pod", "name": name, "uid": &*pod.uid},
            },
        });
        let cluster = self.cluster.clone();
        self.work.start(task, async move {
            Outcome::Object(cluster.create("serviceaccounts/token", &path, &request).await.map(Some))
        });
    }

    /// A token came.
    pub(super) fn on_token(&mut self, key: &Arc<str>, answer: &Value) {
        let Some((_, pod, token)) = self.token(key) else { return };
        let (uid, audience, node) = (Arc::clone(&pod.uid), token.audience.clone(), Arc::clone(&pod.node));
        let expires = text(answer, "status.expirationTimestamp");
        let value = json!({
            "podUid": &*uid,
            "audience": audience,
            "token": text(answer, "status.token"),
            "expirationTimestamp": expires,
        });
        let lasts = seconds_until(expires);
        let renew_at = Instant::now() + Duration::from_secs(lasts.max(60) * 4 / 5);
        self.tokens.insert(Arc::clone(key), TokenHeld { uid, audience, renew_at });
        self.work.put_at(Task::Token(Arc::clone(key)), renew_at);
        self.mirror.put(key, &value);
        self.dirty.insert(node);
    }

    fn is_ours(&self, node: &str) -> bool {
        self.nodes.get(node).is_some_and(|node| node.enrolled)
    }

    /// Writes what is known to be different.
    ///
    /// # Errors
    /// The fabric does not answer; what was to be written still is.
    pub(super) async fn settle(&mut self) -> Result<(), FabricError> {
        if !self.enrolled || Watched::ALL.iter().any(|what| !self.listed.contains(what)) {
            return Ok(());
        }
        self.mirror.flush().await?;
        if !self.complete {
            self.unused.extend(self.mirror.keys().cloned());
            self.dirty.extend(
                self.nodes.iter().filter(|(_, node)| node.enrolled).map(|(name, _)| Arc::clone(name)),
            );
            self.dirty.extend(self.mirror.wanting().cloned());
        }
        // First what is deleted: what a want merely ceases to list looks to a node like a mistake, if it is much.
        let unused = std::mem::take(&mut self.unused);
        let unused: Vec<Arc<str>> = unused.into_iter().filter(|key| !self.is_needed(key)).collect();
        if let Err(error) = self.mirror.delete(&unused).await {
            self.unused.extend(unused);
            return Err(error);
        }
        for name in self.dirty.clone() {
            if !self.is_ours(&name) {
                self.mirror.forget_want(&name).await?;
                self.dirty.remove(&name);
                continue;
            }
            let Some(keys) = self.wanted(&name) else { continue };
            let keys: BTreeSet<&str> = keys.iter().map(|key| &**key).collect();
            self.mirror.want(&name, &keys).await?;
            self.dirty.remove(&name);
        }
        if !self.complete && self.dirty.is_empty() {
            self.mirror.barrier().await?;
            self.complete = true;
            tracing::info!(
                pods = self.pods.len(),
                nodes = self.nodes.len(),
                "fleet is what the Kubernetes API says"
            );
        }
        Ok(())
    }

    /// What a node must have; `None` while something of it is being fetched.
    fn wanted(&self, name: &str) -> Option<BTreeSet<Arc<str>>> {
        let mut wanted = BTreeSet::new();
        let own = node_key(name);
        if self.mirror.has(&own) && self.nodes.get(name).is_some_and(|node| node.object.is_some()) {
            wanted.insert(own);
        }
        for key in self.pods_of.get(name).into_iter().flatten() {
            let pod = &self.pods[key];
            if pod.mirror.is_some() {
                continue;
            }
            wanted.insert(Arc::clone(key));
            for reference in &pod.references {
                if self.swift.is_open(&Task::Fetch(Arc::clone(reference))) {
                    return None;
                }
                if self.mirror.has(reference) && self.metas.contains_key(reference) {
                    wanted.insert(Arc::clone(reference));
                }
            }
            for token in &pod.tokens {
                let known = self.tokens.contains_key(&token.key);
                if !known && self.work.is_open(&Task::Token(Arc::clone(&token.key))) {
                    return None;
                }
                if known && self.mirror.has(&token.key) {
                    wanted.insert(Arc::clone(&token.key));
                }
            }
        }
        Some(wanted)
    }

    fn is_needed(&self, key: &Arc<str>) -> bool {
        if let Some(name) = key.strip_prefix(NODES) {
            return self.nodes.get(name).is_some_and(|node| node.enrolled && node.object.is_some());
        }
        if key.starts_with(TOKENS) {
            return self.token_of.contains_key(key);
        }
        let pod = self.pods.get(key).is_some_and(|pod| pod.mirror.is_none());
        pod || self.users.contains_key(key) && self.metas.contains_key(key)
    }
}

/// Key in `fleet` of a node's own object.
pub(super) fn node_key(name: &str) -> Arc<str> {
    format!("{NODES}{name}").into()
}

/// A token as it was left: renewed when a fifth of the time that is asked for at least is left.
pub(super) fn token_held(value: &Value) -> TokenHeld {
    let left = seconds_until(text(value, "expirationTimestamp")).saturating_sub(TOKEN_SECONDS_MIN / 5);
    TokenHeld {
        uid: text(value, "podUid").into(),
        audience: text(value, "audience").to_owned(),
        renew_at: Instant::now() + Duration::from_secs(left),
    }
}

fn seconds_until(time: &str) -> u64 {
    let at = OffsetDateTime::parse(time, &Rfc3339).map_or(0, OffsetDateTime::unix_timestamp);
    u64::try_from(at).unwrap_or(0).saturating_sub(broker::clock::wall_us() / 1_000_000)
}
