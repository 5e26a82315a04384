//! The cells of built-in kinds, as Kubernetes shows them.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::{clock, crd::condition, json, registry::Resource, selector};

const NONE: &str = "<none>";

/// The cells of an object of a built-in kind.
pub(crate) fn cells_of(resource: &Resource, object: &Value) -> Vec<Value> {
    let name = json!(json::text(object, "metadata.name"));
    let created = json::text(object, "metadata.creationTimestamp");
    let age = json!(clock::age(created));
    let number = |path: &str| json!(json::int(object, path));
    let (containers, images) = containers(object);
    let selector = json!(or_none(selector::selector_text(json::at(object, "spec.selector"))));
    match (resource.group.as_str(), resource.plural.as_str()) {
        ("", "nodes") => node(object, name, age),
        ("", "pods") => pod(object, name, age),
        ("apps", "deployments") => {
            let ready = format!(
                "{}/{}",
                json::int(object, "status.readyReplicas"),
                json::int(object, "spec.replicas")
            );
            vec![
                name,
                json!(ready),
                number("status.updatedReplicas"),
                number("status.availableReplicas"),
                age,
                containers,
                images,
                selector,
            ]
        }
        ("metrics.k8s.io", "nodes") => {
            let text = |path| json!(json::text(object, path));
            vec![name, text("usage.cpu"), text("usage.memory"), text("window")]
        }
        ("metrics.k8s.io", "pods") => {
            vec![name, json!(json::list(object, "containers").len()), json!(json::text(object, "window"))]
        }
        ("apps", "replicasets") => vec![
            name,
            number("spec.replicas"),
            number("status.replicas"),
            number("status.readyReplicas"),
            age,
            containers,
            images,
            selector,
        ],
        ("apps", "daemonsets") => vec![
            name,
            number("status.desiredNumberScheduled"),
            number("status.currentNumberScheduled"),
            number("status.numberReady"),
            number("status.updatedNumberScheduled"),
            number("status.numberAvailable"),
            json!(or_none(labels(json::at(object, "spec.template.spec.nodeSelector")))),
            age,
            containers,
            images,
            selector,
        ],
        ("apps", "statefulsets") => {
            let ready = format!(
                "{}/{}",
                json::int(object, "status.readyReplicas"),
                json::int(object, "spec.replicas")
            );
            vec![name, json!(ready), age, containers, images]
        }
        ("batch", "jobs") => job(object, name, age, [containers, images, selector]),
        ("batch", "cronjobs") => {
            let last = json::text(object, "status.lastScheduleTime");
            vec![
                name,
                json!(json::text(object, "spec.schedule")),
                json!(if json::truth(object, "spec.suspend") { "True" } else { "False" }),
                json!(json::list(object, "status.active").len()),
                json!(if last.is_empty() { NONE.to_owned() } else { clock::age(last) }),
                age,
            ]
        }
        ("", "services") => service(object, name, age),
        ("", "endpoints") => vec![name, json!(or_none(endpoints(object))), age],
        ("", "configmaps") => {
            let count = ["data", "binaryData"]
                .iter()
                .filter_map(|field| json::map(object, field))
                .map(serde_json::Map::len);
            vec![name, json!(count.sum::<usize>()), age]
        }
        ("", "secrets") => {
            let count = json::map(object, "data").map_or(0, serde_json::Map::len);
            vec![name, json!(json::text(object, "type")), json!(count), age]
        }
        ("", "namespaces") => vec![name, json!(json::text(object, "status.phase")), age],
        ("", "events") => event(object, name),
        ("", "serviceaccounts") => vec![name, age],
        ("coordination.k8s.io", "leases") => {
            vec![name, json!(json::text(object, "spec.holderIdentity")), age]
        }
        ("discovery.k8s.io", "endpointslices") => {
            let ports = json::list(object, "ports").iter().map(|port| json::int(port, "port").to_string());
            let addresses =
                json::list(object, "endpoints").iter().flat_map(|endpoint| json::list(endpoint, "addresses"));
            let addresses: Vec<&str> = addresses.filter_map(Value::as_str).collect();
            vec![
                name,
                json!(json::text(object, "addressType")),
                json!(unset(few(&ports.collect::<Vec<_>>()))),
                json!(unset(few(&addresses))),
                age,
            ]
        }
        ("policy", "poddisruptionbudgets") => {
            let bound = |path: &str| match json::at(object, path) {
                Some(Value::String(text)) => text.clone(),
                Some(value) => value.to_string(),
                None => "N/A".to_owned(),
            };
            vec![
                name,
                json!(bound("spec.minAvailable")),
                json!(bound("spec.maxUnavailable")),
                number("status.disruptionsAllowed"),
                age,
            ]
        }
        ("rbac.authorization.k8s.io", "rolebindings" | "clusterrolebindings") => {
            let role =
                format!("{}/{}", json::text(object, "roleRef.kind"), json::text(object, "roleRef.name"));
            vec![name, json!(role), age]
        }
        _ => vec![name, json!(created)],
    }
}

