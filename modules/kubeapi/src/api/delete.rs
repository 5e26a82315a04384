//! Deleting objects: at once, after a grace period, or when all finalizers are gone.

use serde_json::{Value, json as value};

use super::{Api, Ask, Done, read::shown};
use crate::{
    clock, crd, json, kinds, limits,
    selector::{Fields, Labels},
    status::Status,
    store::{StoreError, Stored, Write, set_revision},
};

/// How an object is to be deleted.
#[derive(Debug, Clone, Default)]
pub(crate) struct Options {
    /// Seconds that a pod is given to end.
    pub(crate) grace: Option<i64>,
    /// Only the object of this uid.
    pub(crate) uid: Option<String>,
    /// Only at this revision.
    pub(crate) revision: Option<String>,
    /// What becomes of what it owns.
    pub(crate) propagation: Propagation,
}

/// What becomes of what an object owns.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Propagation {
    /// It is deleted after the object.
    #[default]
    Background,
    /// It is deleted first.
    Foreground,
    /// It stays, without this owner.
    Orphan,
}

/// Held by an object until what it owns is deleted.
pub(crate) const FOREGROUND: &str = "foregroundDeletion";
/// Held by a CustomResourceDefinition until its objects are deleted.
pub(crate) const CLEANUP: &str = "customresourcecleanup.apiextensions.k8s.io";
/// Held by an object until what it owns is released.
pub(crate) const ORPHAN: &str = "orphan";

impl Options {
    /// Reads DeleteOptions.
    pub(crate) fn read(body: &Value) -> Result<Self, Status> {
        let text = |path: &str| json::at(body, path).and_then(Value::as_str).map(str::to_owned);
        let propagation = match (text("propagationPolicy").as_deref(), json::truth(body, "orphanDependents"))
        {
            (None, false) | (Some("Background"), _) => Propagation::Background,
            (None, true) | (Some("Orphan"), _) => Propagation::Orphan,
            (Some("Foreground"), _) => Propagation::Foreground,
            (Some(other), _) => {
                return Err(Status::bad_request(format!(
                    "propagationPolicy: Unsupported value: \"{other}\": supported values: \"Background\", \
                     \"Foreground\", \"Orphan\""
                )));
            }
        };
        Ok(Self {
            grace: json::at(body, "gracePeriodSeconds").and_then(Value::as_i64),
            uid: text("preconditions.uid"),
            revision: text("preconditions.resourceVersion"),
            propagation,
        })
    }
}

impl Api {
    /// Deletes an object, or begins to.
    pub(crate) async fn delete(&self, ask: &Ask, options: &Options) -> Result<Done, Status> {
        for _ in 0..limits::WRITE_TRIES {
            let old = self.store.get(&ask.key()).await?.ok_or_else(|| ask.not_found())?;
            check_preconditions(ask, &old, options)?;
            if let Some(done) = self.try_delete(ask, &old, options).await? {
                return Ok(done);
            }
        }
        Err(ask.modified())
    }

    /// Deletes everything that is selected. Returns what it was.
    pub(crate) async fn delete_collection(
        &self,
        ask: &Ask,
        labels: &Labels,
        fields: &Fields,
        options: &Options,
    ) -> Result<Done, Status> {
        let (all, revision) = self.store.all(&ask.resource.prefix_of(&ask.namespace)).await?;
        let mut items = Vec::new();
        for stored in all {
            if !labels.select(&stored.object) || !fields.select(&stored.object) {
                continue;
            }
            let mut one = ask.clone();
            json::text(&stored.object, "metadata.name").clone_into(&mut one.name);
            json::text(&stored.object, "metadata.namespace").clone_into(&mut one.namespace);
            match Box::pin(self.delete(&one, options)).await {
                Ok(_) => {
                    let mut item = shown(&ask.resource, stored.object);
                    if ask.resource.custom.is_none() {
                        json::remove(&mut item, "apiVersion");
                        json::remove(&mut item, "kind");
                    }
                    items.push(item);
                }
                // Somebody else was faster, or it is another object by now.
                Err(status) if status.code == 404 || status.code == 409 => {}
                Err(status) => return Err(status),
            }
        }
        Ok(Done::ok(value!({
            "kind": ask.resource.list_kind,
            "apiVersion": ask.resource.api_version(),
            "metadata": {"resourceVersion": revision.to_string()},
            "items": items,
        })))
    }

