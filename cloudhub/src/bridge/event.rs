//! What nodes tell of their pods and of themselves, as Event objects: the same thing told again raises the
//! count of the one there is.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Duration,
};

use serde_json::{Value, json};
use tokio::time::Instant;

use super::{
    Bridge, Outcome,
    cluster::{Cluster, MERGE},
    json::{at, digest, text},
    node::now,
    pod,
    work::Task,
};

/// Topic at which a node publishes them.
pub(super) const TOPIC: &str = "$octobus/event";
/// Events that are remembered; beyond, the oldest is forgotten and told anew if it comes again.
const KEPT_MAX: usize = 4_096;
/// An event that comes again is written again after this long at the soonest.
const AGAIN_AFTER: Duration = Duration::from_secs(10);
/// Longest message that is passed on, bytes; a server takes no more than 1 024.
const MESSAGE_MAX: usize = 1_000;

/// Events that were told of late.
#[derive(Debug, Default)]
pub(super) struct Events {
    /// By what makes two of them the same.
    kept: HashMap<u64, Kept>,
    /// In the order in which they were told last.
    order: BTreeMap<u64, u64>,
    told: u64,
}

#[derive(Debug)]
struct Kept {
    namespace: String,
    name: String,
    object: Value,
    count: u64,
    turn: u64,
    /// The API has it.
    made: bool,
}

impl Events {
    /// Takes in an event; which one it is.
    fn tell(&mut self, namespace: &str, object: Value) -> (u64, bool) {
        let same =
            json!([namespace, object["involvedObject"], object["reason"], object["message"], object["type"]]);
        let id = digest(&same);
        self.told += 1;
        let turn = self.told;
        let count = at(&object, "count").and_then(Value::as_u64).unwrap_or(1).max(1);
        let made = match self.kept.get_mut(&id) {
            Some(kept) => {
                self.order.remove(&kept.turn);
                // A node that counts itself says the sum, another one says each.
                kept.count = if count > 1 { count.max(kept.count) } else { kept.count + 1 };
                kept.object["lastTimestamp"] = object["lastTimestamp"].clone();
                kept.turn = turn;
                kept.made
            }
            None => {
                let name = format!("{}.{id:016x}", text(&object, "involvedObject.name"));
                let namespace = namespace.to_owned();
                self.kept.insert(id, Kept { namespace, name, object, count, turn, made: false });
                false
            }
        };
        self.order.insert(turn, id);
        while self.kept.len() > KEPT_MAX {
            let Some((_, oldest)) = self.order.pop_first() else { break };
            self.kept.remove(&oldest);
        }
        (id, made)
    }
}

impl Bridge {
    /// A node tells of an event. It is believed of itself and of its pods.
    pub(super) fn on_event(&mut self, origin: &Arc<str>, payload: &[u8]) {
        let Ok(told) = serde_json::from_slice::<Value>(payload) else { return };
        let about = at(&told, "involvedObject").cloned().unwrap_or_default();
        let (kind, namespace, name) = (text(&about, "kind"), text(&about, "namespace"), text(&about, "name"));
        let own = match kind {
            "Node" => name == &**origin,
            "Pod" => {
                let pod = self.pods.get(&pod::key_of("pods", namespace, name));
                pod.is_some_and(|pod| pod.node == *origin)
            }
            _ => false,
        };
        if !own || text(&told, "reason").is_empty() {
            return tracing::debug!(node = %origin, kind, name, "an event about what is not the node's own");
        }
        let message: String = text(&told, "message").chars().take(MESSAGE_MAX / 4).collect();
        let when = |field: &str| match text(&told, field) {
            "" => now(),
            when => when.to_owned(),
        };
        let ty = if text(&told, "type") == "Warning" { "Warning" } else { "Normal" };
        let component = match text(&told, "source.component") {
            "" => "kubelet",
            component => component,
        };
        let object = json!({
            "involvedObject": about,
            "reason": text(&told, "reason"),
            "message": message,
            "type": ty,
            "count": at(&told, "count").cloned().unwrap_or_else(|| 1.into()),
            "firstTimestamp": when("firstTimestamp"),
            "lastTimestamp": when("lastTimestamp"),
            "source": {"component": component, "host": &**origin},
            "reportingComponent": component,
            "reportingInstance": &**origin,
        });
        let namespace = if namespace.is_empty() { "default" } else { namespace }.to_owned();
        let (id, made) = self.events.tell(&namespace, object);
        let at = if made { Instant::now() + AGAIN_AFTER } else { Instant::now() };
        self.work.put_at(Task::Event(id), at);
    }

    pub(super) fn begin_event(&mut self, task: Task, id: u64) {
        let Some(kept) = self.events.kept.get(&id) else { return };
        let (cluster, made, count) = (self.cluster.clone(), kept.made, kept.count);
        let (namespace, name) = (kept.namespace.clone(), kept.name.clone());
        let mut object = kept.object.clone();
        object["count"] = count.into();
        self.work.start(task, async move {
            Outcome::Object(write(&cluster, &namespace, &name, object, made).await.map(Some))
        });
    }

    pub(super) fn on_event_written(&mut self, id: u64) {
        if let Some(kept) = self.events.kept.get_mut(&id) {
            kept.made = true;
        }
    }

    /// It could not be written; events are not worth more than that.
    pub(super) fn on_event_refused(&mut self, id: u64) {
        if let Some(kept) = self.events.kept.remove(&id) {
            self.events.order.remove(&kept.turn);
        }
    }
}

async fn write(
    cluster: &Cluster,
    namespace: &str,
    name: &str,
    mut object: Value,
    made: bool,
) -> Result<Value, super::CallError> {
    let all = format!("/api/v1/namespaces/{namespace}/events");
    let one = format!("{all}/{name}");
    let patch = json!({"count": object["count"], "lastTimestamp": object["lastTimestamp"]});
    if made {
        match cluster.patch("events", &one, MERGE, &patch).await {
            // The API keeps events for an hour.
            Err(error) if error.is(404) => {}
            other => return other,
        }
    }
    object["metadata"] = json!({"name": name, "namespace": namespace});
    match cluster.create("events", &all, &object).await {
        Err(error) if error.is(409) => cluster.patch("events", &one, MERGE, &patch).await,
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pulled(count: u64) -> Value {
        json!({"involvedObject": {"kind": "Pod", "name": "web"}, "reason": "Pulled", "message": "m", "type": "Normal",
            "count": count})
    }

    #[test]
    fn the_same_event_told_again_counts_whoever_counts() {
        let mut events = Events::default();
        let (id, _) = events.tell("default", pulled(1));
        assert_eq!(events.tell("default", pulled(1)).0, id);
        assert_eq!(events.kept[&id].count, 2);
        events.tell("default", pulled(7));
        assert_eq!(events.kept[&id].count, 7);
        assert_ne!(events.tell("other", pulled(1)).0, id);
    }

    #[test]
    fn only_so_many_events_are_remembered() {
        let mut events = Events::default();
        for number in 0..=KEPT_MAX {
            let mut event = pulled(1);
            event["message"] = number.to_string().into();
            events.tell("default", event);
        }
        assert_eq!((events.kept.len(), events.order.len()), (KEPT_MAX, KEPT_MAX));
    }
}
