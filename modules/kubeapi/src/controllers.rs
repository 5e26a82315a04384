//! Controllers: tasks over the same objects, each level-triggered from the one cache.
//!
//! A controller has a set of keys that want a look. Changes in the cache put keys into it; a look reads what
//! is there now, writes what should be, and is repeated with back-off when it fails. Before each look the
//! cache is awaited up to the controller's own last write, so that it never acts twice on what it has not
//! seen yet.

mod accounts;
mod budgets;
mod daemon_sets;
mod definitions;
mod deployments;
mod endpoints;
mod events;
mod garbage;
mod jobs;
mod namespaces;
mod nodes;
mod pods;
mod replica_sets;
mod scheduler;

use std::{
    collections::BTreeMap,
    future::Future,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use broker::Tasks;
use serde_json::Value;
use tokio::{
    sync::Notify,
    time::{Instant, sleep_until},
};

use crate::{
    api::{
        Api, Ask, Done,
        delete::{Options, Propagation},
    },
    json,
    registry::Resource,
    status::Status,
};

/// First and longest wait after a look that failed.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(30));

/// What a controller is.
trait Controller: Send + Sync + 'static {
    /// Its name: who writes.
    const NAME: &'static str;
    /// Who is noted as having set the fields: what clients of Kubernetes know.
    const MANAGER: &'static str = "kube-controller-manager";

    /// Which keys want a look when this object changes from `old` to `new`.
    fn keys(&self, key: &str, old: Option<&Value>, new: Option<&Value>) -> Vec<String>;

    /// Looks at a key. `Some`: and again after that long.
    fn look(&self, world: &World, key: &str)
    -> impl Future<Output = Result<Option<Duration>, Status>> + Send;
}

/// Starts what keeps the objects together, and with `all` what makes workloads of them.
pub(crate) fn start(api: &Arc<Api>, tasks: &Tasks, all: bool) {
    let (following, store, stop) = (Arc::clone(api), api.store.clone(), tasks.stopped());
    tasks.spawn("kubernetes cache", async move { following.cache.run(store, stop).await });
    run(api, tasks, definitions::Definitions);
    run(api, tasks, namespaces::Namespaces);
    run(api, tasks, garbage::Garbage::new(Arc::clone(&api.registry)));
    if all {
        run(api, tasks, accounts::Accounts);
        run(api, tasks, budgets::Budgets);
        run(api, tasks, daemon_sets::DaemonSets);
        run(api, tasks, deployments::Deployments);
        run(api, tasks, endpoints::Endpoints);
        run(api, tasks, events::Events);
        run(api, tasks, jobs::Jobs);
        run(api, tasks, nodes::Nodes::default());
        run(api, tasks, replica_sets::ReplicaSets);
        run(api, tasks, scheduler::Scheduler);
    }
}

/// Serves the custom resources that the cache knows.
pub(crate) fn serve_definitions(api: &Api) {
    definitions::serve(api);
}

fn run<C: Controller>(api: &Arc<Api>, tasks: &Tasks, controller: C) {
    let queue = Arc::new(Queue::default());
    let controller = Arc::new(controller);
    let (putting, keys) = (Arc::clone(&queue), Arc::clone(&controller));
    api.cache.follow(Box::new(move |key, old, new| {
        for key in keys.keys(key, old, new) {
            putting.put(key);
        }
    }));
    let (world, stop) = (World::new(Arc::clone(api), C::NAME, C::MANAGER), tasks.stopped());
    tasks.spawn(C::NAME, async move {
        tokio::select! {
            biased;
            () = stop.cancelled() => {}
            () = work(&queue, &*controller, &world) => {}
        }
    });
}

async fn work<C: Controller>(queue: &Queue, controller: &C, world: &World) {
    let mut failures: BTreeMap<String, u32> = BTreeMap::new();
    loop {
        let key = queue.take().await;
        world.api.cache.reaches(world.written.load(Ordering::Relaxed)).await;
        match controller.look(world, &key).await {
            Ok(again) => {
                failures.remove(&key);
                if let Some(after) = again {
                    queue.put_after(key, after);
                }
            }
            Err(status) => {
                let count = failures.entry(key.clone()).or_default();
                *count = count.saturating_add(1);
                let wait = BACKOFF.0.saturating_mul(1 << (*count).min(12)).min(BACKOFF.1);
                if status.code != 409 {
                    tracing::debug!(controller = C::NAME, %key, error = %status.message, "looking again later");
                }
                queue.put_after(key, wait);
            }
        }
    }
}

/// Keys that want a look, and when. A key stands in it once: its size is that of the objects.
#[derive(Debug, Default)]
struct Queue {
    due: Mutex<BTreeMap<String, Instant>>,
    changed: Notify,
}

impl Queue {
    fn put(&self, key: String) {
        self.due.lock().expect("no panic under this lock").insert(key, Instant::now());
        self.changed.notify_one();
    }

    fn put_after(&self, key: String, wait: Duration) {
        let at = Instant::now() + wait;
        // A change that came meanwhile is looked at sooner.
        self.due.lock().expect("no panic under this lock").entry(key).or_insert(at);
        self.changed.notify_one();
    }

