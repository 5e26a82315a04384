//! What is wrong with objects of built-in kinds.

use std::collections::BTreeSet;

use serde_json::{Map, Value, json as value};

use crate::{
    api::Ask,
    crd::structural::Schema,
    json, names,
    selector::{Labels, is_label_key, is_label_value},
    status::Cause,
};

/// What is wrong with the metadata of any object.
pub(crate) fn validate_metadata(object: &Value, old: Option<&Value>, causes: &mut Vec<Cause>) {
    for (key, label) in json::map(object, "metadata.labels").into_iter().flatten() {
        check_labels("metadata.labels", key, label, causes);
    }
    let mut size = 0;
    for (key, note) in json::map(object, "metadata.annotations").into_iter().flatten() {
        size += key.len() + note.as_str().unwrap_or_default().len();
        if !is_label_key(&key.to_ascii_lowercase()) {
            causes.push(Cause::invalid("metadata.annotations", &value!(key), QUALIFIED));
        }
    }
    if size > 256 << 10 {
        causes.push(Cause {
            reason: "FieldValueTooLong",
            message: "Too long: may not be more than 262144 bytes".to_owned(),
            field: "metadata.annotations".to_owned(),
        });
    }
    for name in json::list(object, "metadata.finalizers").iter().filter_map(Value::as_str) {
        if !is_label_key(name) {
            causes.push(Cause::invalid("metadata.finalizers", &value!(name), QUALIFIED));
        }
    }
    let mut controllers = 0;
    for (index, owner) in json::list(object, "metadata.ownerReferences").iter().enumerate() {
        controllers += usize::from(json::truth(owner, "controller"));
        for field in ["apiVersion", "kind", "name", "uid"] {
            if json::text(owner, field).is_empty() {
                let path = format!("metadata.ownerReferences[{index}].{field}");
                causes.push(Cause::invalid(path, &value!(""), "must not be empty"));
            }
        }
    }
    if controllers > 1 {
        let why = "Only one reference can have Controller set to true";
        causes.push(Cause::invalid("metadata.ownerReferences", &Value::Null, why));
    }
    let Some(old) = old else { return };
    if json::at(old, "metadata.deletionTimestamp").is_some() {
        let held = json::list(old, "metadata.finalizers");
        let added = json::list(object, "metadata.finalizers").iter().find(|name| !held.contains(name));
        if added.is_some() {
            let why = "no new finalizers can be added if the object is being deleted";
            causes.push(Cause::forbidden("metadata.finalizers", why));
        }
    }
}

/// What is wrong with the rest of an object of a built-in kind.
pub(crate) fn validate(ask: &Ask, object: &Value, old: Option<&Value>, causes: &mut Vec<Cause>) {
    if !["", "binding", "ephemeralcontainers"].contains(&ask.subresource.as_str()) {
        return;
    }
    let spec = json::at(object, "spec");
    match (ask.resource.group.as_str(), ask.resource.plural.as_str()) {
        ("", "pods") => match old {
            None => pod_spec(spec, "spec", causes),
            Some(old) if ask.subresource.is_empty() => pod_update(old, object, causes),
            Some(_) => {}
        },
        ("", "configmaps" | "secrets") => data(object, old, causes),
        ("", "services") => service(object, old, causes),
        ("apps", "deployments" | "replicasets" | "daemonsets" | "statefulsets") => {
            workload(object, old, causes);
        }
        ("batch", "jobs") => job(object, old, causes),
        ("batch", "cronjobs") => {
            if json::text(object, "spec.schedule").is_empty() {
                causes.push(Cause::required("spec.schedule", ""));
            }
            pod_spec(
                json::at(object, "spec.jobTemplate.spec.template.spec"),
                "spec.jobTemplate.spec.template.spec",
                causes,
            );
        }
        ("rbac.authorization.k8s.io", "rolebindings" | "clusterrolebindings") => binding(object, old, causes),
        ("rbac.authorization.k8s.io", _) => rules(object, causes),
        ("apiextensions.k8s.io", _) => definition(object, old, causes),
        ("policy", _) => {
            let both = ["minAvailable", "maxUnavailable"]
                .iter()
                .all(|field| json::at(object, &format!("spec.{field}")).is_some());
            if both {
                let why = "minAvailable and maxUnavailable cannot be both set";
                causes.push(Cause::invalid("spec", &Value::Null, why));
            }
        }
        ("coordination.k8s.io", _) => {
            let seconds = json::at(object, "spec.leaseDurationSeconds").and_then(Value::as_i64);
            if let Some(seconds) = seconds.filter(|seconds| *seconds <= 0) {
                let why = "must be greater than 0";
                causes.push(Cause::invalid("spec.leaseDurationSeconds", &value!(seconds), why));
            }
        }
        ("discovery.k8s.io", _) => {
            let known = ["IPv4", "IPv6", "FQDN"];
            if !known.contains(&json::text(object, "addressType")) {
                causes.push(Cause::unsupported(
                    "addressType",
                    &value!(json::text(object, "addressType")),
                    &known,
                ));
            }
        }
        _ => {}
    }
}

