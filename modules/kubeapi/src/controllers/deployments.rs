//! Deployments: one ReplicaSet per template, scaled against each other.

use std::{
    collections::BTreeMap,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    sync::Arc,
    time::Duration,
};

use serde_json::{Value, json as value};

use super::{Controller, World, controller_of, is_ending, owner_key, place_of, pods};
use crate::{clock, json, kinds, registry::built_in_resource, status::Status};

const REVISION: &str = "deployment.kubernetes.io/revision";
const HASH: &str = "pod-template-hash";

#[derive(Debug)]
pub(super) struct Deployments;

impl Controller for Deployments {
    const NAME: &'static str = "deployment-controller";

    fn keys(&self, key: &str, old: Option<&Value>, new: Option<&Value>) -> Vec<String> {
        let own = built_in_resource("apps", "deployments");
        if key.starts_with(&own.prefix()) {
            return vec![key.to_owned()];
        }
        if !key.starts_with(&built_in_resource("apps", "replicasets").prefix()) {
            return Vec::new();
        }
        [old, new].into_iter().flatten().filter_map(|set| owner_key(own, set)).collect()
    }

    async fn look(&self, world: &World, key: &str) -> Result<Option<Duration>, Status> {
        let resource = built_in_resource("apps", "deployments");
        let (namespace, name) = place_of(key);
        let Some(deployment) = world.api.cache.get(resource, namespace, name) else { return Ok(None) };
        if is_ending(&deployment) {
            return Ok(None);
        }
        let sets = sets_of(world, &deployment);
        let paused = json::truth(&deployment, "spec.paused");
        let current = sets.iter().find(|set| same_template(&deployment, set)).cloned();
        let current = match current {
            Some(current) => Some(revised(world, &deployment, &sets, current).await?),
            None if paused => None,
            None => Some(created(world, &deployment, &sets).await?),
        };
        let old: Vec<Arc<Value>> = sets
            .iter()
            .filter(|set| current.as_ref().is_none_or(|current| uid(current) != uid(set)))
            .cloned()
            .collect();
        let mut again = None;
        if let Some(current) = &current {
            let moved = if paused {
                false
            } else if json::text(&deployment, "spec.strategy.type") == "Recreate" {
                recreate(world, &deployment, current, &old).await?
            } else {
                roll(world, &deployment, current, &old).await?
            };
            if moved {
                again = Some(Duration::ZERO);
            } else if !paused {
                tidy(world, &deployment, &old).await?;
            }
        }
        let overdue = write_status(world, &deployment, current.as_deref(), &old).await?;
        Ok(again.or(overdue))
    }
}

fn uid(object: &Value) -> &str {
    json::text(object, "metadata.uid")
}

fn replicas(set: &Value) -> i64 {
    json::int(set, "spec.replicas")
}

fn revision_of(object: &Value) -> i64 {
    let notes = json::map(object, "metadata.annotations");
    notes.and_then(|notes| notes.get(REVISION)?.as_str()?.parse().ok()).unwrap_or(0)
}

fn sets_of(world: &World, deployment: &Value) -> Vec<Arc<Value>> {
    let all = world
        .api
        .cache
        .list(built_in_resource("apps", "replicasets"), json::text(deployment, "metadata.namespace"));
    let own = |set: &Arc<Value>| {
        controller_of(set).is_some_and(|owner| json::text(owner, "uid") == uid(deployment)) && !is_ending(set)
    };
    let mut sets: Vec<Arc<Value>> = all.into_iter().filter(own).collect();
    sets.sort_by_cached_key(|set| json::text(set, "metadata.creationTimestamp").to_owned());
    sets
}

fn same_template(deployment: &Value, set: &Value) -> bool {
    let mut template = json::at(set, "spec.template").cloned().unwrap_or_default();
    json::map_mut(&mut template, "metadata.labels").remove(HASH);
    let mut wanted = json::at(deployment, "spec.template").cloned().unwrap_or_default();
    json::map_mut(&mut wanted, "metadata.labels");
    template == wanted
}

/// Letters that never spell a word, as names of pods have them.
fn hash(template: &Value, collisions: i64) -> String {
    const LETTERS: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";
    let mut hasher = DefaultHasher::new();
    (template.to_string(), collisions).hash(&mut hasher);
    let mut rest = hasher.finish();
    let mut text = String::new();
    for _ in 0..10 {
        let at = usize::try_from(rest % LETTERS.len() as u64).unwrap_or(0);
        text.push(char::from(LETTERS[at]));
        rest /= LETTERS.len() as u64;
    }
    text
}

