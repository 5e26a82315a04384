//! Values of fields that nobody set.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde_json::{Value, json as value};

use super::pods;
use crate::{json, registry::Resource};

/// Fills in what a kind has by default.
pub(crate) fn default(resource: &Resource, object: &mut Value) {
    if let Some(custom) = &resource.custom {
        custom.schema.fill(object);
        return;
    }
    match (resource.group.as_str(), resource.plural.as_str()) {
        ("", "namespaces") => {
            let name = json::text(object, "metadata.name").to_owned();
            if !name.is_empty() {
                let labels = json::map_mut(object, "metadata.labels");
                labels.insert("kubernetes.io/metadata.name".to_owned(), value!(name));
            }
        }
        ("", "pods") => {
            json::default(object, "spec.enableServiceLinks", true);
            with(object, "spec", pods::default_spec);
        }
        ("", "podtemplates") => with(object, "template.spec", pods::default_spec),
        ("", "services") => service(object),
        ("", "secrets") => secret(object),
        ("", "nodes") => {
            if json::at(object, "status.allocatable").is_none()
                && let Some(capacity) = json::at(object, "status.capacity").cloned()
            {
                json::set(object, "status.allocatable", capacity);
            }
        }
        ("", "persistentvolumeclaims") => json::default(object, "spec.volumeMode", "Filesystem"),
        ("", "endpoints") => {
            for subset in object.get_mut("subsets").and_then(Value::as_array_mut).into_iter().flatten() {
                default_protocol(subset);
            }
        }
        ("discovery.k8s.io", "endpointslices") => default_protocol(object),
        ("apps", "deployments") => deployment(object),
        ("apps", "replicasets") => {
            json::default(object, "spec.replicas", 1);
            labels_of_template(object);
            with(object, "spec.template.spec", pods::default_spec);
        }
        ("apps", "daemonsets") => daemon_set(object),
        ("apps", "statefulsets") => stateful_set(object),
        ("batch", "jobs") => {
            job(object);
            labels_of_template(object);
        }
        ("batch", "cronjobs") => {
            json::default(object, "spec.concurrencyPolicy", "Allow");
            json::default(object, "spec.suspend", false);
            json::default(object, "spec.successfulJobsHistoryLimit", 3);
            json::default(object, "spec.failedJobsHistoryLimit", 1);
            with(object, "spec.jobTemplate.spec.template.spec", pods::default_spec);
        }
        ("rbac.authorization.k8s.io", "rolebindings" | "clusterrolebindings") => binding(object),
        ("apiextensions.k8s.io", _) => definition(object),
        ("storage.k8s.io", _) => {
            json::default(object, "reclaimPolicy", "Delete");
            json::default(object, "volumeBindingMode", "Immediate");
        }
        ("scheduling.k8s.io", _) => json::default(object, "preemptionPolicy", "PreemptLowerPriority"),
        _ => {}
    }
}

fn with(object: &mut Value, path: &str, fill: impl Fn(&mut Value)) {
    let found = path.split('.').try_fold(object, |value, name| value.get_mut(name));
    if let Some(found) = found.filter(|found| found.is_object()) {
        fill(found);
    }
}

fn deployment(object: &mut Value) {
    json::default(object, "spec.replicas", 1);
    json::default(object, "spec.strategy.type", "RollingUpdate");
    if json::text(object, "spec.strategy.type") == "RollingUpdate" {
        json::default(object, "spec.strategy.rollingUpdate.maxUnavailable", "25%");
        json::default(object, "spec.strategy.rollingUpdate.maxSurge", "25%");
    }
    json::default(object, "spec.revisionHistoryLimit", 10);
    json::default(object, "spec.progressDeadlineSeconds", 600);
    with(object, "spec.template.spec", pods::default_spec);
}

fn daemon_set(object: &mut Value) {
    json::default(object, "spec.updateStrategy.type", "RollingUpdate");
    if json::text(object, "spec.updateStrategy.type") == "RollingUpdate" {
        json::default(object, "spec.updateStrategy.rollingUpdate.maxUnavailable", 1);
        json::default(object, "spec.updateStrategy.rollingUpdate.maxSurge", 0);
    }
    json::default(object, "spec.revisionHistoryLimit", 10);
    with(object, "spec.template.spec", pods::default_spec);
}

