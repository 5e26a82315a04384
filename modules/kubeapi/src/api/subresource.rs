//! Subresources that are not a part of the object: scale, binding, eviction, token, finalize.

use serde_json::{Value, json as value};

use super::{Api, Ask, Done, delete::Options, read::object_of, update::Patch};
use crate::{
    auth::token::BoundTo,
    clock, json, kinds,
    registry::{Resource, Scale, built_in_resource},
    selector,
    status::{Cause, Status},
};

impl Api {
    /// Replicas of an object, wanted and real.
    pub(crate) async fn get_scale(&self, ask: &Ask) -> Result<Done, Status> {
        let paths = scale_paths(&ask.resource)?;
        let stored = self.store.get(&ask.key()).await?.ok_or_else(|| ask.not_found())?;
        Ok(Done::ok(scale_of(&stored.object, paths)))
    }

    /// Changes how many replicas are wanted.
    pub(crate) async fn put_scale(
        &self,
        ask: &Ask,
        patch: Option<&Patch>,
        body: &Value,
    ) -> Result<Done, Status> {
        let paths = scale_paths(&ask.resource)?.clone();
        let current = self.get_scale(ask).await?.object;
        let wanted = match patch {
            None => body.clone(),
            Some(Patch::Json(operations)) => {
                let mut wanted = current.clone();
                crate::patch::json_patch(&mut wanted, operations)
                    .map_err(|error| Status::bad_request(error.to_string()))?;
                wanted
            }
            Some(Patch::Merge(over) | Patch::Strategic(over) | Patch::Apply { config: over, .. }) => {
                let mut wanted = current.clone();
                crate::patch::merge_patch(&mut wanted, over);
                wanted
            }
        };
        let replicas = json::at(&wanted, "spec.replicas").and_then(Value::as_i64).unwrap_or(0);
        if replicas < 0 || i32::try_from(replicas).is_err() {
            let cause =
                Cause::invalid("spec.replicas", &value!(replicas), "must be greater than or equal to 0");
            return Err(Status::invalid("autoscaling", "Scale", &ask.name, &[cause]));
        }
        let seen = json::text(&wanted, "metadata.resourceVersion").to_owned();
        let pinned = patch.is_none() && !seen.is_empty();
        if pinned && seen != json::text(&current, "metadata.resourceVersion") {
            return Err(ask.modified());
        }
        let change = |object: &mut Value| json::set(object, &paths.spec, replicas);
        let done = self.amend(ask, &change).await?;
        Ok(Done { object: scale_of(&done.object, &paths), ..done })
    }

    /// Places a pod on a node.
    pub(crate) async fn bind(&self, ask: &Ask, binding: &Value) -> Result<Done, Status> {
        let node = json::text(binding, "target.name").to_owned();
        if node.is_empty() || !["", "Node"].contains(&json::text(binding, "target.kind")) {
            let cause = Cause::required("target.name", "");
            return Err(Status::invalid("", "Binding", &ask.name, &[cause]));
        }
        let pods = Ask { subresource: String::new(), ..ask.clone() };
        let stored = self.store.get(&pods.key()).await?.ok_or_else(|| ask.not_found())?;
        let conflict = |why: &str| Status::conflict("", "pods/binding", &ask.name, why);
        if json::at(&stored.object, "metadata.deletionTimestamp").is_some() {
            return Err(conflict(&format!(
                "pod {} is being deleted, cannot be assigned to a host",
                ask.name
            )));
        }
        let held = json::text(&stored.object, "spec.nodeName");
        if !held.is_empty() {
            return Err(conflict(&format!("pod {} is already assigned to node \"{held}\"", ask.name)));
        }
        let revision = stored.revision.to_string();
        let bound = |object: &mut Value| {
            json::set(object, "spec.nodeName", node.clone());
            for (key, label) in json::map(binding, "metadata.annotations").into_iter().flatten() {
                json::map_mut(object, "metadata.annotations").insert(key.clone(), label.clone());
            }
            let condition =
                value!({"type": "PodScheduled", "status": "True", "lastTransitionTime": clock::now()});
            kinds::set_condition(object, condition);
        };
        self.place(&pods, &revision, &bound).await.map_err(|status| match status.reason {
            "Conflict" => conflict("the pod was changed meanwhile"),
            _ => status,
        })?;
        Ok(Done::created({
            let mut success = Status::success(None);
            success["code"] = value!(201);
            success
        }))
    }