/// What a set notes of its deployment.
fn notes(deployment: &Value, set: Option<&Value>, revision: i64, wanted: i64) -> Value {
    const NOT_TAKEN: [&str; 2] = ["kubectl.kubernetes.io/last-applied-configuration", REVISION];
    let mut notes = set.and_then(|set| json::map(set, "metadata.annotations")).cloned().unwrap_or_default();
    for (key, note) in json::map(deployment, "metadata.annotations").into_iter().flatten() {
        if !NOT_TAKEN.contains(&key.as_str()) {
            notes.insert(key.clone(), note.clone());
        }
    }
    notes.insert(REVISION.to_owned(), value!(revision.to_string()));
    notes.insert("deployment.kubernetes.io/desired-replicas".to_owned(), value!(wanted.to_string()));
    let most = wanted + surge(deployment);
    notes.insert("deployment.kubernetes.io/max-replicas".to_owned(), value!(most.to_string()));
    Value::Object(notes)
}

async fn created(world: &World, deployment: &Value, sets: &[Arc<Value>]) -> Result<Arc<Value>, Status> {
    let resource = built_in_resource("apps", "deployments");
    let namespace = json::text(deployment, "metadata.namespace");
    let mut template = json::at(deployment, "spec.template").cloned().unwrap_or_default();
    let hash = hash(&template, json::int(deployment, "status.collisionCount"));
    json::map_mut(&mut template, "metadata.labels").insert(HASH.to_owned(), value!(hash));
    let mut selector = json::at(deployment, "spec.selector").cloned().unwrap_or_default();
    json::map_mut(&mut selector, "matchLabels").insert(HASH.to_owned(), value!(hash));
    let revision = sets.iter().map(|set| revision_of(set)).max().unwrap_or(0) + 1;
    let wanted = replicas(deployment);
    let first = sets.iter().all(|set| replicas(set) == 0);
    let start = if first { wanted } else { 0 };
    let set = value!({
        "metadata": {
            "name": format!("{}-{hash}", json::text(deployment, "metadata.name")),
            "labels": json::at(&template, "metadata.labels"),
            "annotations": notes(deployment, None, revision, wanted),
            "ownerReferences": [pods::reference(resource, deployment)],
        },
        "spec": {
            "replicas": start,
            "minReadySeconds": json::int(deployment, "spec.minReadySeconds"),
            "selector": selector,
            "template": template,
        },
    });
    match world.create(built_in_resource("apps", "replicasets"), namespace, set).await {
        Ok(set) => {
            note_revision(world, deployment, revision).await?;
            told(world, deployment, &set, "up", 0, start).await;
            Ok(Arc::new(set))
        }
        Err(status) if status.reason == "AlreadyExists" => {
            // Another template has the same hash: the next one is made with another count.
            let count = json::int(deployment, "status.collisionCount") + 1;
            let change = |object: &mut Value| json::set(object, "status.collisionCount", count);
            world.amend(resource, deployment, "status", &change).await?;
            Err(status)
        }
        Err(status) => Err(status),
    }
}

/// An older template that is wanted again becomes the newest revision.
async fn revised(
    world: &World,
    deployment: &Value,
    sets: &[Arc<Value>],
    current: Arc<Value>,
) -> Result<Arc<Value>, Status> {
    let others = sets.iter().filter(|set| uid(set) != uid(&current)).map(|set| revision_of(set)).max();
    let newest = others.unwrap_or(0) + 1;
    let revision = if revision_of(&current) < newest { newest } else { revision_of(&current) };
    let wanted = notes(deployment, Some(&current), revision, replicas(deployment));
    let seconds = json::int(deployment, "spec.minReadySeconds");
    let right = json::at(&current, "metadata.annotations") == Some(&wanted)
        && json::int(&current, "spec.minReadySeconds") == seconds;
    note_revision(world, deployment, revision).await?;
    if right {
        return Ok(current);
    }
    let change = |set: &mut Value| {
        json::set(set, "metadata.annotations", wanted.clone());
        json::set(set, "spec.minReadySeconds", seconds);
    };
    let set = world.amend(built_in_resource("apps", "replicasets"), &current, "", &change).await?;
    Ok(Arc::new(set))
}

async fn note_revision(world: &World, deployment: &Value, revision: i64) -> Result<(), Status> {
    if revision_of(deployment) == revision {
        return Ok(());
    }
    let change = |object: &mut Value| {
        json::map_mut(object, "metadata.annotations")
            .insert(REVISION.to_owned(), value!(revision.to_string()));
    };
    world.amend(built_in_resource("apps", "deployments"), deployment, "status", &change).await?;
    Ok(())
}

async fn scale(world: &World, deployment: &Value, set: &Value, to: i64) -> Result<(), Status> {
    let from = replicas(set);
    let change = |set: &mut Value| json::set(set, "spec.replicas", to);
    world.amend(built_in_resource("apps", "replicasets"), set, "", &change).await?;
    told(world, deployment, set, if to > from { "up" } else { "down" }, from, to).await;
    Ok(())
}

