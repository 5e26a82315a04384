//! Changing objects: replacing, patching, applying.

use serde_json::Value;

use super::{
    Api, Ask, Done,
    create::validate,
    read::{before_anything, check_kind, normalize, shown, stored_type},
};
use crate::{
    admission, clock, json, kinds, limits, managed,
    patch::{self, PatchError},
    status::{Cause, Status},
    store::{StoreError, Stored, Write, set_revision},
};

/// How an object is to be changed.
#[derive(Debug)]
pub(crate) enum Patch {
    /// RFC 6902.
    Json(Value),
    /// RFC 7386.
    Merge(Value),
    /// A merge patch that knows lists with keys.
    Strategic(Value),
    /// What a manager wants, as a whole; over what others want if forced.
    Apply { config: Value, force: bool },
}

/// What a change makes of the object that is there.
type Change<'a> = dyn Fn(&Value) -> Result<Value, Status> + Send + Sync + 'a;

impl Api {
    /// Replaces an object.
    pub(crate) async fn replace(&self, ask: &Ask, body: Value) -> Result<Done, Status> {
        check_kind(&ask.resource, &body)?;
        let name = json::text(&body, "metadata.name");
        if !name.is_empty() && name != ask.name {
            return Err(Status::bad_request(format!(
                "the name of the object ({name}) does not match the name on the URL ({})",
                ask.name
            )));
        }
        self.change(ask, &|_old| Ok(body.clone()), true).await
    }

    /// Patches an object.
    pub(crate) async fn patch(&self, ask: &Ask, patch: &Patch) -> Result<Done, Status> {
        if let Patch::Apply { config, force } = patch {
            return self.apply(ask, config, *force).await;
        }
        let change = |old: &Value| {
            let mut object = old.clone();
            // A revision that the patch does not name pins nothing.
            json::remove(&mut object, "metadata.resourceVersion");
            apply_patch(ask, patch, &mut object)?;
            Ok(object)
        };
        self.change(ask, &change, true).await
    }

    /// Changes an object in the name of a part of this server: reads it, changes it, writes it, as often as
    /// somebody gets in between.
    pub(crate) async fn amend(
        &self,
        ask: &Ask,
        change: &(dyn Fn(&mut Value) + Send + Sync),
    ) -> Result<Done, Status> {
        let change = |old: &Value| {
            let mut object = old.clone();
            change(&mut object);
            json::remove(&mut object, "metadata.resourceVersion");
            Ok(object)
        };
        self.change(ask, &change, true).await
    }

    /// The same of an object at the revision that was seen, once.
    pub(crate) async fn place(
        &self,
        ask: &Ask,
        revision: &str,
        change: &(dyn Fn(&mut Value) + Send + Sync),
    ) -> Result<Done, Status> {
        let change = |old: &Value| {
            let mut object = old.clone();
            change(&mut object);
            json::set(&mut object, "metadata.resourceVersion", revision);
            Ok(object)
        };
        let ask = Ask { subresource: "binding".to_owned(), ..ask.clone() };
        // Nobody owns where a pod is: it cannot be changed.
        self.change(&ask, &change, false).await
    }

