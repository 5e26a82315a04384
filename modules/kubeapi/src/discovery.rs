//! What is served, for clients to find out: plain and aggregated.

use hyper::HeaderMap;
use serde_json::{Value, json};

use crate::registry::{Resource, Resources, api_version};

/// Content type of aggregated discovery.
pub(crate) const AGGREGATED: &str = "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList";

/// Which release of Kubernetes this server behaves as.
pub(crate) fn version() -> Value {
    json!({
        "major": "1",
        "minor": "36",
        "emulationMajor": "1",
        "emulationMinor": "36",
        "minCompatibilityMajor": "1",
        "minCompatibilityMinor": "35",
        "gitVersion": concat!("v1.36.2+octobus.", env!("CARGO_PKG_VERSION")),
        "gitCommit": "",
        "gitTreeState": "clean",
        "buildDate": "1970-01-01T00:00:00Z",
        "goVersion": "",
        "compiler": "rustc",
        "platform": format!("linux/{}", if cfg!(target_arch = "x86_64") { "amd64" } else { std::env::consts::ARCH }),
    })
}

/// Whether a client understands aggregated discovery.
pub(crate) fn wants_aggregated(headers: &HeaderMap) -> bool {
    let accept = headers.get("accept").and_then(|accept| accept.to_str().ok()).unwrap_or_default();
    accept.split(',').any(|media| {
        let has = |wanted: &str| media.split(';').any(|part| part.trim() == wanted);
        has("g=apidiscovery.k8s.io") && has("v=v2") && has("as=APIGroupDiscoveryList")
    })
}

/// The document of a path, if it is one of discovery.
pub(crate) fn document(resources: &Resources, path: &str, aggregated: bool) -> Option<Value> {
    let parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty()).collect();
    match parts.as_slice() {
        ["api"] if aggregated => Some(aggregate(resources, true)),
        ["apis"] if aggregated => Some(aggregate(resources, false)),
        ["api"] => Some(json!({"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": []})),
        ["apis"] => {
            let groups = resources.groups.iter().filter(|(group, _)| !group.is_empty());
            let groups: Vec<Value> = groups.map(|(group, versions)| self::group(group, versions)).collect();
            Some(json!({"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}))
        }
        ["apis", name] => {
            let (name, versions) =
                resources.groups.iter().find(|(group, _)| group == name && !group.is_empty())?;
            let mut document = group(name, versions);
            document["kind"] = json!("APIGroup");
            document["apiVersion"] = json!("v1");
            Some(document)
        }
        ["api", version] => list(resources, "", version),
        ["apis", group, version] => list(resources, group, version),
        _ => None,
    }
}

fn group(group: &str, versions: &[String]) -> Value {
    let shown = |version: &String| json!({"groupVersion": api_version(group, version), "version": version});
    let versions: Vec<Value> = versions.iter().map(shown).collect();
    json!({"name": group, "preferredVersion": versions.first(), "versions": versions})
}

fn list(resources: &Resources, group: &str, version: &str) -> Option<Value> {
    let mut all = Vec::new();
    for resource in resources.of_version(group, version) {
        let mut shown = json!({
            "name": resource.plural,
            "singularName": resource.singular,
            "namespaced": resource.namespaced,
            "kind": resource.kind,
            "verbs": resource.verbs(),
        });
        if !resource.short.is_empty() {
            shown["shortNames"] = json!(resource.short);
        }
        if !resource.categories.is_empty() {
            shown["categories"] = json!(resource.categories);
        }
        all.push(shown);
        for part in parts(resource) {
            let mut shown = json!({
                "name": format!("{}/{}", resource.plural, part.name),
                "singularName": "",
                "namespaced": resource.namespaced,
                "kind": part.kind,
                "verbs": part.verbs,
            });
            if !part.version.is_empty() {
                shown["group"] = json!(part.group);
                shown["version"] = json!(part.version);
            }
            all.push(shown);
        }
    }
    let known = !all.is_empty();
    let document = json!({
        "kind": "APIResourceList",
        "apiVersion": "v1",
        "groupVersion": api_version(group, version),
        "resources": all,
    });
    known.then_some(document)
}

/// A subresource as discovery shows it.
struct Part<'a> {
    name: &'a str,
    group: &'a str,
    version: &'a str,
    kind: &'a str,
    verbs: &'a [&'a str],
}

/// Subresources in the order of their names.
fn parts(resource: &Resource) -> Vec<Part<'_>> {
    const CHANGED: &[&str] = &["get", "patch", "update"];
    let mut parts: Vec<Part<'_>> = resource
        .subresources
        .iter()
        .map(|part| Part {
            name: part.name,
            group: part.group,
            version: part.version,
            kind: part.kind,
            verbs: part.verbs,
        })
        .collect();
    if resource.status {
        parts.push(Part { name: "status", group: "", version: "", kind: &resource.kind, verbs: CHANGED });
    }
    if resource.scale.is_some() {
        parts.push(Part {
            name: "scale",
            group: "autoscaling",
            version: "v1",
            kind: "Scale",
            verbs: CHANGED,
        });
    }
    parts.sort_by_key(|part| part.name);
    parts
}

fn aggregate(resources: &Resources, core: bool) -> Value {
    let groups = resources.groups.iter().filter(|(group, _)| group.is_empty() == core);
    let items: Vec<Value> = groups
        .map(|(group, versions)| {
            let versions: Vec<Value> = versions
                .iter()
                .map(|version| {
                    let all: Vec<Value> = resources.of_version(group, version).map(|of| shown(of)).collect();
                    json!({"version": version, "resources": all, "freshness": "Current"})
                })
                .collect();
            let metadata = if core { json!({}) } else { json!({"name": group}) };
            json!({"metadata": metadata, "versions": versions})
        })
        .collect();
    json!({
        "kind": "APIGroupDiscoveryList",
        "apiVersion": "apidiscovery.k8s.io/v2",
        "metadata": {},
        "items": items,
    })
}

fn shown(resource: &Resource) -> Value {
    let kind =
        |group: &str, version: &str, kind: &str| json!({"group": group, "version": version, "kind": kind});
    let own = match resource.custom {
        Some(_) => kind(&resource.group, &resource.version, &resource.kind),
        None => kind("", "", &resource.kind),
    };
    let mut shown = json!({
        "resource": resource.plural,
        "responseKind": own,
        "scope": if resource.namespaced { "Namespaced" } else { "Cluster" },
        "singularResource": resource.singular,
        "verbs": resource.verbs(),
    });
    if !resource.short.is_empty() {
        shown["shortNames"] = json!(resource.short);
    }
    if !resource.categories.is_empty() {
        shown["categories"] = json!(resource.categories);
    }
    let parts: Vec<Value> = parts(resource)
        .into_iter()
        .map(|part| {
            let response = if part.version.is_empty() && resource.custom.is_some() {
                kind(&resource.group, &resource.version, part.kind)
            } else {
                kind(part.group, part.version, part.kind)
            };
            json!({"subresource": part.name, "responseKind": response, "verbs": part.verbs})
        })
        .collect();
    if !parts.is_empty() {
        shown["subresources"] = json!(parts);
    }
    shown
}