const QUALIFIED: &str = "name part must consist of alphanumeric characters, '-', '_' or '.', and must start and \
    end with an alphanumeric character (e.g. 'MyName',  or 'my.name',  or '123-abc', regex used for validation \
    is '([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]')";
const LABEL_VALUE: &str = "a valid label must be an empty string or consist of alphanumeric characters, '-', '_' \
    or '.', and must start and end with an alphanumeric character (e.g. 'MyValue',  or 'my_value',  or '12345', \
    regex used for validation is '(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?')";

fn check_labels(path: &str, key: &str, label: &Value, causes: &mut Vec<Cause>) {
    if !is_label_key(key) {
        causes.push(Cause::invalid(path, &value!(key), QUALIFIED));
    }
    if !label.as_str().is_some_and(is_label_value) {
        causes.push(Cause::invalid(path, label, LABEL_VALUE));
    }
}

fn pod_spec(spec: Option<&Value>, path: &str, causes: &mut Vec<Cause>) {
    let empty = value!({});
    let spec = spec.unwrap_or(&empty);
    let at = |field: &str| format!("{path}.{field}");
    if json::list(spec, "containers").is_empty() {
        causes.push(Cause::required(at("containers"), ""));
    }
    let mut volumes = BTreeSet::new();
    for (index, volume) in json::list(spec, "volumes").iter().enumerate() {
        let name = json::text(volume, "name");
        let field = at(&format!("volumes[{index}].name"));
        if !names::is_label(name) {
            causes.push(name_problem(&field, name));
        }
        if !volumes.insert(name) {
            causes.push(Cause::duplicate(field, &value!(name)));
        }
        if volume.as_object().is_some_and(|volume| volume.len() > 2) {
            let field = at(&format!("volumes[{index}]"));
            causes.push(Cause::forbidden(field, "may not specify more than 1 volume type"));
        }
    }
    let mut containers = BTreeSet::new();
    for group in ["initContainers", "containers"] {
        for (index, container) in json::list(spec, group).iter().enumerate() {
            let here = at(&format!("{group}[{index}]"));
            self::container(container, &here, &volumes, causes);
            let name = json::text(container, "name");
            if !containers.insert(name) {
                causes.push(Cause::duplicate(format!("{here}.name"), &value!(name)));
            }
        }
    }
    let choices: [(&str, &[&str]); 2] = [
        ("restartPolicy", &["Always", "OnFailure", "Never"]),
        ("dnsPolicy", &["ClusterFirst", "ClusterFirstWithHostNet", "Default", "None"]),
    ];
    for (field, known) in choices {
        let text = json::text(spec, field);
        if !known.contains(&text) {
            causes.push(Cause::unsupported(at(field), &value!(text), known));
        }
    }
    for (key, label) in json::map(spec, "nodeSelector").into_iter().flatten() {
        check_labels(&at("nodeSelector"), key, label, causes);
    }
}

