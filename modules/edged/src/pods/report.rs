//! What this node says of its pods: entries of space `status`, written when they changed, and events in a Log.
//!
//! Of an entry only the newest value waits to be written, so that a node whose store is slow falls behind by what
//! changed and not by how often. Events wait in a bounded queue; what does not fit is counted and logged.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use broker::{
    Handle, Stopped, clock,
    event::{Command, Event, Expect, Front, Publish, Response, SessionOpen, StateChange, StateOp, Target},
};
use bytes::Bytes;
use codec::frame::FrameParts;
use k8s_openapi::api::core::v1::Pod;
use serde_json::{Value, json};
use tokio::sync::Notify;

use super::{spec, status::time};

/// Topic of events: what a hub makes Event objects of.
pub const EVENT_TOPIC: &str = "$octobus/event";
/// The space.
pub(crate) const SPACE: &str = "status";

/// Events that wait to be published, and what is remembered of published ones to count repetitions.
const WAITING_MAX: usize = 1_024;
const REMEMBERED_MAX: usize = 512;
/// Operations of one write: far below what the broker allows.
const WRITE_OPS: usize = 256;
/// Between attempts while the store refuses.
const RETRY: Duration = Duration::from_secs(1);

/// Something happened to a pod.
#[derive(Debug, Clone)]
pub(crate) struct Happening {
    pub(crate) pod: Arc<Pod>,
    pub(crate) warning: bool,
    pub(crate) reason: &'static str,
    pub(crate) message: String,
    pub(crate) container: Option<String>,
}

/// See the module's documentation. Clones are the same.
#[derive(Debug, Clone)]
pub(crate) struct Reporter {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    node: String,
    pending: Mutex<Pending>,
    changed: Notify,
    dropped: AtomicU64,
}