    async fn apply(&self, ask: &Ask, config: &Value, force: bool) -> Result<Done, Status> {
        let mut warnings = Vec::new();
        let mut config = config.clone();
        check_applied(ask, &config)?;
        if json::at(&config, "metadata.managedFields").is_some_and(|fields| !fields.is_null()) {
            return Err(Status::bad_request("metadata.managedFields must be nil"));
        }
        prune_config(ask, &mut config, &mut warnings)?;
        let merged = |live: &Value| -> Result<Value, Status> {
            let (version, now) = (ask.resource.api_version(), clock::now());
            let writer = ask.writer(&version, &now);
            let ty = stored_type(&ask.resource);
            let mut merged = managed::apply(ty, live, &config, &writer, force)
                .map_err(|conflicts| conflict_status(ask, &conflicts))?;
            // What nobody owns is not part of what is merged.
            for path in [
                "name",
                "namespace",
                "uid",
                "creationTimestamp",
                "generation",
                "deletionTimestamp",
                "deletionGracePeriodSeconds",
            ] {
                let path = format!("metadata.{path}");
                let held = json::at(live, &path).or_else(|| json::at(&config, &path));
                if let Some(value) = held {
                    json::set(&mut merged, &path, value.clone());
                }
            }
            if let Some(revision) = json::at(&config, "metadata.resourceVersion") {
                json::set(&mut merged, "metadata.resourceVersion", revision.clone());
            }
            Ok(merged)
        };
        for _ in 0..limits::WRITE_TRIES {
            if ask.subresource.is_empty() && self.store.get(&ask.key()).await?.is_none() {
                if !json::text(&config, "metadata.uid").is_empty() {
                    return Err(ask.conflict(
                        "uid mismatch: the provided object specified uid, and no existing object was found",
                    ));
                }
                let mut object = merged(&before_anything(&ask.resource))?;
                json::set(&mut object, "apiVersion", ask.resource.api_version());
                json::set(&mut object, "kind", ask.resource.kind.clone());
                normalize(ask, &mut object, &mut Vec::new())?;
                kinds::default(&ask.resource, &mut object);
                match self.create_object(ask, object, false).await {
                    Err(status) if status.reason == "AlreadyExists" => continue,
                    Ok(mut done) => {
                        done.warnings = warnings;
                        return Ok(done);
                    }
                    Err(status) => return Err(status),
                }
            }
            match self.change(ask, &merged, false).await {
                Err(status) if status.reason == "NotFound" && ask.subresource.is_empty() => {}
                Ok(mut done) => {
                    done.warnings.append(&mut warnings);
                    return Ok(done);
                }
                Err(status) => return Err(status),
            }
        }
        Err(ask.modified())
    }

    /// Reads, changes, checks and writes; again if somebody else wrote meanwhile and the client did not say
    /// which revision it has seen. `track`: managed fields are still to be made.
    async fn change(&self, ask: &Ask, change: &Change<'_>, track: bool) -> Result<Done, Status> {
        for _ in 0..limits::WRITE_TRIES {
            let old = self.store.get(&ask.key()).await?.ok_or_else(|| ask.not_found())?;
            let before = shown(&ask.resource, old.object.clone());
            let new = change(&before)?;
            let pinned = pinned(ask, &new, &before, old.revision)?;
            match self.try_change(ask, &old, new, track).await? {
                Some(done) => return Ok(done),
                None if pinned => return Err(ask.modified()),
                None => {}
            }
        }
        Err(ask.modified())
    }

