//! The `/etc/hosts` of a pod.

use k8s_openapi::api::core::v1::Pod;

use crate::make::{ConfigError, names};

const OWN: &str = "\
# Kubernetes-managed hosts file.
127.0.0.1\tlocalhost
::1\tlocalhost ip6-localhost ip6-loopback
fe00::0\tip6-localnet
fe00::0\tip6-mcastprefix
fe00::1\tip6-allnodes
fe00::2\tip6-allrouters
";

/// The node's file on the node's network, else the pod's own names, and the aliases of the spec.
pub(super) fn text(pod: &Pod, cluster_domain: &str, pod_ips: &[String]) -> Result<String, ConfigError> {
    let spec = pod.spec.as_ref();
    let mut text = if spec.is_some_and(|spec| spec.host_network == Some(true)) {
        let node = std::fs::read_to_string("/etc/hosts").unwrap_or_default();
        format!("# Kubernetes-managed hosts file (host network).\n{node}")
    } else {
        let name = names::short_hostname(pod)?;
        let full = names::domain(pod, cluster_domain).map(|domain| format!("{name}.{domain}\t"));
        let full = full.unwrap_or_default();
        pod_ips.iter().fold(OWN.to_owned(), |text, ip| text + &format!("{ip}\t{full}{name}\n"))
    };
    let aliases = spec.and_then(|spec| spec.host_aliases.as_deref()).unwrap_or_default();
    if !aliases.is_empty() {
        text.push_str("\n# Entries added by HostAliases.\n");
        for alias in aliases {
            let names = alias.hostnames.as_deref().unwrap_or_default().join("\t");
            text.push_str(&format!("{}\t{names}\n", alias.ip));
        }
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::make::fixture::pod;

    #[test]
    fn a_pod_finds_itself_and_its_aliases() {
        let pod = pod(json!({
            "containers": [], "hostname": "db", "subdomain": "s",
            "hostAliases": [{"ip": "10.1.2.3", "hostnames": ["a", "b"]}],
        }));
        let text = text(&pod, "cluster.local", &["10.0.0.5".into(), "fd00::5".into()]).expect("a text");
        assert!(text.starts_with("# Kubernetes-managed hosts file.\n127.0.0.1\tlocalhost\n"));
        assert!(text.ends_with(
            "10.0.0.5\tdb.s.shop.svc.cluster.local\tdb\nfd00::5\tdb.s.shop.svc.cluster.local\tdb\n\n\
             # Entries added by HostAliases.\n10.1.2.3\ta\tb\n"
        ));
    }

    #[test]
    fn on_the_nodes_network_it_is_the_nodes_file() {
        let pod = pod(json!({"containers": [], "hostNetwork": true}));
        let text = text(&pod, "", &[]).expect("a text");
        assert!(text.starts_with("# Kubernetes-managed hosts file (host network).\n"));
    }
}