    /// The next key that is due. Cancel safe: the key is taken in the last step.
    async fn take(&self) -> String {
        loop {
            let next = {
                let mut due = self.due.lock().expect("no panic under this lock");
                let first = due.iter().min_by_key(|(_, at)| **at).map(|(key, at)| (key.clone(), *at));
                match first {
                    Some((key, at)) if at <= Instant::now() => {
                        due.remove(&key);
                        return key;
                    }
                    first => first.map(|(_, at)| at),
                }
            };
            match next {
                Some(at) => tokio::select! {
                    () = self.changed.notified() => {}
                    () = sleep_until(at) => {}
                },
                None => self.changed.notified().await,
            }
        }
    }
}

/// What a controller sees and how it writes.
#[derive(Debug)]
struct World {
    api: Arc<Api>,
    name: &'static str,
    /// Who is noted as having set the fields.
    manager: &'static str,
    /// The newest revision that this controller wrote.
    written: AtomicU64,
}

impl World {
    fn new(api: Arc<Api>, name: &'static str, manager: &'static str) -> Self {
        Self { api, name, manager, written: AtomicU64::new(0) }
    }

    fn ask(&self, resource: &Arc<Resource>, namespace: &str, name: &str) -> Ask {
        let ask = Ask::internal(&format!("system:{}", self.name), resource, namespace, name);
        Ask { manager: self.manager.to_owned(), ..ask }
    }

    async fn create(
        &self,
        resource: &Arc<Resource>,
        namespace: &str,
        object: Value,
    ) -> Result<Value, Status> {
        let done = self.api.create(&self.ask(resource, namespace, ""), object).await?;
        Ok(self.noted(done))
    }

    /// Changes an object, or a part of it.
    async fn amend(
        &self,
        resource: &Arc<Resource>,
        object: &Value,
        part: &str,
        change: &(dyn Fn(&mut Value) + Send + Sync),
    ) -> Result<Value, Status> {
        let ask =
            self.ask(resource, json::text(object, "metadata.namespace"), json::text(object, "metadata.name"));
        let uid = json::text(object, "metadata.uid").to_owned();
        let pinned = |held: &mut Value| {
            change(held);
            // Another object may have taken its name.
            json::set(held, "metadata.uid", uid.clone());
        };
        let done = self.api.amend(&ask.of(part), &pinned).await?;
        Ok(self.noted(done))
    }

    /// Deletes this very object; that it is gone already is well.
    async fn delete(&self, resource: &Arc<Resource>, object: &Value) -> Result<(), Status> {
        let ask =
            self.ask(resource, json::text(object, "metadata.namespace"), json::text(object, "metadata.name"));
        let options = Options {
            uid: Some(json::text(object, "metadata.uid").to_owned()),
            propagation: Propagation::Background,
            ..Options::default()
        };
        match self.api.delete(&ask, &options).await {
            Ok(_) => {
                let revision = self.api.store.revision().await?;
                self.written.fetch_max(revision, Ordering::Relaxed);
                Ok(())
            }
            Err(status) if status.code == 404 || status.code == 409 => Ok(()),
            Err(status) => Err(status),
        }
    }

    fn noted(&self, done: Done) -> Value {
        let revision = json::text(&done.object, "metadata.resourceVersion").parse().unwrap_or(0);
        self.written.fetch_max(revision, Ordering::Relaxed);
        done.object
    }
}

/// Namespace and name of a key.
fn place_of(key: &str) -> (&str, &str) {
    let mut parts = key.rsplitn(3, '/');
    let name = parts.next().unwrap_or_default();
    (parts.next().unwrap_or_default(), name)
}

/// The owner that manages an object.
fn controller_of(object: &Value) -> Option<&Value> {
    json::list(object, "metadata.ownerReferences").iter().find(|owner| json::truth(owner, "controller"))
}

/// The key of the managing owner, if it is of this resource.
fn owner_key(resource: &Resource, object: &Value) -> Option<String> {
    let owner = controller_of(object)?;
    let is = json::text(owner, "kind") == resource.kind
        && json::text(owner, "apiVersion") == resource.api_version();
    is.then(|| resource.key(json::text(object, "metadata.namespace"), json::text(owner, "name")))
}

/// Whether an object is being deleted.
fn is_ending(object: &Value) -> bool {
    json::at(object, "metadata.deletionTimestamp").is_some()
}

/// Writes what a controller says of an object, if it is anything new.
async fn write_status(
    world: &World,
    resource: &Arc<Resource>,
    object: &Value,
    status: &Value,
) -> Result<(), Status> {
    let said = status.as_object().into_iter().flatten();
    let new = said.into_iter().any(|(field, value)| {
        let held = json::at(object, "status").and_then(|status| status.get(field));
        // What is zero is left out.
        held != Some(value) && !(held.is_none() && (*value == 0 || value.is_null()))
    });
    if !new {
        return Ok(());
    }
    let change = |object: &mut Value| {
        for (field, value) in status.as_object().into_iter().flatten() {
            json::map_mut(object, "status").insert(field.clone(), value.clone());
        }
    };
    world.amend(resource, object, "status", &change).await?;
    Ok(())
}