#[derive(Debug, Default)]
struct Pending {
    /// `None`: to be deleted.
    entries: BTreeMap<String, Option<Bytes>>,
    events: VecDeque<Bytes>,
    /// How often, and since when.
    seen: HashMap<(String, &'static str, String), (i32, i64)>,
    order: VecDeque<(String, &'static str, String)>,
}

impl Reporter {
    pub(crate) fn new(node: &str) -> Self {
        let (pending, changed, dropped) = (Mutex::default(), Notify::new(), AtomicU64::new(0));
        Self { shared: Arc::new(Shared { node: node.to_owned(), pending, changed, dropped }) }
    }

    /// The key has this value from now on.
    pub(crate) fn put(&self, key: String, value: Bytes) {
        self.pending().entries.insert(key, Some(value));
        self.shared.changed.notify_one();
    }

    /// The key is of no use any more.
    pub(crate) fn delete(&self, key: String) {
        self.pending().entries.insert(key, None);
        self.shared.changed.notify_one();
    }

    /// Tells an event of a pod.
    pub(crate) fn happened(&self, happening: Happening) {
        let Happening { pod, warning, reason, message, container } = happening;
        let field = container.map(|name| {
            let init = spec::inits(&pod).any(|init| init.name == name);
            format!("spec.{}{{{name}}}", if init { "initContainers" } else { "containers" })
        });
        let object = json!({
            "kind": "Pod", "apiVersion": "v1", "namespace": spec::namespace(&pod), "name": spec::name(&pod),
            "uid": spec::uid(&pod), "fieldPath": field,
        });
        self.tell(spec::namespace(&pod), object, warning, reason, message);
    }

    /// Tells an event of the node itself.
    pub(crate) fn of_node(&self, warning: bool, reason: &'static str, message: String) {
        let node = &self.shared.node;
        let object = json!({ "kind": "Node", "apiVersion": "v1", "name": node, "uid": node });
        self.tell("default", object, warning, reason, message);
    }

    fn tell(&self, namespace: &str, object: Value, warning: bool, reason: &'static str, message: String) {
        let now = i64::try_from(clock::wall_us()).unwrap_or(i64::MAX).saturating_mul(1_000);
        let mut pending = self.pending();
        let what = (object.to_string(), reason, message.clone());
        let (count, first) = match pending.seen.get_mut(&what) {
            Some((count, first)) => {
                *count = count.saturating_add(1);
                (*count, *first)
            }
            None => {
                pending.seen.insert(what.clone(), (1, now));
                pending.order.push_back(what);
                if pending.order.len() > REMEMBERED_MAX
                    && let Some(oldest) = pending.order.pop_front()
                {
                    pending.seen.remove(&oldest);
                }
                (1, now)
            }
        };
        if pending.events.len() >= WAITING_MAX {
            self.shared.dropped.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let event = json!({
            "apiVersion": "v1", "kind": "Event", "metadata": { "namespace": namespace },
            "involvedObject": object, "reason": reason, "message": message,
            "type": if warning { "Warning" } else { "Normal" }, "count": count,
            "firstTimestamp": time(first), "lastTimestamp": time(now),
            "source": { "component": "octobus-edged", "host": self.shared.node },
            "reportingComponent": "octobus-edged", "reportingInstance": self.shared.node,
        });
        pending.events.push_back(Bytes::from(event.to_string()));
        drop(pending);
        self.shared.changed.notify_one();
    }

    fn pending(&self) -> std::sync::MutexGuard<'_, Pending> {
        self.shared.pending.lock().expect("no panic under this lock")
    }

    /// Entries that wait to be written.
    #[cfg(test)]
    pub(crate) fn take_entries(&self) -> BTreeMap<String, Option<Bytes>> {
        std::mem::take(&mut self.pending().entries)
    }

    /// Writes what waits, until the broker stops.
    pub(crate) async fn run(self, handle: Handle) {
        if let Err(Stopped) = self.write_all(&handle).await {
            tracing::debug!("the broker stopped: no more is reported of pods");
        }
    }

    async fn write_all(&self, handle: &Handle) -> Result<(), Stopped> {
        let (session, mut outbox) = handle.open_session();
        let open = SessionOpen {
            session,
            front: Front::Internal,
            client_id: "".into(),
            clean_start: true,
            expiry_s: 0,
            receive_max: u16::MAX,
            will: None,
        };
        handle.send(Event::SessionOpened(open), 0).await?;
        let mut answers = VecDeque::new();
        loop {
            self.shared.changed.notified().await;
            while self.write_some(handle).await? {}
            let events = std::mem::take(&mut self.pending().events);
            let messages: Vec<Publish> = events.into_iter().map(|payload| event(&payload)).collect();
            if !messages.is_empty() {
                let bytes = messages.iter().map(|message| message.frame.len()).sum();
                handle.send(Event::Published { session, messages }, bytes).await?;
            }
            if outbox.try_recv(&mut answers) {
                let bytes = answers.drain(..).map(|output| output.cost()).sum();
                handle.send(Event::Sent { session, bytes }, 0).await?;
            }
            let dropped = self.shared.dropped.swap(0, Ordering::Relaxed);
            if dropped > 0 {
                tracing::warn!(dropped, "events of pods came faster than they were taken");
            }
        }
    }

    /// One write; true if more waits.
    async fn write_some(&self, handle: &Handle) -> Result<bool, Stopped> {
        let mut writing = BTreeMap::new();
        let more = {
            let mut pending = self.pending();
            while writing.len() < WRITE_OPS
                && let Some((key, value)) = pending.entries.pop_first()
            {
                writing.insert(key, value);
            }
            !pending.entries.is_empty()
        };
        if writing.is_empty() {
            return Ok(false);
        }
        let op = |(key, value): (&String, &Option<Bytes>)| StateOp {
            space: SPACE.into(),
            key: key.clone(),
            change: value.clone().map_or(StateChange::Delete, StateChange::Put),
            expect: Expect::Any,
        };
        let ops = writing.iter().map(op).collect();
        match handle.call(Command::StateWrite(ops)).await? {
            Response::Written(_) => Ok(more),
            other => {
                tracing::warn!(?other, "the status of pods cannot be written; trying again");
                {
                    let mut pending = self.pending();
                    for (key, value) in writing {
                        pending.entries.entry(key).or_insert(value);
                    }
                }
                tokio::time::sleep(RETRY).await;
                Ok(true)
            }
        }
    }
}

fn event(payload: &Bytes) -> Publish {
    let time_us = clock::wall_us();
    let frame = FrameParts {
        topic: EVENT_TOPIC,
        time_us,
        time_trusted: time_us >= clock::TRUSTED_FROM_US,
        payload,
        ..FrameParts::default()
    };
    Publish {
        target: Target::Own,
        frame: frame.encode(),
        qos: 1,
        packet_id: 0,
        dup: false,
        retain: false,
        reply: None,
    }
}