fn container(container: &Value, path: &str, volumes: &BTreeSet<&str>, causes: &mut Vec<Cause>) {
    let name = json::text(container, "name");
    if name.is_empty() {
        causes.push(Cause::required(format!("{path}.name"), ""));
    } else if !names::is_label(name) {
        causes.push(name_problem(&format!("{path}.name"), name));
    }
    if json::text(container, "image").is_empty() {
        causes.push(Cause::required(format!("{path}.image"), ""));
    }
    for (index, mount) in json::list(container, "volumeMounts").iter().enumerate() {
        let volume = json::text(mount, "name");
        if !volumes.contains(volume) {
            let field = format!("{path}.volumeMounts[{index}].name");
            let message = format!("Not found: \"{volume}\"");
            causes.push(Cause { reason: "FieldValueNotFound", message, field });
        }
        if json::text(mount, "mountPath").is_empty() {
            causes.push(Cause::required(format!("{path}.volumeMounts[{index}].mountPath"), ""));
        }
    }
    for (index, port) in json::list(container, "ports").iter().enumerate() {
        let number = json::int(port, "containerPort");
        if !(1..=65_535).contains(&number) {
            let field = format!("{path}.ports[{index}].containerPort");
            causes.push(Cause::invalid(field, &value!(number), "must be between 1 and 65535, inclusive"));
        }
    }
    for (index, variable) in json::list(container, "env").iter().enumerate() {
        if json::text(variable, "name").is_empty() {
            causes.push(Cause::required(format!("{path}.env[{index}].name"), ""));
        }
    }
    let policy = json::text(container, "imagePullPolicy");
    if !["Always", "IfNotPresent", "Never"].contains(&policy) {
        let known = ["Always", "IfNotPresent", "Never"];
        causes.push(Cause::unsupported(format!("{path}.imagePullPolicy"), &value!(policy), &known));
    }
}

fn name_problem(field: &str, name: &str) -> Cause {
    let why = names::Names::Label.problem(name).unwrap_or("is not a name");
    if name.is_empty() { Cause::required(field, "") } else { Cause::invalid(field, &value!(name), why) }
}

/// Of a pod that is there, images and a few more fields can be changed.
fn pod_update(old: &Value, new: &Value, causes: &mut Vec<Cause>) {
    let comparable = |pod: &Value| {
        let mut spec = json::at(pod, "spec").cloned().unwrap_or_default();
        for field in ["containers", "initContainers"] {
            for container in spec.get_mut(field).and_then(Value::as_array_mut).into_iter().flatten() {
                json::remove(container, "image");
            }
        }
        for field in
            ["activeDeadlineSeconds", "tolerations", "terminationGracePeriodSeconds", "schedulingGates"]
        {
            json::remove(&mut spec, field);
        }
        spec
    };
    let tolerations = json::list(new, "spec.tolerations");
    let removed = json::list(old, "spec.tolerations").iter().any(|held| {
        !tolerations.iter().any(|now| {
            let plain = |toleration: &Value| {
                let mut toleration = toleration.clone();
                json::remove(&mut toleration, "tolerationSeconds");
                toleration
            };
            plain(now) == plain(held)
        })
    });
    if comparable(old) != comparable(new) || removed {
        let why = "pod updates may not change fields other than `spec.containers[*].image`,\
                   `spec.initContainers[*].image`,`spec.activeDeadlineSeconds`,`spec.tolerations` (only \
                   additions to existing tolerations),`spec.terminationGracePeriodSeconds` (allow it to be set \
                   to 1 if it was previously negative)";
        causes.push(Cause::forbidden("spec", why));
    }
    for (index, container) in json::list(new, "spec.containers").iter().enumerate() {
        if json::text(container, "image").is_empty() {
            causes.push(Cause::required(format!("spec.containers[{index}].image"), ""));
        }
    }
}

fn data(object: &Value, old: Option<&Value>, causes: &mut Vec<Cause>) {
    let mut size = 0;
    for field in ["data", "binaryData"] {
        for (key, held) in json::map(object, field).into_iter().flatten() {
            size += held.as_str().unwrap_or_default().len();
            let fits = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
            if key.is_empty() || key.len() > 253 || !key.chars().all(fits) || key == "." || key == ".." {
                let why = "a valid config key must consist of alphanumeric characters, '-', '_' or '.' (e.g. \
                           'key.name',  or 'KEY_NAME',  or 'key-name', regex used for validation is \
                           '[-._a-zA-Z0-9]+')";
                causes.push(Cause::invalid(format!("{field}[{key}]"), &value!(key), why));
            }
        }
    }
    if size > 1 << 20 {
        let message = "Too long: may not be more than 1048576 bytes".to_owned();
        causes.push(Cause { reason: "FieldValueTooLong", message, field: String::new() });
    }
    let Some(old) = old else { return };
    if json::text(old, "type") != json::text(object, "type") {
        causes.push(Cause::immutable("type", &value!(json::text(object, "type"))));
    }
    if json::truth(old, "immutable") {
        if !json::truth(object, "immutable") {
            causes.push(Cause::forbidden("immutable", "field is immutable when `immutable` is set"));
        }
        for field in ["data", "binaryData"] {
            if old.get(field) != object.get(field) {
                causes.push(Cause::forbidden(field, "field is immutable when `immutable` is set"));
            }
        }
    }
}

