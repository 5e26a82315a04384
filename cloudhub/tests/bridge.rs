//! The bridge between the hub's own Kubernetes API and its nodes, over real sockets on loopback.
#![allow(clippy::unwrap_used)] // what fails in a helper fails the test

#[path = "bridge/cluster.rs"]
mod cluster;
#[path = "bridge/harness.rs"]
mod harness;

use serde_json::{Value, json};

use harness::{Site, condition, fleet, keys, revision};

const POD: &str = "obj/core/pods/default/web";

/// What a node says of a pod.
fn said(uid: &Value, phase: &str, finished: bool) -> Value {
    json!({"uid": uid, "finished": finished, "status": {"phase": phase, "podIP": "10.1.0.2",
        "podIPs": [{"ip": "10.1.0.2"}],
        "conditions": [{"type": "Ready", "status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z"}]}})
}

#[tokio::test]
async fn a_bound_pod_reaches_its_node_and_its_status_comes_back() {
    let site = Site::ready().await;
    let node = site.until_node(|node| node["status"]["nodeInfo"]["architecture"] == "amd64").await;
    assert_eq!(condition(&node, "Linked"), "True");
    assert_eq!(node["metadata"]["labels"]["kubernetes.io/arch"], "amd64");
    site.apply("configmaps", json!({"metadata": {"name": "settings"}, "data": {"a": "1"}})).await;
    let pod = site.run("web", json!({"configMap": {"name": "settings"}, "name": "v"})).await;

    let held = site.until_held(POD).await;
    assert_eq!(held["metadata"]["uid"], pod["metadata"]["uid"]);
    assert!(held.get("status").is_none() && held["metadata"].get("managedFields").is_none());
    assert_eq!(site.until_held("obj/core/configmaps/default/settings").await["data"]["a"], "1");
    assert_eq!(site.until_held("obj/core/nodes/-/edge-1").await["metadata"]["name"], "edge-1");
    assert!(
        site.until_held("obj/core/configmaps/default/kube-root-ca.crt").await["data"]["ca.crt"].is_string()
    );
    let token = site.until_wanted("obj/octobus.io/tokens/default/web.").await;
    assert_eq!(site.until_held(&token).await["podUid"], pod["metadata"]["uid"]);

    site.report("pod/default/web", &said(&pod["metadata"]["uid"], "Running", false)).await;
    let shown = site.until_pod("web", |pod| pod["status"]["phase"] == "Running").await;
    assert_eq!(shown["status"]["podIP"], "10.1.0.2");
    assert_eq!(condition(&shown, "PodScheduled"), "True", "conditions of others stay");

    site.delete_pod("web", 30).await;
    let ending = site.until_held_such(POD, |pod| pod["metadata"].get("deletionTimestamp").is_some());
    assert_eq!(ending.await["metadata"]["deletionGracePeriodSeconds"], 30);
    site.report("pod/default/web", &said(&pod["metadata"]["uid"], "Succeeded", true)).await;
    site.until_no_pod("web").await;
    site.until_gone(POD).await;
    site.until_gone(&token).await;
    site.until_gone("obj/core/configmaps/default/settings").await;
    site.stop().await;
}

#[tokio::test]
async fn a_node_gets_no_secret_that_its_pods_do_not_use_and_the_others_sealed() {
    let site = Site::ready().await;
    for name in ["used", "unused"] {
        site.apply("secrets", json!({"metadata": {"name": name}, "stringData": {"k": "correct horse"}}))
            .await;
    }
    site.run("web", json!({"secret": {"secretName": "used"}, "name": "v"})).await;
    assert_eq!(site.until_held("obj/core/secrets/default/used").await["data"]["k"], "Y29ycmVjdCBob3JzZQ==");
    let sealed = fleet(site.hub.handle(), "obj/core/secrets/default/used").await.unwrap();
    assert!(broker::seal::is_sealed(&sealed));
    assert_eq!(keys(site.hub.handle(), "obj/core/secrets/").await, ["obj/core/secrets/default/used"]);
    assert_eq!(site.requests("get", "secrets").await, 1, "what nobody names is never fetched");
    assert!(!site.wanted().await.iter().any(|key| key.contains("unused")));

    // What changes is fetched once more, what goes is gone.
    let path = "/api/v1/namespaces/default/secrets/used";
    site.ask("PATCH", path, Some(&json!({"stringData": {"k": "battery"}}))).await.unwrap();
    site.until_held_such("obj/core/secrets/default/used", |secret| secret["data"]["k"] == "YmF0dGVyeQ==")
        .await;
    site.ask("DELETE", path, None).await.unwrap();
    site.until_gone("obj/core/secrets/default/used").await;
    assert!(site.held(POD).await.is_some());
    site.stop().await;
}