async fn told(world: &World, deployment: &Value, set: &Value, way: &str, from: i64, to: i64) {
    let name = json::text(set, "metadata.name");
    let message = format!("Scaled {way} replica set {name} from {from} to {to}");
    let resource = built_in_resource("apps", "deployments");
    pods::tell(world, resource, deployment, false, "ScalingReplicaSet", &message).await;
}

/// A number, or a percentage of the wanted replicas.
fn share(deployment: &Value, field: &str, up: bool) -> i64 {
    let wanted = replicas(deployment);
    match json::at(deployment, &format!("spec.strategy.rollingUpdate.{field}")) {
        Some(Value::String(text)) => {
            let percent: i64 = text.trim_end_matches('%').parse().unwrap_or(0);
            if up { (wanted * percent + 99) / 100 } else { wanted * percent / 100 }
        }
        Some(number) => number.as_i64().unwrap_or(0),
        None => 0,
    }
}

fn surge(deployment: &Value) -> i64 {
    if json::text(deployment, "spec.strategy.type") == "Recreate" {
        0
    } else {
        share(deployment, "maxSurge", true)
    }
}

/// How many may be missing; one at least, or nothing would ever move.
fn missing(deployment: &Value) -> i64 {
    let missing = share(deployment, "maxUnavailable", false);
    if missing == 0 && surge(deployment) == 0 { 1 } else { missing.min(replicas(deployment)) }
}

async fn recreate(
    world: &World,
    deployment: &Value,
    current: &Value,
    old: &[Arc<Value>],
) -> Result<bool, Status> {
    let mut moved = false;
    for set in old.iter().filter(|set| replicas(set) > 0) {
        scale(world, deployment, set, 0).await?;
        moved = true;
    }
    let left: usize = old.iter().map(|set| pods::managed(world, set).len()).sum();
    if !moved && left == 0 && replicas(current) != replicas(deployment) {
        scale(world, deployment, current, replicas(deployment)).await?;
        moved = true;
    }
    Ok(moved)
}

/// One step of a rolling update: up as far as there may be too many, down as far as there may be too few.
async fn roll(
    world: &World,
    deployment: &Value,
    current: &Value,
    old: &[Arc<Value>],
) -> Result<bool, Status> {
    let wanted = replicas(deployment);
    let others: i64 = old.iter().map(|set| replicas(set)).sum();
    let now = replicas(current);
    if now > wanted {
        scale(world, deployment, current, wanted).await?;
        return Ok(true);
    }
    if now < wanted {
        let room = wanted + surge(deployment) - others - now;
        if room > 0 {
            scale(world, deployment, current, now + room.min(wanted - now)).await?;
            return Ok(true);
        }
    }
    if others == 0 {
        return Ok(false);
    }
    let least = wanted - missing(deployment);
    let available = |set: &Value| json::int(set, "status.availableReplicas");
    let behind = now - available(current);
    let mut spare = others + now - least - behind;
    let mut moved = false;
    // Those that do not serve go first: nobody misses them.
    for set in old.iter().filter(|set| replicas(set) > available(set)) {
        let gone = (replicas(set) - available(set)).min(spare);
        if gone > 0 {
            scale(world, deployment, set, replicas(set) - gone).await?;
            spare -= gone;
            moved = true;
        }
    }
    if moved {
        return Ok(true);
    }
    let serving: i64 = old.iter().map(|set| available(set)).sum::<i64>() + available(current);
    let mut spare = serving - least;
    for set in old.iter().filter(|set| replicas(set) > 0) {
        let gone = replicas(set).min(spare);
        if gone > 0 {
            scale(world, deployment, set, replicas(set) - gone).await?;
            spare -= gone;
            moved = true;
        }
    }
    Ok(moved)
}

/// Keeps so many old sets for undoing.
async fn tidy(world: &World, deployment: &Value, old: &[Arc<Value>]) -> Result<(), Status> {
    let keep = json::at(deployment, "spec.revisionHistoryLimit").and_then(Value::as_i64).unwrap_or(10);
    let mut idle: Vec<&Arc<Value>> =
        old.iter().filter(|set| replicas(set) == 0 && json::int(set, "status.replicas") == 0).collect();
    idle.sort_by_key(|set| revision_of(set));
    let many = idle.len().saturating_sub(usize::try_from(keep).unwrap_or(0));
    for set in &idle[..many] {
        world.delete(built_in_resource("apps", "replicasets"), set).await?;
    }
    Ok(())
}