fn stateful_set(object: &mut Value) {
    json::default(object, "spec.replicas", 1);
    json::default(object, "spec.podManagementPolicy", "OrderedReady");
    json::default(object, "spec.updateStrategy.type", "RollingUpdate");
    if json::text(object, "spec.updateStrategy.type") == "RollingUpdate" {
        json::default(object, "spec.updateStrategy.rollingUpdate.partition", 0);
    }
    json::default(object, "spec.revisionHistoryLimit", 10);
    json::default(object, "spec.persistentVolumeClaimRetentionPolicy.whenDeleted", "Retain");
    json::default(object, "spec.persistentVolumeClaimRetentionPolicy.whenScaled", "Retain");
    with(object, "spec.template.spec", pods::default_spec);
}

fn job(object: &mut Value) {
    let set = |object: &Value, field: &str| json::at(object, &format!("spec.{field}")).is_some();
    if !set(object, "completions") && !set(object, "parallelism") {
        json::set(object, "spec.completions", 1);
    }
    json::default(object, "spec.parallelism", 1);
    json::default(object, "spec.backoffLimit", 6);
    json::default(object, "spec.completionMode", "NonIndexed");
    json::default(object, "spec.suspend", false);
    if !set(object, "podFailurePolicy") {
        json::default(object, "spec.podReplacementPolicy", "TerminatingOrFailed");
    }
    with(object, "spec.template.spec", pods::default_spec);
}

fn labels_of_template(object: &mut Value) {
    if json::map(object, "metadata.labels").is_none()
        && let Some(labels) = json::at(object, "spec.template.metadata.labels").cloned()
    {
        json::set(object, "metadata.labels", labels);
    }
}

fn service(object: &mut Value) {
    json::default(object, "spec.type", "ClusterIP");
    json::default(object, "spec.sessionAffinity", "None");
    if json::text(object, "spec.type") != "ExternalName" {
        json::default(object, "spec.internalTrafficPolicy", "Cluster");
    }
    if ["NodePort", "LoadBalancer"].contains(&json::text(object, "spec.type")) {
        json::default(object, "spec.externalTrafficPolicy", "Cluster");
    }
    with(object, "spec", |spec| {
        for port in spec.get_mut("ports").and_then(Value::as_array_mut).into_iter().flatten() {
            json::default(port, "protocol", "TCP");
            let number = port.get("port").cloned().unwrap_or_default();
            if port.get("targetPort").is_none_or(|target| *target == 0 || *target == "") {
                json::set(port, "targetPort", number);
            }
        }
    });
}

fn secret(object: &mut Value) {
    json::default(object, "type", "Opaque");
    let Some(Value::Object(texts)) = json::remove(object, "stringData") else { return };
    for (key, text) in texts {
        let encoded = STANDARD.encode(text.as_str().unwrap_or_default());
        json::map_mut(object, "data").insert(key, value!(encoded));
    }
}

fn default_protocol(of: &mut Value) {
    for port in of.get_mut("ports").and_then(Value::as_array_mut).into_iter().flatten() {
        json::default(port, "protocol", "TCP");
    }
}

fn binding(object: &mut Value) {
    if json::text(object, "roleRef.apiGroup").is_empty() {
        json::set(object, "roleRef.apiGroup", "rbac.authorization.k8s.io");
    }
    for subject in object.get_mut("subjects").and_then(Value::as_array_mut).into_iter().flatten() {
        if json::text(subject, "kind") != "ServiceAccount" {
            json::default(subject, "apiGroup", "rbac.authorization.k8s.io");
        }
    }
}

fn definition(object: &mut Value) {
    let kind = json::text(object, "spec.names.kind").to_owned();
    json::default(object, "spec.names.singular", kind.to_ascii_lowercase());
    json::default(object, "spec.names.listKind", format!("{kind}List"));
    json::default(object, "spec.conversion.strategy", "None");
    if json::list(object, "status.storedVersions").is_empty() {
        let versions = json::list(object, "spec.versions").iter();
        let stored = versions.filter(|version| json::truth(version, "storage"));
        let stored: Vec<Value> = stored.filter_map(|version| version.get("name").cloned()).collect();
        json::set(object, "status.storedVersions", stored);
    }
}