    /// `None`: somebody else wrote meanwhile.
    async fn try_change(
        &self,
        ask: &Ask,
        old: &Stored,
        mut new: Value,
        track: bool,
    ) -> Result<Option<Done>, Status> {
        let resource = &ask.resource;
        let mut warnings = Vec::new();
        normalize(ask, &mut new, &mut warnings)?;
        kinds::default(resource, &mut new);
        settle_parts(ask, &old.object, &mut new);
        keep_servers(&old.object, &mut new);
        if track {
            let (version, now) = (resource.api_version(), clock::now());
            managed::update(stored_type(resource), &old.object, &mut new, &ask.writer(&version, &now));
        }
        admission::check_update(self, ask, &old.object, &new)?;
        kinds::prepare_update(ask, &old.object, &mut new);
        count(ask, &old.object, &mut new);
        let causes = validate(ask, &new, Some(&old.object));
        if !causes.is_empty() {
            return Err(Status::invalid(&resource.group, &resource.kind, &ask.name, &causes));
        }
        set_revision(&mut new, old.revision);
        let done = |object: Value| Done { code: 200, object: shown(resource, object), warnings };
        if managed::same_but_for_times(&old.object, &new) {
            return Ok(Some(done(old.object.clone())));
        }
        if ask.dry_run {
            return Ok(Some(done(new)));
        }
        let write = if is_released(&new) {
            Write::delete(ask.key(), old.revision)
        } else {
            Write::update(ask.key(), &new, old.revision)?
        };
        let removed = is_released(&new);
        match self.store.write(vec![write]).await {
            Ok(revisions) => {
                if !removed {
                    set_revision(&mut new, revisions.first().copied().unwrap_or_default());
                }
                Ok(Some(done(new)))
            }
            Err(StoreError::Conflict { .. }) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

/// Whether the client says which revision it has seen; a conflict if that is over.
fn pinned(ask: &Ask, new: &Value, old: &Value, revision: u64) -> Result<bool, Status> {
    let uid = json::text(new, "metadata.uid");
    let held = json::text(old, "metadata.uid");
    if !uid.is_empty() && uid != held {
        let why = format!("Precondition failed: UID in precondition: {uid}, UID in object meta: {held}");
        return Err(ask.conflict(&why));
    }
    match json::text(new, "metadata.resourceVersion") {
        "" | "0" => Ok(false),
        seen if seen == revision.to_string() => Ok(true),
        seen if seen.parse::<u64>().is_ok() => Err(ask.modified()),
        seen => {
            let cause =
                Cause::invalid("metadata.resourceVersion", &Value::from(seen), "must be an unsigned integer");
            Err(Status::invalid(&ask.resource.group, &ask.resource.kind, &ask.name, &[cause]))
        }
    }
}

fn apply_patch(ask: &Ask, patch: &Patch, object: &mut Value) -> Result<(), Status> {
    let patched = match patch {
        Patch::Json(operations) => patch::json_patch(object, operations),
        Patch::Merge(over) if over.is_object() => {
            patch::merge_patch(object, over);
            Ok(())
        }
        Patch::Strategic(_) if ask.resource.custom.is_some() => {
            return Err(Status::new(
                415,
                "UnsupportedMediaType",
                "the body of the request was in an unknown format - accepted media types include: \
                 application/json-patch+json, application/merge-patch+json, application/apply-patch+yaml",
            ));
        }
        Patch::Strategic(over) => patch::strategic_patch(&ask.resource.ty, object, over),
        Patch::Merge(_) | Patch::Apply { .. } => {
            Err(PatchError::Malformed("a merge patch is an object".to_owned()))
        }
    };
    patched.map_err(|error| match error {
        PatchError::Malformed(what) => Status::bad_request(what),
        PatchError::Unfit => {
            Status { details: Some(serde_json::json!({})), ..Status::new(422, "Invalid", error.to_string()) }
        }
    })?;
    let size = serde_json::to_vec(object).map_err(Status::internal)?.len();
    if size > limits::BODY_MAX {
        return Err(Status::too_large(limits::OBJECT_MAX));
    }
    Ok(())
}

fn check_applied(ask: &Ask, config: &Value) -> Result<(), Status> {
    let (version, kind) = (json::text(config, "apiVersion"), json::text(config, "kind"));
    if version.is_empty() || kind.is_empty() {
        return Err(Status::bad_request("an applied configuration names apiVersion and kind"));
    }
    check_kind(&ask.resource, config)?;
    let name = json::text(config, "metadata.name");
    if !name.is_empty() && name != ask.name {
        return Err(Status::bad_request(format!(
            "the name of the object ({name}) does not match the name on the URL ({})",
            ask.name
        )));
    }
    Ok(())
}

/// Takes unknown fields out of what is applied, without filling anything in: only what is written is wanted.
fn prune_config(ask: &Ask, config: &mut Value, warnings: &mut Vec<String>) -> Result<(), Status> {
    let mut normal = config.clone();
    normalize(ask, &mut normal, warnings)?;
    keep_common(config, &normal);
    Ok(())
}

/// Keeps of `config` what survived normalization, with its normal value. What was empty stays: that it is
/// there is what the manager wants.
fn keep_common(config: &mut Value, normal: &Value) {
    match (config, normal) {
        (Value::Object(config), Value::Object(normal)) => {
            config.retain(|name, value| normal.contains_key(name) || is_hollow(value));
            for (name, value) in config {
                if let Some(normal) = normal.get(name) {
                    keep_common(value, normal);
                }
            }
        }
        (Value::Array(config), Value::Array(normal)) if config.len() == normal.len() => {
            config.iter_mut().zip(normal).for_each(|(value, normal)| keep_common(value, normal));
        }
        (value, normal) => *value = normal.clone(),
    }
}

fn is_hollow(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Object(map) => map.is_empty(),
        Value::Array(list) => list.is_empty(),
        Value::String(text) => text.is_empty(),
        Value::Bool(truth) => !truth,
        Value::Number(number) => number.as_i64() == Some(0),
    }
}

fn conflict_status(ask: &Ask, conflicts: &[managed::Conflict]) -> Status {
    let who = |conflict: &managed::Conflict| match &conflict.by_update {
        Some((version, time)) if time.is_empty() => format!("\"{}\" using {version}", conflict.manager),
        Some((version, time)) => format!("\"{}\" using {version} at {time}", conflict.manager),
        None => format!("\"{}\"", conflict.manager),
    };
    let causes = conflicts.iter().map(|conflict| {
        serde_json::json!({
            "reason": "FieldManagerConflict",
            "message": format!("conflict with {}", who(conflict)),
            "field": conflict.path,
        })
    });
    let message = match conflicts {
        [one] => format!("Apply failed with 1 conflict: conflict with {}: {}", who(one), one.path),
        many => {
            let mut lines = vec![format!(
                "Apply failed with {} conflicts: conflicts with {}:",
                many.len(),
                who(&many[0])
            )];
            lines.extend(many.iter().map(|conflict| format!("- {}", conflict.path)));
            lines.join("\n")
        }
    };
    tracing::debug!(resource = %ask.resource.plural, name = %ask.name, "an apply met fields of others");
    Status::new(409, "Conflict", message).with_causes(causes.collect())
}

/// A write of the object leaves its status, a write of the status everything else.
fn settle_parts(ask: &Ask, old: &Value, new: &mut Value) {
    let keep = |new: &mut Value, field: &str| match old.get(field) {
        Some(value) => json::set(new, field, value.clone()),
        None => drop(json::remove(new, field)),
    };
    match ask.subresource.as_str() {
        "" if ask.resource.status => keep(new, "status"),
        "status" => {
            let fields: Vec<String> = [&*new, old]
                .iter()
                .flat_map(|object| object.as_object().into_iter().flatten().map(|(name, _)| name.clone()))
                .filter(|name| !["apiVersion", "kind", "metadata", "status"].contains(&name.as_str()))
                .collect();
            fields.iter().for_each(|field| keep(new, field));
            let managers = json::at(new, "metadata.managedFields").cloned();
            let held = json::at(old, "metadata").cloned().unwrap_or_default();
            if ask.resource.custom.is_some() || ask.resource.is("", "namespaces") {
                json::set(new, "metadata", held);
                if let Some(managers) = managers {
                    json::set(new, "metadata.managedFields", managers);
                }
            } else {
                for field in ["finalizers", "ownerReferences"] {
                    match json::at(old, &format!("metadata.{field}")) {
                        Some(value) => json::set(new, &format!("metadata.{field}"), value.clone()),
                        None => drop(json::remove(new, &format!("metadata.{field}"))),
                    }
                }
            }
        }
        _ => {}
    }
}

/// What the server alone sets stays as it is.
fn keep_servers(old: &Value, new: &mut Value) {
    for field in [
        "uid",
        "creationTimestamp",
        "deletionTimestamp",
        "deletionGracePeriodSeconds",
        "generation",
        "selfLink",
        "name",
        "namespace",
    ] {
        let path = format!("metadata.{field}");
        match json::at(old, &path) {
            Some(value) => json::set(new, &path, value.clone()),
            None => drop(json::remove(new, &path)),
        }
    }
}

/// Counts a change of what is wanted.
fn count(ask: &Ask, old: &Value, new: &mut Value) {
    if !ask.resource.generation || ["status", "binding"].contains(&ask.subresource.as_str()) {
        return;
    }
    let wanted = |object: &Value| {
        let mut object = object.clone();
        ["metadata", "status", "apiVersion", "kind"]
            .iter()
            .for_each(|field| drop(json::remove(&mut object, field)));
        object
    };
    if wanted(old) != wanted(new) {
        json::set(new, "metadata.generation", json::int(old, "metadata.generation") + 1);
    }
}

/// Whether an object that is being deleted waits for nothing any more.
pub(crate) fn is_released(object: &Value) -> bool {
    json::at(object, "metadata.deletionTimestamp").is_some()
        && json::int(object, "metadata.deletionGracePeriodSeconds") == 0
        && json::list(object, "metadata.finalizers").is_empty()
        && json::list(object, "spec.finalizers").is_empty()
}
