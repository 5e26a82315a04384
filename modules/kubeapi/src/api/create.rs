//! Creating objects.

use serde_json::Value;

use super::{
    Api, Ask, Done,
    read::{before_anything, object_of, shown, stored_type},
};
use crate::{
    admission, clock, json, kinds, limits, managed, names,
    status::{Cause, Status},
    store::{StoreError, Write, set_revision},
};

impl Api {
    /// Creates an object from what a client sent.
    pub(crate) async fn create(&self, ask: &Ask, body: Value) -> Result<Done, Status> {
        let mut warnings = Vec::new();
        let object = object_of(ask, body, &mut warnings)?;
        let mut done = self.create_object(ask, object, true).await?;
        done.warnings = warnings;
        Ok(done)
    }

    /// Creates an object that is in normal form. `track`: its managed fields are still to be made.
    pub(crate) async fn create_object(
        &self,
        ask: &Ask,
        mut object: Value,
        track: bool,
    ) -> Result<Done, Status> {
        let resource = &ask.resource;
        check_namespace(ask, &mut object)?;
        let named = !json::text(&object, "metadata.name").is_empty();
        if !ask.name.is_empty() && !named {
            json::set(&mut object, "metadata.name", ask.name.clone());
        }
        if !json::text(&object, "metadata.resourceVersion").is_empty() {
            return Err(Status::bad_request("resourceVersion should not be set on objects to be created"));
        }
        for field in
            ["uid", "creationTimestamp", "deletionTimestamp", "deletionGracePeriodSeconds", "selfLink"]
        {
            json::remove(&mut object, &format!("metadata.{field}"));
        }
        json::remove(&mut object, "metadata.generation");
        if resource.status {
            let empty = before_anything(resource);
            match empty.get("status") {
                Some(status) => json::set(&mut object, "status", status.clone()),
                None => drop(json::remove(&mut object, "status")),
            }
        }
        if track {
            let (version, now) = (resource.api_version(), clock::now());
            let before = before_anything(resource);
            managed::update(stored_type(resource), &before, &mut object, &ask.writer(&version, &now));
        }
        admission::mutate_create(self, ask, &mut object).await?;
        for _ in 0..limits::WRITE_TRIES {
            match self.try_create(ask, object.clone()).await {
                // A name that was made up is taken by chance: make up another.
                Err(Some(status)) if status.reason == "AlreadyExists" && !named && ask.name.is_empty() => {}
                Err(Some(status)) => return Err(status),
                Ok(done) => return Ok(done),
                Err(None) => {}
            }
        }
        Err(ask.modified())
    }

    /// `Err(None)`: something that this depends on changed meanwhile.
    async fn try_create(&self, ask: &Ask, mut object: Value) -> Result<Done, Option<Status>> {
        let resource = &ask.resource;
        let prefix = json::text(&object, "metadata.generateName").to_owned();
        if json::text(&object, "metadata.name").is_empty() && !prefix.is_empty() {
            json::set(&mut object, "metadata.name", names::generated(&prefix));
        }
        let mut ask = ask.clone();
        json::text(&object, "metadata.name").clone_into(&mut ask.name);
        json::set(&mut object, "metadata.uid", names::uid().map_err(Status::internal)?);
        json::set(&mut object, "metadata.creationTimestamp", clock::now());
        if resource.generation {
            json::set(&mut object, "metadata.generation", 1);
        }
        let guard = self.namespace_guard(&ask).await?;
        kinds::prepare_create(self, &ask, &mut object).await?;
        let causes = validate(&ask, &object, None);
        if !causes.is_empty() {
            return Err(Some(Status::invalid(&resource.group, &resource.kind, &ask.name, &causes)));
        }
        let exists = || Some(Status::already_exists(&resource.group, &resource.plural, &ask.name));
        if ask.dry_run {
            return match self.store.get(&ask.key()).await.map_err(Status::from)? {
                Some(_) => Err(exists()),
                None => Ok(Done::created(shown(resource, object))),
            };
        }
        let mut writes = vec![Write::create(ask.key(), &object)?];
        writes.extend(guard);
        match self.store.write(writes).await {
            Ok(revisions) => {
                set_revision(&mut object, revisions.first().copied().unwrap_or_default());
                Ok(Done::created(shown(resource, object)))
            }
            Err(StoreError::Conflict { index: 0, .. }) => Err(exists()),
            Err(StoreError::Conflict { .. }) => Err(None),
            Err(error) => Err(Some(error.into())),
        }
    }

    /// The namespace must be there and not be ending, and stay so until the write is done.
    async fn namespace_guard(&self, ask: &Ask) -> Result<Option<Write>, Status> {
        if !ask.resource.namespaced {
            return Ok(None);
        }
        let namespaces = crate::registry::built_in_resource("", "namespaces");
        let key = namespaces.key("", &ask.namespace);
        let Some(namespace) = self.store.get(&key).await? else {
            return Err(Status::not_found("", "namespaces", &ask.namespace));
        };
        if json::at(&namespace.object, "metadata.deletionTimestamp").is_some() {
            let why = format!(
                "unable to create new content in namespace {} because it is being terminated",
                ask.namespace
            );
            let cause = serde_json::json!([{
                "reason": "NamespaceTerminating",
                "message": format!("namespace {} is being terminated", ask.namespace),
                "field": "metadata.namespace",
            }]);
            return Err(ask.forbidden(&why).with_causes(cause));
        }
        Ok(Some(Write::check(key, namespace.revision)))
    }
}

fn check_namespace(ask: &Ask, object: &mut Value) -> Result<(), Status> {
    if !ask.resource.namespaced {
        json::remove(object, "metadata.namespace");
        return Ok(());
    }
    let said = json::text(object, "metadata.namespace");
    if said.is_empty() {
        json::set(object, "metadata.namespace", ask.namespace.clone());
    } else if said != ask.namespace {
        return Err(Status::bad_request(
            "the namespace of the provided object does not match the namespace sent on the request",
        ));
    }
    Ok(())
}

/// What is wrong with an object, compared with what it was.
pub(crate) fn validate(ask: &Ask, object: &Value, old: Option<&Value>) -> Vec<Cause> {
    let resource = &ask.resource;
    let mut causes = Vec::new();
    let name = json::text(object, "metadata.name");
    if name.is_empty() {
        causes.push(Cause::required("metadata.name", "name or generateName is required"));
    } else if old.is_none()
        && let Some(why) = resource.names.problem(name)
    {
        causes.push(Cause::invalid("metadata.name", &Value::from(name), why));
    }
    kinds::validate_metadata(object, old, &mut causes);
    if let Some(custom) = &resource.custom {
        causes.extend(custom.schema.validate(object));
    }
    kinds::validate(ask, object, old, &mut causes);
    causes
}