fn service(object: &Value, old: Option<&Value>, causes: &mut Vec<Cause>) {
    let ty = json::text(object, "spec.type");
    let known = ["ClusterIP", "ExternalName", "LoadBalancer", "NodePort"];
    if !known.contains(&ty) {
        causes.push(Cause::unsupported("spec.type", &value!(ty), &known));
    }
    let ports = json::list(object, "spec.ports");
    let headless = json::text(object, "spec.clusterIP") == "None";
    if ports.is_empty() && ty != "ExternalName" && !headless {
        causes.push(Cause::required("spec.ports", ""));
    }
    for (index, port) in ports.iter().enumerate() {
        let number = json::int(port, "port");
        if !(1..=65_535).contains(&number) {
            let field = format!("spec.ports[{index}].port");
            causes.push(Cause::invalid(field, &value!(number), "must be between 1 and 65535, inclusive"));
        }
        if ports.len() > 1 && json::text(port, "name").is_empty() {
            causes.push(Cause::required(format!("spec.ports[{index}].name"), ""));
        }
    }
    if ty == "ExternalName" && json::text(object, "spec.externalName").is_empty() {
        causes.push(Cause::required("spec.externalName", ""));
    }
    if let Some(old) = old {
        let held = json::text(old, "spec.clusterIP");
        let now = json::text(object, "spec.clusterIP");
        if !held.is_empty() && held != now && ty != "ExternalName" {
            causes.push(Cause::immutable("spec.clusterIP", &value!(now)));
        }
    }
}

fn workload(object: &Value, old: Option<&Value>, causes: &mut Vec<Cause>) {
    pod_spec(json::at(object, "spec.template.spec"), "spec.template.spec", causes);
    let policy = json::text(object, "spec.template.spec.restartPolicy");
    if policy != "Always" {
        let field = "spec.template.spec.restartPolicy";
        causes.push(Cause::unsupported(field, &value!(policy), &["Always"]));
    }
    let replicas = json::int(object, "spec.replicas");
    if replicas < 0 {
        let why = "must be greater than or equal to 0";
        causes.push(Cause::invalid("spec.replicas", &value!(replicas), why));
    }
    selector(object, old, causes);
}

fn selector(object: &Value, old: Option<&Value>, causes: &mut Vec<Cause>) {
    let selector = json::at(object, "spec.selector");
    let labels = json::map(object, "spec.template.metadata.labels");
    match Labels::of(selector) {
        None => causes.push(Cause::required("spec.selector", "")),
        Some(wanted) if wanted.is_empty() => {
            let why = "empty selector is invalid for deployment";
            causes.push(Cause::invalid("spec.selector", selector.unwrap_or(&Value::Null), why));
        }
        Some(wanted) if !wanted.matches(labels) => {
            let labels = labels.cloned().unwrap_or_else(Map::new);
            let why = "`selector` does not match template `labels`";
            causes.push(Cause::invalid("spec.template.metadata.labels", &Value::Object(labels), why));
        }
        Some(_) => {}
    }
    if let Some(old) = old
        && json::at(old, "spec.selector") != selector
    {
        causes.push(Cause::immutable("spec.selector", selector.unwrap_or(&Value::Null)));
    }
}

fn job(object: &Value, old: Option<&Value>, causes: &mut Vec<Cause>) {
    pod_spec(json::at(object, "spec.template.spec"), "spec.template.spec", causes);
    let policy = json::text(object, "spec.template.spec.restartPolicy");
    if policy == "Always" {
        let known = ["OnFailure", "Never"];
        causes.push(Cause::unsupported("spec.template.spec.restartPolicy", &value!(policy), &known));
    }
    selector(object, old, causes);
    let Some(old) = old else { return };
    for field in ["completions", "template"] {
        let path = format!("spec.{field}");
        if json::at(old, &path) != json::at(object, &path) {
            causes.push(Cause::immutable(&path, json::at(object, &path).unwrap_or(&Value::Null)));
        }
    }
}