fn node(object: &Value, name: Value, age: Value) -> Vec<Value> {
    let mut status =
        match json::list(object, "status.conditions").iter().find(|held| json::text(held, "type") == "Ready")
        {
            Some(ready) if json::text(ready, "status") == "True" => "Ready".to_owned(),
            Some(_) => "NotReady".to_owned(),
            None => "Unknown".to_owned(),
        };
    if json::truth(object, "spec.unschedulable") {
        status.push_str(",SchedulingDisabled");
    }
    let labels = json::map(object, "metadata.labels");
    let roles = labels.into_iter().flatten().filter_map(|(key, value)| {
        let by_key = key.strip_prefix("node-role.kubernetes.io/").filter(|role| !role.is_empty());
        by_key
            .map(str::to_owned)
            .or_else(|| (key == "kubernetes.io/role").then(|| value.as_str().unwrap_or_default().to_owned()))
    });
    let roles = or_none(roles.collect::<Vec<_>>().join(","));
    let address = |ty: &str| {
        let addresses = json::list(object, "status.addresses");
        let found = addresses.iter().find(|address| json::text(address, "type") == ty);
        or_none(found.map(|address| json::text(address, "address").to_owned()).unwrap_or_default())
    };
    let info = |field: &str| json::text(object, &format!("status.nodeInfo.{field}")).to_owned();
    let unknown = |text: String| if text.is_empty() { "<unknown>".to_owned() } else { text };
    let (kernel, architecture) = (info("kernelVersion"), info("architecture"));
    let kernel = if architecture.is_empty() { kernel } else { format!("{kernel} ({architecture})") };
    vec![
        name,
        json!(status),
        json!(roles),
        age,
        json!(info("kubeletVersion")),
        json!(address("InternalIP")),
        json!(address("ExternalIP")),
        json!(unknown(info("osImage"))),
        json!(unknown(kernel)),
        json!(unknown(info("containerRuntimeVersion"))),
    ]
}

fn pod(object: &Value, name: Value, age: Value) -> Vec<Value> {
    let total = json::list(object, "spec.containers").len();
    let statuses = json::list(object, "status.containerStatuses");
    let ready = statuses.iter().filter(|status| json::truth(status, "ready")).count();
    let restarts: i64 = statuses.iter().map(|status| json::int(status, "restartCount")).sum();
    let last = statuses.iter().map(|status| json::text(status, "lastState.terminated.finishedAt")).max();
    let restarts = match last.filter(|last| restarts > 0 && !last.is_empty()) {
        Some(last) => format!("{restarts} ({} ago)", clock::age(last)),
        None => restarts.to_string(),
    };
    let text = |path: &str| or_none(json::text(object, path).to_owned());
    let gates = json::list(object, "spec.readinessGates");
    let gates = if gates.is_empty() {
        NONE.to_owned()
    } else {
        let met = gates.iter().filter(|gate| condition(object, json::text(gate, "conditionType"))).count();
        format!("{met}/{}", gates.len())
    };
    vec![
        name,
        json!(format!("{ready}/{total}")),
        json!(pod_status(object)),
        json!(restarts),
        age,
        json!(text("status.podIP")),
        json!(text("spec.nodeName")),
        json!(text("status.nominatedNodeName")),
        json!(gates),
    ]
}

