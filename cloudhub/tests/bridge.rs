//! The bridge between the hub's own Kubernetes API and its nodes, over real sockets on loopback.
#![allow(clippy::unwrap_used)] // what fails in a helper fails the test

#[path = "bridge/harness.rs"]
mod harness;

use std::time::Duration;

use serde_json::json;

use harness::{Site, ready_report};

#[tokio::test]
async fn a_bound_pod_reaches_its_node_and_its_status_comes_back() {
    let site = Site::start().await;
    site.node_appears().await;
    site.report("node", &ready_report()).await;
    site.until_node(|node| harness::condition(node, "Ready") == "True").await;
    site.apply("configmaps", json!({"metadata": {"name": "settings"}, "data": {"a": "1"}})).await;
    let pod = site.run("web", json!({"configMap": {"name": "settings"}, "name": "v"})).await;

    let held = site.until_held("obj/core/pods/default/web").await;
    assert_eq!(held["metadata"]["uid"], pod["metadata"]["uid"]);
    assert!(held.get("status").is_none() && held["metadata"].get("managedFields").is_none());
    assert_eq!(site.until_held("obj/core/configmaps/default/settings").await["data"]["a"], "1");
    assert_eq!(site.until_held("obj/core/nodes/-/edge-1").await["metadata"]["name"], "edge-1");
    let token = site.until_wanted("obj/octobus.io/tokens/default/web.").await;
    assert_eq!(site.until_held(&token).await["podUid"], pod["metadata"]["uid"]);

    let running = json!({"uid": pod["metadata"]["uid"], "finished": false, "status": {
        "phase": "Running", "podIPs": [{"ip": "10.1.0.2"}], "podIP": "10.1.0.2",
        "conditions": [{"type": "Ready", "status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z"}]}});
    site.report("pod/default/web", &running).await;
    let shown = site.until_pod("web", |pod| pod["status"]["phase"] == "Running").await;
    assert_eq!(shown["status"]["podIP"], "10.1.0.2");
    assert_eq!(harness::condition(&shown, "PodScheduled"), "True", "conditions of others stay");

    site.delete_pod("web", 30).await;
    let ending = site.until_held_such("obj/core/pods/default/web", |pod| {
        pod["metadata"].get("deletionTimestamp").is_some()
    });
    assert_eq!(ending.await["metadata"]["deletionGracePeriodSeconds"], 30);
    let ended = json!({"uid": pod["metadata"]["uid"], "finished": true, "status": {"phase": "Succeeded"}});
    site.report("pod/default/web", &ended).await;
    site.until_no_pod("web").await;
    site.until_gone("obj/core/pods/default/web").await;
    site.until_gone(&token).await;
    site.until_gone("obj/core/configmaps/default/settings").await;
    site.stop(Duration::from_secs(15)).await;
}