    /// Deletes a pod unless a disruption budget forbids it.
    pub(crate) async fn evict(&self, ask: &Ask, eviction: &Value) -> Result<Done, Status> {
        let pods = Ask { subresource: String::new(), ..ask.clone() };
        let stored = self.store.get(&pods.key()).await?.ok_or_else(|| ask.not_found())?;
        let empty = value!({});
        let options = Options::read(json::at(eviction, "deleteOptions").unwrap_or(&empty))?;
        let waits = json::text(&stored.object, "status.phase") == "Pending";
        if !waits && json::at(&stored.object, "metadata.deletionTimestamp").is_none() {
            self.spend_budget(&pods, &stored.object).await?;
        }
        self.delete(&pods, &options).await?;
        let mut success = Status::success(None);
        success["code"] = value!(201);
        Ok(Done::created(success))
    }

    async fn spend_budget(&self, ask: &Ask, pod: &Value) -> Result<(), Status> {
        let budgets = built_in_resource("policy", "poddisruptionbudgets");
        for budget in self.cache.list(budgets, &ask.namespace) {
            let selects = selector::Labels::of(json::at(&budget, "spec.selector"));
            if !selects.is_some_and(|labels| labels.select(pod)) {
                continue;
            }
            let name = json::text(&budget, "metadata.name");
            let of = Ask::internal("system:eviction", budgets, &ask.namespace, name).of("status");
            let Some(held) = self.store.get(&of.key()).await? else { continue };
            if json::int(&held.object, "status.disruptionsAllowed") <= 0 {
                let healthy = json::int(&held.object, "status.currentHealthy");
                let desired = json::int(&held.object, "status.desiredHealthy");
                let message = format!(
                    "The disruption budget {name} needs {desired} healthy pods and has {healthy} currently"
                );
                return Err(Status::new(
                    429,
                    "TooManyRequests",
                    "Cannot evict pod as it would violate the pod's disruption budget.",
                )
                .with_causes(value!([{"reason": "DisruptionBudget", "message": message}])));
            }
            let pod_name = ask.name.clone();
            let spend = move |budget: &mut Value| {
                let left = json::int(budget, "status.disruptionsAllowed") - 1;
                json::set(budget, "status.disruptionsAllowed", left.max(0));
                json::map_mut(budget, "status.disruptedPods").insert(pod_name.clone(), value!(clock::now()));
            };
            self.amend(&of, &spend).await?;
        }
        Ok(())
    }

    /// A token of a service account.
    pub(crate) async fn request_token(&self, ask: &Ask, body: Value) -> Result<Done, Status> {
        let account = self.store.get(&ask.key()).await?.ok_or_else(|| ask.not_found())?;
        let mut request = body;
        json::set(&mut request, "apiVersion", "authentication.k8s.io/v1");
        json::set(&mut request, "kind", "TokenRequest");
        let seconds = json::at(&request, "spec.expirationSeconds").and_then(Value::as_i64).unwrap_or(3600);
        if !(600..=1 << 32).contains(&seconds) {
            let cause = Cause::invalid(
                "spec.expirationSeconds",
                &value!(seconds),
                "may not specify a duration less than 10 minutes",
            );
            return Err(Status::invalid("authentication.k8s.io", "TokenRequest", &ask.name, &[cause]));
        }
        let audiences: Vec<String> = json::list(&request, "spec.audiences")
            .iter()
            .filter_map(Value::as_str)
            .map(str::to_owned)
            .collect();
        let bound = self.bound_to(ask, &request).await?;
        let issued = self.authenticator.issue(
            &ask.namespace,
            &ask.name,
            json::text(&account.object, "metadata.uid"),
            &audiences,
            seconds,
            bound.as_ref(),
        );
        let (token, audiences, expires) = issued.map_err(Status::internal)?;
        json::set(&mut request, "spec.audiences", audiences);
        json::set(&mut request, "spec.expirationSeconds", seconds);
        json::default(&mut request, "spec.boundObjectRef", Value::Null);
        json::set(
            &mut request,
            "metadata",
            value!({
                "name": ask.name, "namespace": ask.namespace, "creationTimestamp": clock::now(),
                "uid": json::text(&account.object, "metadata.uid"),
            }),
        );
        json::set(
            &mut request,
            "status",
            value!({"token": token, "expirationTimestamp": clock::seconds(expires)}),
        );
        Ok(Done::created(request))
    }