/// What a person wants to know first: why it does not run.
fn pod_status(object: &Value) -> String {
    let phase = json::text(object, "status.phase");
    let mut shown = json::text(object, "status.reason").to_owned();
    if shown.is_empty() {
        phase.clone_into(&mut shown);
    }
    let ended = |status: &Value| {
        let reason = json::text(status, "state.terminated.reason");
        let signal = json::int(status, "state.terminated.signal");
        match (reason.is_empty(), signal) {
            (false, _) => reason.to_owned(),
            (true, 0) => format!("ExitCode:{}", json::int(status, "state.terminated.exitCode")),
            (true, signal) => format!("Signal:{signal}"),
        }
    };
    let init = json::list(object, "status.initContainerStatuses");
    let total = json::list(object, "spec.initContainers").len();
    for (index, status) in init.iter().enumerate() {
        let done = json::at(status, "state.terminated").is_some();
        if done && json::int(status, "state.terminated.exitCode") == 0 {
            continue;
        }
        let waiting = json::text(status, "state.waiting.reason");
        return match (done, waiting) {
            (true, _) => format!("Init:{}", ended(status)),
            (false, "" | "PodInitializing") => format!("Init:{index}/{total}"),
            (false, reason) => format!("Init:{reason}"),
        };
    }
    let mut running = false;
    for status in json::list(object, "status.containerStatuses").iter().rev() {
        let waiting = json::text(status, "state.waiting.reason");
        if !waiting.is_empty() {
            waiting.clone_into(&mut shown);
        } else if json::at(status, "state.terminated").is_some() {
            shown = ended(status);
        } else if json::truth(status, "ready") && json::at(status, "state.running").is_some() {
            running = true;
        }
    }
    if shown == "Completed" && running {
        shown = if condition(object, "Ready") { "Running" } else { "NotReady" }.to_owned();
    }
    if json::at(object, "metadata.deletionTimestamp").is_some() && !["Failed", "Succeeded"].contains(&phase) {
        let lost = json::text(object, "status.reason") == "NodeLost";
        return if lost { "Unknown" } else { "Terminating" }.to_owned();
    }
    shown
}

fn job(object: &Value, name: Value, age: Value, last: [Value; 3]) -> Vec<Value> {
    let status = if condition(object, "Complete") {
        "Complete"
    } else if condition(object, "Failed") {
        "Failed"
    } else if json::at(object, "metadata.deletionTimestamp").is_some() {
        "Terminating"
    } else if condition(object, "Suspended") {
        "Suspended"
    } else {
        "Running"
    };
    let done = json::int(object, "status.succeeded");
    let completions = match json::at(object, "spec.completions").and_then(Value::as_i64) {
        Some(wanted) => format!("{done}/{wanted}"),
        None => match json::int(object, "spec.parallelism") {
            parallel @ 2.. => format!("{done}/1 of {parallel}"),
            _ => format!("{done}/1"),
        },
    };
    let began = clock::parse(json::text(object, "status.startTime"));
    let ended = clock::parse(json::text(object, "status.completionTime"));
    let duration = began.map(|began| clock::duration(ended.unwrap_or_else(clock::unix) - began));
    let mut cells = vec![name, json!(status), json!(completions), json!(duration.unwrap_or_default()), age];
    cells.extend(last);
    cells
}