    /// `None`: somebody else wrote meanwhile.
    async fn try_delete(&self, ask: &Ask, old: &Stored, options: &Options) -> Result<Option<Done>, Status> {
        let mut new = old.object.clone();
        let deleting = json::at(&new, "metadata.deletionTimestamp").is_some();
        set_finalizers(&mut new, options.propagation, deleting);
        let grace = grace_of(ask, &old.object, options);
        let held = json::int(&new, "metadata.deletionGracePeriodSeconds");
        if grace > 0 {
            if deleting && grace >= held {
                return Ok(Some(Done::ok(shown(&ask.resource, old.object.clone()))));
            }
            mark(ask, &mut new, grace, !deleting);
            return self.write_deleting(ask, old, new).await;
        }
        if ask.resource.is("", "namespaces") {
            if !deleting {
                json::set(&mut new, "metadata.deletionTimestamp", clock::now());
                json::set(&mut new, "status.phase", "Terminating");
            }
            if !json::list(&new, "spec.finalizers").is_empty()
                || !json::list(&new, "metadata.finalizers").is_empty()
            {
                return self.write_deleting(ask, old, new).await;
            }
        }
        if !deleting || held != 0 {
            let count = !deleting && ask.resource.is("", "pods");
            mark(ask, &mut new, 0, count);
        }
        let is_definition = ask.resource.is("apiextensions.k8s.io", "customresourcedefinitions");
        if is_definition && !deleting && crd::condition(&new, "Established") {
            clean_up_first(&mut new);
        }
        if !json::list(&new, "metadata.finalizers").is_empty() {
            return self.write_deleting(ask, old, new).await;
        }
        let answer = if ask.resource.returns_deleted {
            shown(&ask.resource, new)
        } else {
            let mut details = value!({"name": ask.name, "kind": ask.resource.plural});
            details["uid"] = value!(json::text(&old.object, "metadata.uid"));
            if !ask.resource.group.is_empty() {
                details["group"] = value!(ask.resource.group);
            }
            Status::success(Some(details))
        };
        if ask.dry_run {
            return Ok(Some(Done::ok(answer)));
        }
        match self.store.write(vec![Write::delete(ask.key(), old.revision)]).await {
            Ok(_) => Ok(Some(Done::ok(answer))),
            Err(StoreError::Conflict { .. }) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    async fn write_deleting(&self, ask: &Ask, old: &Stored, mut new: Value) -> Result<Option<Done>, Status> {
        if new == old.object || ask.dry_run {
            return Ok(Some(Done::ok(shown(&ask.resource, new))));
        }
        match self.store.write(vec![Write::update(ask.key(), &new, old.revision)?]).await {
            Ok(revisions) => {
                set_revision(&mut new, revisions.first().copied().unwrap_or_default());
                Ok(Some(Done::ok(shown(&ask.resource, new))))
            }
            Err(StoreError::Conflict { .. }) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

fn check_preconditions(ask: &Ask, old: &Stored, options: &Options) -> Result<(), Status> {
    let (group, kind) = (&ask.resource.group, &ask.resource.kind);
    let held = json::text(&old.object, "metadata.uid");
    if let Some(uid) = options.uid.as_ref().filter(|uid| *uid != held) {
        let why = format!(
            "the UID in the precondition ({uid}) does not match the UID in record ({held}). The object might \
             have been deleted and then recreated"
        );
        return Err(Status::conflict(group, kind, &ask.name, &why));
    }
    let at = old.revision.to_string();
    if let Some(revision) = options.revision.as_ref().filter(|revision| **revision != at) {
        let why = format!(
            "the ResourceVersion in the precondition ({revision}) does not match the ResourceVersion in \
             record ({at}). The object might have been modified"
        );
        return Err(Status::conflict(group, kind, &ask.name, &why));
    }
    Ok(())
}

/// Seconds that the object is given to end by itself. Only pods that run somewhere can.
fn grace_of(ask: &Ask, object: &Value, options: &Options) -> i64 {
    let ended = ["Succeeded", "Failed"].contains(&json::text(object, "status.phase"));
    if !ask.resource.is("", "pods") || ended || json::text(object, "spec.nodeName").is_empty() {
        return 0;
    }
    let own = json::at(object, "spec.terminationGracePeriodSeconds").and_then(Value::as_i64);
    options.grace.or(own).unwrap_or(30).max(0)
}

fn mark(ask: &Ask, object: &mut Value, grace: i64, count: bool) {
    json::set(object, "metadata.deletionTimestamp", clock::seconds(clock::unix() + grace));
    if !ask.resource.is("", "namespaces")
        && !ask.resource.is("apiextensions.k8s.io", "customresourcedefinitions")
    {
        json::set(object, "metadata.deletionGracePeriodSeconds", grace);
    }
    if ask.resource.generation && count {
        json::set(object, "metadata.generation", json::int(object, "metadata.generation") + 1);
    }
}

/// The objects of a definition go before it does.
fn clean_up_first(definition: &mut Value) {
    let mut finalizers = json::list(definition, "metadata.finalizers").to_vec();
    if !finalizers.contains(&value!(CLEANUP)) {
        finalizers.push(value!(CLEANUP));
    }
    json::set(definition, "metadata.finalizers", finalizers);
    let condition = value!({
        "type": "Terminating", "status": "True", "lastTransitionTime": clock::now(),
        "reason": "InstanceDeletionPending",
        "message": "CustomResourceDefinition marked for deletion; CustomResource deletion will begin soon",
    });
    kinds::set_condition(definition, condition);
}

fn set_finalizers(object: &mut Value, propagation: Propagation, deleting: bool) {
    let wanted = match propagation {
        Propagation::Background => None,
        Propagation::Foreground => Some(FOREGROUND),
        Propagation::Orphan => Some(ORPHAN),
    };
    let held = json::list(object, "metadata.finalizers");
    // What an earlier deletion asked for is not taken back by a later one that asks for nothing.
    let ours = |name: &Value| (name == FOREGROUND || name == ORPHAN) && !(deleting && wanted.is_none());
    let mut finalizers: Vec<Value> = held.iter().filter(|name| !ours(name)).cloned().collect();
    finalizers.extend(wanted.map(Value::from));
    if finalizers.is_empty() {
        json::remove(object, "metadata.finalizers");
    } else {
        json::set(object, "metadata.finalizers", finalizers);
    }
}
