//! Pods and what pods are made from.

use serde_json::{Value, json as value};

use crate::{json, quantity::Milli};

/// Defaults of what stands in every pod and in every template of pods.
pub(super) fn default_spec(spec: &mut Value) {
    json::default(spec, "restartPolicy", "Always");
    json::default(spec, "terminationGracePeriodSeconds", 30);
    json::default(spec, "dnsPolicy", "ClusterFirst");
    json::default(spec, "securityContext", value!({}));
    json::default(spec, "schedulerName", "default-scheduler");
    let account = json::text(spec, "serviceAccountName").to_owned();
    let old_name = json::text(spec, "serviceAccount").to_owned();
    match (account.is_empty(), old_name.is_empty()) {
        (true, false) => json::set(spec, "serviceAccountName", old_name),
        (false, _) => json::set(spec, "serviceAccount", account),
        (true, true) => {}
    }
    let host_network = json::truth(spec, "hostNetwork");
    for field in ["initContainers", "containers", "ephemeralContainers"] {
        for container in spec.get_mut(field).and_then(Value::as_array_mut).into_iter().flatten() {
            default_container(container, host_network);
        }
    }
    for volume in spec.get_mut("volumes").and_then(Value::as_array_mut).into_iter().flatten() {
        default_volume(volume);
    }
}

fn default_container(container: &mut Value, host_network: bool) {
    json::default(container, "terminationMessagePath", "/dev/termination-log");
    json::default(container, "terminationMessagePolicy", "File");
    let image = json::text(container, "image");
    let name = image.rsplit('/').next().unwrap_or_default();
    let latest = !image.contains('@') && name.split_once(':').is_none_or(|(_, tag)| tag == "latest");
    json::default(container, "imagePullPolicy", if latest { "Always" } else { "IfNotPresent" });
    for port in container.get_mut("ports").and_then(Value::as_array_mut).into_iter().flatten() {
        json::default(port, "protocol", "TCP");
        if host_network && let Some(number) = port.get("containerPort").cloned() {
            json::default(port, "hostPort", number);
        }
    }
    for probe in ["livenessProbe", "readinessProbe", "startupProbe"] {
        if let Some(probe) = container.get_mut(probe).filter(|probe| probe.is_object()) {
            json::default(probe, "timeoutSeconds", 1);
            json::default(probe, "periodSeconds", 10);
            json::default(probe, "successThreshold", 1);
            json::default(probe, "failureThreshold", 3);
            default_handler(probe);
            if let Some(grpc) = probe.get_mut("grpc").filter(|grpc| grpc.is_object()) {
                json::default(grpc, "service", "");
            }
        }
    }
    for hook in ["postStart", "preStop"] {
        if let Some(handler) = container.get_mut("lifecycle").and_then(|lifecycle| lifecycle.get_mut(hook)) {
            default_handler(handler);
        }
    }
    for variable in container.get_mut("env").and_then(Value::as_array_mut).into_iter().flatten() {
        if let Some(field) = variable.get_mut("valueFrom").and_then(|from| from.get_mut("fieldRef")) {
            json::default(field, "apiVersion", "v1");
        }
    }
    // What may be used at most and is not asked for at least is asked for.
    let limits = json::map(container, "resources.limits").cloned().unwrap_or_default();
    for (resource, limit) in limits {
        let requests = json::map_mut(container, "resources.requests");
        requests.entry(resource).or_insert(limit);
    }
}

fn default_handler(handler: &mut Value) {
    if let Some(http) = handler.get_mut("httpGet").filter(|http| http.is_object()) {
        json::default(http, "path", "/");
        json::default(http, "scheme", "HTTP");
    }
}

fn default_volume(volume: &mut Value) {
    if volume.as_object().is_some_and(|volume| volume.len() <= 1) {
        json::set(volume, "emptyDir", value!({}));
    }
    for source in ["secret", "configMap", "downwardAPI", "projected"] {
        if let Some(source) = volume.get_mut(source).filter(|source| source.is_object()) {
            json::default(source, "defaultMode", 420);
        }
    }
    if let Some(path) = volume.get_mut("hostPath").filter(|path| path.is_object()) {
        json::default(path, "type", "");
    }
    let sources = volume.get_mut("projected").and_then(|projected| projected.get_mut("sources"));
    for source in sources.and_then(Value::as_array_mut).into_iter().flatten() {
        if let Some(token) = source.get_mut("serviceAccountToken").filter(|token| token.is_object()) {
            json::default(token, "expirationSeconds", 3600);
        }
        default_items(source.get_mut("downwardAPI"));
    }
    default_items(volume.get_mut("downwardAPI"));
}

fn default_items(source: Option<&mut Value>) {
    let items = source.and_then(|source| source.get_mut("items")).and_then(Value::as_array_mut);
    for item in items.into_iter().flatten() {
        if let Some(field) = item.get_mut("fieldRef").filter(|field| field.is_object()) {
            json::default(field, "apiVersion", "v1");
        }
    }
}

/// Guaranteed, Burstable or BestEffort.
pub(super) fn qos_class(spec: &Value) -> &'static str {
    let containers = || json::list(spec, "containers").iter().chain(json::list(spec, "initContainers"));
    let amount = |container: &Value, which: &str, resource: &str| {
        Milli::of(json::map(container, &format!("resources.{which}")).and_then(|map| map.get(resource)))
    };
    let any = containers().any(|container| {
        ["cpu", "memory"].iter().any(|resource| {
            ["limits", "requests"].iter().any(|which| amount(container, which, resource).0 > 0)
        })
    });
    let guaranteed = containers().all(|container| {
        ["cpu", "memory"].iter().all(|resource| {
            let limit = amount(container, "limits", resource);
            limit.0 > 0 && limit == amount(container, "requests", resource)
        })
    });
    match (any, guaranteed) {
        (false, _) => "BestEffort",
        (true, true) => "Guaranteed",
        (true, false) => "Burstable",
    }
}

/// Whether a pod is ready.
pub(crate) fn is_ready(pod: &Value) -> bool {
    crate::crd::condition(pod, "Ready")
}