fn service(object: &Value, name: Value, age: Value) -> Vec<Value> {
    let ty = json::text(object, "spec.type");
    let external: Vec<&str> =
        json::list(object, "spec.externalIPs").iter().filter_map(Value::as_str).collect();
    let ingress = json::list(object, "status.loadBalancer.ingress").iter();
    let ingress: Vec<&str> = ingress
        .map(|at| match json::text(at, "ip") {
            "" => json::text(at, "hostname"),
            ip => ip,
        })
        .collect();
    let outside = match ty {
        "ExternalName" => json::text(object, "spec.externalName").to_owned(),
        "LoadBalancer" if ingress.is_empty() => "<pending>".to_owned(),
        "LoadBalancer" => ingress.join(","),
        _ => or_none(external.join(",")),
    };
    let ports: Vec<String> = json::list(object, "spec.ports")
        .iter()
        .map(|port| {
            let (number, protocol) = (json::int(port, "port"), json::text(port, "protocol"));
            match json::int(port, "nodePort") {
                0 => format!("{number}/{protocol}"),
                node => format!("{number}:{node}/{protocol}"),
            }
        })
        .collect();
    vec![
        name,
        json!(ty),
        json!(or_none(json::text(object, "spec.clusterIP").to_owned())),
        json!(outside),
        json!(or_none(ports.join(","))),
        age,
        json!(or_none(labels(json::at(object, "spec.selector")))),
    ]
}

fn event(object: &Value, name: Value) -> Vec<Value> {
    let field = |core: &str, new: &str| match json::text(object, core) {
        "" => json::text(object, new).to_owned(),
        text => text.to_owned(),
    };
    let about = |part: &str| field(&format!("involvedObject.{part}"), &format!("regarding.{part}"));
    let first = match field("firstTimestamp", "deprecatedFirstTimestamp") {
        text if text.is_empty() => json::text(object, "eventTime").to_owned(),
        text => text,
    };
    let last = match json::text(object, "series.lastObservedTime") {
        "" => match field("lastTimestamp", "deprecatedLastTimestamp") {
            text if text.is_empty() => first.clone(),
            text => text,
        },
        text => text.to_owned(),
    };
    let source = match field("source.component", "deprecatedSource.component") {
        text if text.is_empty() => field("reportingComponent", "reportingController"),
        text => text,
    };
    let host = field("source.host", "deprecatedSource.host");
    let source = if host.is_empty() { source } else { format!("{source}, {host}") };
    let count = match json::int(object, "series.count") {
        0 => json::int(object, "count").max(json::int(object, "deprecatedCount")).max(1),
        count => count,
    };
    vec![
        json!(clock::age(&last)),
        json!(json::text(object, "type")),
        json!(json::text(object, "reason")),
        json!(format!("{}/{}", about("kind").to_lowercase(), about("name"))),
        json!(about("fieldPath")),
        json!(source),
        json!(field("message", "note").trim()),
        json!(clock::age(&first)),
        json!(count),
        name,
    ]
}

fn endpoints(object: &Value) -> String {
    let mut all = Vec::new();
    for subset in json::list(object, "subsets") {
        let ports = json::list(subset, "ports");
        for address in json::list(subset, "addresses") {
            let ip = json::text(address, "ip");
            if ports.is_empty() {
                all.push(ip.to_owned());
            }
            all.extend(ports.iter().map(|port| format!("{ip}:{}", json::int(port, "port"))));
        }
    }
    few(&all)
}

/// The first three, and how many more there are.
fn few(all: &[impl AsRef<str>]) -> String {
    let first: Vec<&str> = all.iter().take(3).map(AsRef::as_ref).collect();
    match all.len() {
        0..=3 => first.join(","),
        many => format!("{} + {} more...", first.join(","), many - 3),
    }
}

fn containers(object: &Value) -> (Value, Value) {
    let all = json::list(object, "spec.template.spec.containers");
    let joined =
        |field: &str| all.iter().map(|container| json::text(container, field)).collect::<Vec<_>>().join(",");
    (json!(joined("name")), json!(joined("image")))
}

fn labels(map: Option<&Value>) -> String {
    let map = map.and_then(Value::as_object).into_iter().flatten();
    let map: BTreeMap<String, String> =
        map.map(|(key, value)| (key.clone(), value.as_str().unwrap_or_default().to_owned())).collect();
    selector::written(&map)
}

fn or_none(text: String) -> String {
    if text.is_empty() { NONE.to_owned() } else { text }
}

fn unset(text: String) -> String {
    if text.is_empty() { "<unset>".to_owned() } else { text }
}