#[tokio::test]
async fn a_pod_made_again_under_its_name_is_another_pod() {
    let site = Site::ready().await;
    let first = site.run("web", Value::Null).await;
    site.until_held(POD).await;
    site.report("pod/default/web", &said(&first["metadata"]["uid"], "Running", false)).await;
    site.until_pod("web", |pod| pod["status"]["phase"] == "Running").await;
    site.delete_pod("web", 0).await;
    let second = site.run("web", Value::Null).await;
    assert_ne!(first["metadata"]["uid"], second["metadata"]["uid"]);
    site.until_held_such(POD, |pod| pod["metadata"]["uid"] == second["metadata"]["uid"]).await;
    // What the node still says of the one before is not said of this one.
    site.report("pod/default/web", &said(&first["metadata"]["uid"], "Failed", true)).await;
    site.report("pod/default/web", &said(&second["metadata"]["uid"], "Running", false)).await;
    let shown = site.until_pod("web", |pod| pod["status"]["phase"] != "Pending").await;
    assert_eq!(shown["status"]["phase"], "Running");
    assert_eq!(shown["metadata"]["uid"], second["metadata"]["uid"]);
    site.stop().await;
}

#[tokio::test]
async fn a_bridge_that_starts_again_writes_differences_alone() {
    let site = Site::ready().await;
    site.apply("secrets", json!({"metadata": {"name": "s"}, "stringData": {"k": "v"}})).await;
    let pod = site.run("web", json!({"secret": {"secretName": "s"}, "name": "v"})).await;
    let token = site.until_wanted("obj/octobus.io/tokens/").await;
    site.report("pod/default/web", &said(&pod["metadata"]["uid"], "Running", false)).await;
    site.until_pod("web", |pod| pod["status"]["phase"] == "Running").await;
    let all = [POD, "want/edge-1", "obj/core/secrets/default/s", "obj/core/nodes/-/edge-1", &token];
    let mut before = Vec::new();
    for key in all {
        before.push(revision(site.hub.handle(), key).await);
    }
    let barrier = revision(site.hub.handle(), "barrier").await;

    let site = site.restart().await;
    Site::soon("the barrier is written anew", async || {
        revision(site.hub.handle(), "barrier").await > barrier
    })
    .await;
    let mut after = Vec::new();
    for key in all {
        after.push(revision(site.hub.handle(), key).await);
    }
    assert_eq!(before, after);
    assert_eq!(site.requests("create", "serviceaccounts/token").await, 0, "the token is good for long");
    for (verb, resource) in
        [("patch", "pods/status"), ("create", "nodes"), ("delete", "pods"), ("create", "leases")]
    {
        assert_eq!(site.requests(verb, resource).await, 0, "{verb} {resource}");
    }
    site.stop().await;
}

#[tokio::test]
async fn writes_follow_what_changed_and_not_what_was_said() {
    let site = Site::ready().await;
    let pod = site.run("web", Value::Null).await;
    let uid = &pod["metadata"]["uid"];
    site.until_held(POD).await;
    for _ in 0..20 {
        site.report("pod/default/web", &said(uid, "Running", false)).await;
        site.report("node", &harness::ready_report()).await;
    }
    site.until_pod("web", |pod| pod["status"]["phase"] == "Running").await;
    let patches = site.requests("patch", "pods/status").await;
    assert!((1..=2).contains(&patches), "the same said 20 times is one write: {patches}");
    // 200 changes in a row are as many writes at most as there was time for.
    for round in 0..200 {
        let mut status = said(uid, "Running", false);
        status["status"]["message"] = format!("round {round}").into();
        site.report("pod/default/web", &status).await;
    }
    site.until_pod("web", |pod| pod["status"]["message"] == "round 199").await;
    let nodes = site.requests("patch", "nodes/status").await;
    assert!(nodes <= 4, "a report that says nothing new is no write: {nodes}");
    assert_eq!(site.requests("patch", "leases").await + site.requests("create", "leases").await, 0);
    site.stop().await;
}

