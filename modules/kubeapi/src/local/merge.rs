//! What a client is shown of an object: as the tier has it, but for what this node knows better.

use serde_json::{Value, json as value};

use crate::json;

/// The config map by which pods know whom to trust.
const ROOT_CA: &str = "kube-root-ca.crt";

/// A pod with the status that this node gave it last. What was said of an earlier pod of the name is not its.
pub(super) fn pod(mut pod: Value, reported: Option<&Value>) -> Value {
    // Of a pod that nobody has spoken of yet.
    json::default(&mut pod, "status.phase", "Pending");
    let Some(reported) = reported else { return pod };
    if json::text(reported, "uid") == json::text(&pod, "metadata.uid")
        && let Some(status) = json::at(reported, "status")
    {
        json::set(&mut pod, "status", status.clone());
    }
    pod
}

/// This node's object with the status that the node gave itself last, and its own addresses.
pub(super) fn node(mut node: Value, reported: Option<&Value>) -> Value {
    let Some(reported) = reported else { return node };
    for (name, field) in json::map(reported, "status").into_iter().flatten() {
        node["status"][name] = field.clone();
    }
    for (name, label) in json::map(reported, "labels").into_iter().flatten() {
        node["metadata"]["labels"][name] = label.clone();
    }
    let mut addresses = json::list(&node, "status.addresses").to_vec();
    for address in json::list(reported, "addresses").iter().filter_map(Value::as_str) {
        let external = value!({"type": "ExternalIP", "address": address});
        if !addresses.contains(&external) {
            addresses.push(external);
        }
    }
    if !addresses.is_empty() {
        node["status"]["addresses"] = value!(addresses);
    }
    node
}

/// A pod from a file on this node, as if the hub had been told of it.
pub(super) fn static_pod(pod: Value, node: &str) -> Value {
    let mut pod = pod;
    json::set(&mut pod, "spec.nodeName", node);
    pod
}

/// A config map: whom to trust includes the authority of this node's API.
pub(super) fn config_map(mut map: Value, ca: &str) -> Value {
    if json::text(&map, "metadata.name") == ROOT_CA {
        let field = map.get("data").and_then(|data| data.get("ca.crt")).and_then(Value::as_str);
        let both = with_ca(field.unwrap_or_default(), ca);
        map["data"]["ca.crt"] = value!(both);
    }
    map
}

/// Certificates of authorities, and this one.
fn with_ca(text: &str, ca: &str) -> String {
    if text.contains(ca.trim()) {
        return text.to_owned();
    }
    let end = if text.is_empty() || text.ends_with('\n') { "" } else { "\n" };
    format!("{text}{end}{ca}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_is_of_one_pod_and_not_of_its_name() {
        let object = value!({"metadata": {"name": "p", "uid": "2"}, "status": {"phase": "Pending"}});
        let reported = |uid: &str| value!({"uid": uid, "status": {"phase": "Running"}});
        assert_eq!(json::text(&pod(object.clone(), Some(&reported("2"))), "status.phase"), "Running");
        assert_eq!(json::text(&pod(object.clone(), Some(&reported("1"))), "status.phase"), "Pending");
        assert_eq!(pod(object.clone(), None), object);
    }

    #[test]
    fn a_node_shows_its_own_addresses_besides_the_hubs() {
        let object = value!({"metadata": {"name": "n"}, "status": {"addresses": [{"type": "InternalIP", "address": "10.0.0.1"}], "phase": "x"}});
        let reported =
            value!({"status": {"capacity": {"cpu": "2"}}, "labels": {"a": "b"}, "addresses": ["192.0.2.7"]});
        let shown = node(object, Some(&reported));
        assert_eq!(shown["status"]["addresses"].as_array().map(Vec::len), Some(2));
        assert_eq!(json::text(&shown, "status.capacity.cpu"), "2");
        assert_eq!((json::text(&shown, "status.phase"), json::text(&shown, "metadata.labels.a")), ("x", "b"));
    }

    #[test]
    fn whom_to_trust_names_both_authorities_once() {
        let map = value!({"metadata": {"name": ROOT_CA}, "data": {"ca.crt": "CLOUD"}});
        let shown = config_map(config_map(map, "LOCAL\n"), "LOCAL\n");
        assert_eq!(shown["data"]["ca.crt"], "CLOUD\nLOCAL\n");
        let other = value!({"metadata": {"name": "other"}, "data": {"ca.crt": "CLOUD"}});
        assert_eq!(config_map(other.clone(), "LOCAL\n"), other);
    }
}