fn binding(object: &Value, old: Option<&Value>, causes: &mut Vec<Cause>) {
    let kind = json::text(object, "roleRef.kind");
    if !["Role", "ClusterRole"].contains(&kind) {
        causes.push(Cause::unsupported("roleRef.kind", &value!(kind), &["Role", "ClusterRole"]));
    }
    if json::text(object, "roleRef.name").is_empty() {
        causes.push(Cause::required("roleRef.name", ""));
    }
    for (index, subject) in json::list(object, "subjects").iter().enumerate() {
        let kind = json::text(subject, "kind");
        let known = ["ServiceAccount", "User", "Group"];
        if !known.contains(&kind) {
            causes.push(Cause::unsupported(format!("subjects[{index}].kind"), &value!(kind), &known));
        }
        if json::text(subject, "name").is_empty() {
            causes.push(Cause::required(format!("subjects[{index}].name"), ""));
        }
    }
    if let Some(old) = old
        && old.get("roleRef") != object.get("roleRef")
    {
        causes.push(Cause::invalid("roleRef", &object["roleRef"], "cannot change roleRef"));
    }
}

fn rules(object: &Value, causes: &mut Vec<Cause>) {
    for (index, rule) in json::list(object, "rules").iter().enumerate() {
        let at = |field: &str| format!("rules[{index}].{field}");
        if json::list(rule, "verbs").is_empty() {
            causes.push(Cause::required(at("verbs"), "verbs must contain at least one value"));
        }
        if json::list(rule, "nonResourceURLs").is_empty() {
            if json::list(rule, "apiGroups").is_empty() {
                causes.push(Cause::required(
                    at("apiGroups"),
                    "resource rules must supply at least one api group",
                ));
            }
            if json::list(rule, "resources").is_empty() {
                causes.push(Cause::required(
                    at("resources"),
                    "resource rules must supply at least one resource",
                ));
            }
        }
    }
}

fn definition(object: &Value, old: Option<&Value>, causes: &mut Vec<Cause>) {
    let (plural, group) = (json::text(object, "spec.names.plural"), json::text(object, "spec.group"));
    let wanted = format!("{plural}.{group}");
    let name = json::text(object, "metadata.name");
    if name != wanted {
        let why = format!("must be spec.names.plural+\".\"+spec.group: {wanted:?}");
        causes.push(Cause::invalid("metadata.name", &value!(name), &why));
    }
    if !names::is_subdomain(group) || !group.contains('.') {
        causes.push(Cause::invalid("spec.group", &value!(group), "should be a domain with at least one dot"));
    }
    if !names::is_label_1035(plural) {
        causes.push(Cause::invalid("spec.names.plural", &value!(plural), "is not a DNS-1035 label"));
    }
    if json::text(object, "spec.names.kind").is_empty() {
        causes.push(Cause::required("spec.names.kind", ""));
    }
    let scope = json::text(object, "spec.scope");
    if !["Cluster", "Namespaced"].contains(&scope) {
        causes.push(Cause::unsupported("spec.scope", &value!(scope), &["Cluster", "Namespaced"]));
    }
    if json::text(object, "spec.conversion.strategy") != "None" {
        let strategy = json::text(object, "spec.conversion.strategy");
        causes.push(Cause::unsupported("spec.conversion.strategy", &value!(strategy), &["None"]));
    }
    let versions = json::list(object, "spec.versions");
    if versions.iter().filter(|version| json::truth(version, "storage")).count() != 1 {
        let why = "must have exactly one version marked as storage version";
        causes.push(Cause::invalid("spec.versions", &value!(versions.len()), why));
    }
    for (index, version) in versions.iter().enumerate() {
        let path = format!("spec.versions[{index}]");
        if !names::is_label_1035(json::text(version, "name")) {
            let held = value!(json::text(version, "name"));
            causes.push(Cause::invalid(format!("{path}.name"), &held, "is not a DNS-1035 label"));
        }
        match json::at(version, "schema.openAPIV3Schema") {
            None => {
                let field = format!("{path}.schema.openAPIV3Schema");
                causes.push(Cause::required(field, "schemas are required"));
            }
            Some(given) => {
                if let Err(error) = Schema::read(given) {
                    let field = error.path.replace("spec.validation", &format!("{path}.schema"));
                    causes.push(Cause { reason: "FieldValueInvalid", message: error.what, field });
                }
            }
        }
    }
    if let Some(old) = old {
        for field in ["spec.group", "spec.scope", "spec.names.plural", "spec.names.kind"] {
            if json::at(old, field) != json::at(object, field) {
                causes.push(Cause::immutable(field, json::at(object, field).unwrap_or(&Value::Null)));
            }
        }
    }
}
