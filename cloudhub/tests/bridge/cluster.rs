//! A hub that is bridged to a cluster: here, the API of another hub, with the rights that `octobus init` gives.

use cloudhub::{bridge::init::Administrator, hub::Hub};
use ops::config::{Config, Role, Sources};
use serde_json::json;

use super::harness::{self, Site, condition};

#[tokio::test]
async fn a_hub_serves_a_cluster_with_the_rights_of_init_and_keeps_leases() {
    let cluster = Site::start().await;
    cluster.node_appears().await;
    let administrator =
        Administrator::open(cluster.hub.endpoints().kubeconfig.as_deref().unwrap()).await.unwrap();
    let folder = tempfile::tempdir().unwrap();
    let kubeconfig = folder.path().join("hub.conf");
    // The namespace of Leases is made by a controller.
    cluster.until("/api/v1/namespaces/kube-node-lease", |_| true).await;
    let applied = administrator.apply().await.unwrap();
    assert_eq!(applied, administrator.apply().await.unwrap(), "it may be repeated");
    administrator.write_kubeconfig(&kubeconfig).await.unwrap();

    let (hub_data, node_data) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let hub: Hub =
        harness::start_hub(hub_data.path(), &[("--kubeconfig", kubeconfig.to_str().unwrap())]).await;
    harness::enrol(&hub, node_data.path(), "edge-9").await;
    let edge = harness::start_edge(node_data.path()).await;
    let node = "/api/v1/nodes/edge-9";
    let lease = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases/edge-9";
    let owned = cluster.until(lease, |lease| lease["spec"]["renewTime"].is_string()).await;
    assert_eq!(owned["metadata"]["ownerReferences"][0]["name"], "edge-9");
    harness::report(edge.handle(), "node", &harness::ready_report()).await;
    cluster
        .until(node, |node| condition(node, "Ready") == "True" && node["spec"].get("taints").is_none())
        .await;

    cluster.apply("secrets", json!({"metadata": {"name": "s"}, "stringData": {"k": "v"}})).await;
    let pod = json!({"metadata": {"name": "there"}, "spec": {"nodeSelector": {"kubernetes.io/hostname": "edge-9"},
        "volumes": [{"name": "s", "secret": {"secretName": "s"}}], "containers": [{"name": "c", "image": "i"}]}});
    let pod = cluster.apply("pods", pod).await;
    let key = "obj/core/pods/default/there";
    Site::soon("the pod is at the node", async || harness::fleet(edge.handle(), key).await.is_some()).await;
    let secret = "obj/core/secrets/default/s";
    Site::soon("its secret too", async || harness::fleet(edge.handle(), secret).await.is_some()).await;
    let status = json!({"uid": pod["metadata"]["uid"], "finished": false, "status": {"phase": "Running"}});
    harness::report(edge.handle(), "pod/default/there", &status).await;
    let shown = cluster.until_pod("there", |pod| pod["status"]["phase"] == "Running").await;
    let forever = shown["spec"]["tolerations"].as_array().unwrap().iter().any(|toleration| {
        toleration["key"] == "node.kubernetes.io/unreachable" && toleration.get("tolerationSeconds").is_none()
    });
    assert!(forever, "the cluster's controllers do not evict it: {}", shown["spec"]["tolerations"]);
    // The other hub's bridge leaves nodes of this one alone, and the other way around.
    assert!(cluster.ask("GET", node, None).await.is_ok());
    assert!(cluster.ask("GET", "/api/v1/nodes/edge-1", None).await.is_ok());

    let within = std::time::Duration::from_secs(15);
    Box::pin(edge.stop(within)).await;
    Box::pin(hub.stop(within)).await;
    cluster.stop().await;
}

#[test]
fn a_replica_of_a_tier_and_a_hub_with_its_own_api_have_no_bridge_to_a_cluster() {
    let refused = |more: &[(&'static str, &str)]| {
        let mut flags = vec![("--kubeconfig", "/tmp/c.conf".to_owned())];
        flags.extend(more.iter().map(|(flag, value)| (*flag, (*value).to_owned())));
        let sources = Sources { file: None, env: Vec::new(), flags };
        Config::resolve(Role::Cloud, sources).unwrap_err().to_string()
    };
    assert!(refused(&[("--kubernetes", "127.0.0.1:0")]).contains("--kubeconfig"));
    let tier = refused(&[("--fabric", "nats://127.0.0.1"), ("--replica", "a")]);
    assert!(tier.contains("a replica of a tier"), "{tier}");
}