/// `Some`: when progress is overdue.
async fn write_status(
    world: &World,
    deployment: &Value,
    current: Option<&Value>,
    old: &[Arc<Value>],
) -> Result<Option<Duration>, Status> {
    let resource = built_in_resource("apps", "deployments");
    let of = |field: &str| -> BTreeMap<bool, i64> {
        let path = format!("status.{field}");
        let own = current.map_or(0, |set| json::int(set, &path));
        let others: i64 = old.iter().map(|set| json::int(set, &path)).sum();
        BTreeMap::from([(true, own), (false, others)])
    };
    let total = |field: &str| of(field).values().sum::<i64>();
    let (replicas_now, available) = (total("replicas"), total("availableReplicas"));
    let updated = current.map_or(0, |set| json::int(set, "status.replicas"));
    let wanted = replicas(deployment);
    let mut status = value!({
        "observedGeneration": json::int(deployment, "metadata.generation"),
        "replicas": replicas_now,
        "updatedReplicas": updated,
        "readyReplicas": total("readyReplicas"),
        "availableReplicas": available,
        "unavailableReplicas": (replicas_now.max(wanted) - available).max(0),
        "terminatingReplicas": total("terminatingReplicas"),
    });
    if let Some(conditions) = json::at(deployment, "status.conditions") {
        status["conditions"] = conditions.clone();
    }
    if let Some(count) = json::at(deployment, "status.collisionCount") {
        status["collisionCount"] = count.clone();
    }
    let now = clock::now();
    let mut object = value!({"status": status});
    let enough = available >= wanted - missing(deployment);
    let (truth, reason, message) = if enough {
        ("True", "MinimumReplicasAvailable", "Deployment has minimum availability.")
    } else {
        ("False", "MinimumReplicasUnavailable", "Deployment does not have minimum availability.")
    };
    set_condition(&mut object, &now, "Available", truth, reason, message);
    let overdue =
        set_progress(&mut object, deployment, current, &now, [wanted, updated, replicas_now, available]);
    let status = json::at(&object, "status").cloned().unwrap_or_default();
    super::write_status(world, resource, deployment, &status).await?;
    Ok(overdue)
}

/// Says how the rollout goes. `Some`: when to look whether it still does.
fn set_progress(
    object: &mut Value,
    deployment: &Value,
    current: Option<&Value>,
    now: &str,
    [wanted, updated, all, available]: [i64; 4],
) -> Option<Duration> {
    let name = current.map_or("", |set| json::text(set, "metadata.name"));
    let before = json::list(deployment, "status.conditions").iter();
    let before = before.into_iter().find(|held| json::text(held, "type") == "Progressing");
    if updated == wanted && all == wanted && available == wanted && current.is_some() {
        let message = format!("ReplicaSet \"{name}\" has successfully progressed.");
        set_condition(object, now, "Progressing", "True", "NewReplicaSetAvailable", &message);
        return None;
    }
    if json::truth(deployment, "spec.paused") {
        set_condition(object, now, "Progressing", "Unknown", "DeploymentPaused", "Deployment is paused");
        return None;
    }
    let counts = ["updatedReplicas", "readyReplicas", "availableReplicas", "replicas"];
    let moved = counts.iter().any(|field| {
        let path = format!("status.{field}");
        json::int(deployment, &path) != json::int(object, &path)
    });
    let began = before.filter(|held| json::text(held, "reason") != "NewReplicaSetAvailable" && !moved);
    let since = began.and_then(|held| clock::parse(json::text(held, "lastUpdateTime")));
    let Some(since) = since else {
        let message = format!("ReplicaSet \"{name}\" is progressing.");
        set_condition(object, now, "Progressing", "True", "ReplicaSetUpdated", &message);
        return Some(Duration::from_secs(1));
    };
    let deadline =
        json::at(deployment, "spec.progressDeadlineSeconds").and_then(Value::as_i64).unwrap_or(600);
    let left = since + deadline - clock::unix();
    if left > 0 {
        return u64::try_from(left).ok().map(Duration::from_secs);
    }
    let message = format!("ReplicaSet \"{name}\" has timed out progressing.");
    if before.is_some_and(|held| json::text(held, "reason") != "ProgressDeadlineExceeded") {
        set_condition(object, now, "Progressing", "False", "ProgressDeadlineExceeded", &message);
    }
    None
}

fn set_condition(object: &mut Value, now: &str, ty: &str, status: &str, reason: &str, message: &str) {
    let held = json::list(object, "status.conditions").iter().find(|held| json::text(held, "type") == ty);
    let same = held.is_some_and(|held| {
        json::text(held, "status") == status
            && json::text(held, "reason") == reason
            && json::text(held, "message") == message
    });
    if same && (ty != "Progressing" || reason == "NewReplicaSetAvailable") {
        return;
    }
    let condition = value!({
        "type": ty, "status": status, "lastUpdateTime": now, "lastTransitionTime": now, "reason": reason,
        "message": message,
    });
    kinds::set_condition(object, condition);
}