#[tokio::test]
async fn fifty_changed_and_fifty_deleted_while_a_node_is_away_are_so_when_it_is_back() {
    let mut site = Site::ready().await;
    for number in 0..105 {
        let pod = json!({"metadata": {"name": format!("p{number}")}, "spec": {"nodeName": "edge-1",
            "automountServiceAccountToken": false, "containers": [{"name": "c", "image": "i"}]}});
        site.apply("pods", pod).await;
    }
    Site::soon("all pods are at the node", async || keys(site.node(), "obj/core/pods/").await.len() == 105)
        .await;
    site.cut().await;
    // It is away for long enough to be said so; nothing is evicted.
    let away = site.until_node(|node| condition(node, "Ready") == "Unknown").await;
    assert_eq!(condition(&away, "Linked"), "False");
    for number in 0..50 {
        let path = format!("/api/v1/namespaces/default/pods/p{number}");
        site.ask("PATCH", &path, Some(&json!({"metadata": {"labels": {"changed": "yes"}}}))).await.unwrap();
        site.delete_pod(&format!("p{}", number + 50), 0).await;
    }
    site.mend().await;
    Site::soon("what was deleted is gone", async || keys(site.node(), "obj/core/pods/").await.len() == 55)
        .await;
    for number in 0..50 {
        let key = format!("obj/core/pods/default/p{number}");
        site.until_held_such(&key, |pod| pod["metadata"]["labels"]["changed"] == "yes").await;
    }
    site.until_node(|node| condition(node, "Ready") == "True").await;
    site.stop().await;
}

#[tokio::test]
async fn a_static_pod_is_shown_by_a_mirror_that_comes_back() {
    let site = Site::ready().await;
    let pod = json!({"metadata": {"name": "agent-edge-1", "namespace": "default", "uid": "hash-1"},
        "spec": {"containers": [{"name": "c", "image": "i"}]}});
    site.report("static/default/agent-edge-1", &pod).await;
    site.report("pod/default/agent-edge-1", &said(&json!("hash-1"), "Running", false)).await;
    let mirror = site.until_pod("agent-edge-1", |pod| pod["status"]["phase"] == "Running").await;
    assert_eq!(mirror["spec"]["nodeName"], "edge-1");
    assert_eq!(mirror["metadata"]["ownerReferences"][0]["kind"], "Node");
    assert!(site.held("obj/core/pods/default/agent-edge-1").await.is_none(), "the node has it already");
    site.delete_pod("agent-edge-1", 0).await;
    site.until_pod("agent-edge-1", |pod| pod["metadata"]["uid"] != mirror["metadata"]["uid"]).await;
    site.stop().await;
}

#[tokio::test]
async fn what_a_node_tells_of_its_own_becomes_events_and_nothing_else_does() {
    let site = Site::ready().await;
    let pod = site.run("web", Value::Null).await;
    site.until_held(POD).await;
    let event = |name: &str, reason: &str| {
        json!({"metadata": {"namespace": "default"}, "reason": reason, "message": "m", "type": "Normal", "count": 1,
            "involvedObject": {"kind": "Pod", "namespace": "default", "name": name, "uid": pod["metadata"]["uid"]},
            "source": {"component": "kubelet"}})
    };
    site.tell(&event("other", "NotMine")).await;
    site.tell(&event("web", "Pulled")).await;
    let events = |reason: &str, listed: &Value| -> Vec<Value> {
        let all = listed["items"].as_array().unwrap().iter();
        all.filter(|event| event["reason"] == reason).cloned().collect()
    };
    let path = "/api/v1/namespaces/default/events";
    let listed = site.until(path, |listed| !events("Pulled", listed).is_empty()).await;
    assert_eq!(events("Pulled", &listed)[0]["involvedObject"]["name"], "web");
    assert!(events("NotMine", &listed).is_empty());
    site.stop().await;
}