    async fn bound_to(&self, ask: &Ask, request: &Value) -> Result<Option<BoundTo>, Status> {
        let reference = json::at(request, "spec.boundObjectRef").filter(|reference| !reference.is_null());
        let Some(reference) = reference else { return Ok(None) };
        let (kind, name) = (json::text(reference, "kind"), json::text(reference, "name"));
        let resource = match kind {
            "Pod" => built_in_resource("", "pods"),
            "Secret" => built_in_resource("", "secrets"),
            _ => {
                let why = format!("cannot bind token to object of type {kind}");
                return Err(Status::bad_request(why));
            }
        };
        let missing = || Status::not_found("", &resource.plural, name);
        let object = self.store.get(&resource.key(&ask.namespace, name)).await?.ok_or_else(missing)?.object;
        let uid = json::text(&object, "metadata.uid");
        let said = json::text(reference, "uid");
        if !said.is_empty() && said != uid {
            let why = format!(
                "the UID in the bound object reference ({said}) does not match the UID in record. The object might have been deleted and then recreated"
            );
            return Err(Status::conflict("", &resource.plural, name, &why));
        }
        if kind == "Pod" && json::text(&object, "spec.serviceAccountName") != ask.name {
            return Err(Status::bad_request(format!(
                "cannot bind token for serviceaccount \"{}\" to pod running with different serviceaccount name.",
                ask.name
            )));
        }
        Ok(Some(BoundTo { kind: kind.to_ascii_lowercase(), name: name.to_owned(), uid: uid.to_owned() }))
    }

    /// Changes who must agree before a namespace is removed.
    pub(crate) async fn finalize(&self, ask: &Ask, body: Value) -> Result<Done, Status> {
        let plain = Ask { subresource: String::new(), ..ask.clone() };
        let namespace = object_of(&plain, body, &mut Vec::new())?;
        let finalizers = json::at(&namespace, "spec.finalizers").cloned();
        let change = |object: &mut Value| match &finalizers {
            Some(finalizers) => json::set(object, "spec.finalizers", finalizers.clone()),
            None => drop(json::remove(object, "spec.finalizers")),
        };
        self.amend(&Ask { subresource: "finalize".to_owned(), ..plain }, &change).await
    }
}

fn scale_paths(resource: &Resource) -> Result<&Scale, Status> {
    resource.scale.as_ref().ok_or_else(Status::resource_not_found)
}

fn scale_of(object: &Value, paths: &Scale) -> Value {
    let meta = |field: &str| json::at(object, &format!("metadata.{field}")).cloned();
    let mut metadata = value!({});
    for field in ["name", "namespace", "uid", "resourceVersion", "creationTimestamp"] {
        if let Some(found) = meta(field) {
            metadata[field] = found;
        }
    }
    let mut scale = value!({
        "kind": "Scale",
        "apiVersion": "autoscaling/v1",
        "metadata": metadata,
        "spec": {},
        "status": {"replicas": json::int(object, &paths.status)},
    });
    let replicas = json::int(object, &paths.spec);
    if replicas != 0 {
        scale["spec"]["replicas"] = value!(replicas);
    }
    let selector = match json::at(object, &paths.selector) {
        Some(Value::String(text)) if !paths.selector.is_empty() => text.clone(),
        Some(selector @ Value::Object(_)) => selector::selector_text(Some(selector)),
        _ => String::new(),
    };
    if !selector.is_empty() {
        scale["status"]["selector"] = value!(selector);
    }
    scale
}
