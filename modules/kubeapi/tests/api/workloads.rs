//! Controllers and scheduler, with a node whose agent is this test.

use serde_json::{Value, json};

use super::{
    client::{ADMIN, TestServer},
    semantics::until,
};

const DEPLOYMENTS: &str = "/apis/apps/v1/namespaces/default/deployments";
const PODS: &str = "/api/v1/namespaces/default/pods";
const MERGE: &str = "application/merge-patch+json";

pub(crate) async fn node(server: &TestServer, name: &str) {
    let (code, answer) = server
        .ask("POST", "/api/v1/nodes", Some(&json!({"metadata": {"name": name, "labels": {"zone": name}}})))
        .await;
    assert_eq!(code, 201, "{answer}");
    let status = json!({"status": {"capacity": {"cpu": "4", "memory": "4Gi", "pods": "20"},
        "conditions": [{"type": "Ready", "status": "True"}]}});
    let path = format!("/api/v1/nodes/{name}/status");
    let (code, answer) =
        server.ask_as("PATCH", &path, "application/strategic-merge-patch+json", ADMIN, Some(&status)).await;
    assert_eq!(code, 200, "{answer}");
}

async fn pods(server: &TestServer, selector: &str) -> Vec<Value> {
    let (code, list) = server.ask("GET", &format!("{PODS}?labelSelector={selector}"), None).await;
    assert_eq!(code, 200, "{list}");
    list["items"].as_array().unwrap().clone()
}

/// What an agent does with every pod that is placed: it runs, or ends when it is to.
pub(crate) async fn run_pods(server: &TestServer, phase: &str) {
    for pod in pods(server, "").await {
        let name = pod["metadata"]["name"].as_str().unwrap();
        let path = format!("{PODS}/{name}");
        if pod["spec"]["nodeName"].is_null() || pod["status"]["phase"] == phase {
            continue;
        }
        let status = json!({"status": {"phase": phase, "podIP": "10.0.0.1",
            "conditions": [{"type": "Ready", "status": if phase == "Running" { "True" } else { "False" }}]}});
        server.ask_as("PATCH", &format!("{path}/status"), MERGE, ADMIN, Some(&status)).await;
    }
    for pod in pods(server, "").await {
        if !pod["metadata"]["deletionTimestamp"].is_null() {
            let name = pod["metadata"]["name"].as_str().unwrap();
            server.ask("DELETE", &format!("{PODS}/{name}?gracePeriodSeconds=0"), None).await;
        }
    }
}

fn template(app: &str, image: &str) -> Value {
    json!({"metadata": {"labels": {"app": app}}, "spec": {"containers": [{"name": "c", "image": image,
        "ports": [{"containerPort": 80}]}]}})
}

fn deployment(replicas: u32, image: &str) -> Value {
    json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "web"}, "spec": {
        "replicas": replicas, "selector": {"matchLabels": {"app": "web"}}, "template": template("web", image)}})
}

#[tokio::test]
async fn a_deployment_runs_rolls_and_is_undone() {
    let server = TestServer::start().await;
    until(async || {
        server.ask("GET", "/api/v1/namespaces/default/serviceaccounts/default", None).await.0 == 200
    })
    .await;
    let service =
        json!({"metadata": {"name": "web"}, "spec": {"selector": {"app": "web"}, "ports": [{"port": 80}]}});
    assert_eq!(server.ask("POST", "/api/v1/namespaces/default/services", Some(&service)).await.0, 201);
    assert_eq!(server.ask("POST", DEPLOYMENTS, Some(&deployment(3, "i:1"))).await.0, 201);
    until(async || pods(&server, "app%3Dweb").await.len() == 3).await;
    // Nowhere to run, and said so.
    until(async || {
        let pods = pods(&server, "app%3Dweb").await;
        pods.iter().all(|pod| pod["status"]["conditions"][0]["reason"] == "Unschedulable")
    })
    .await;
    node(&server, "n1").await;
    node(&server, "n2").await;
    let available = async |image: &str, count: u64| {
        run_pods(&server, "Running").await;
        let (_, web) = server.ask("GET", &format!("{DEPLOYMENTS}/web"), None).await;
        let pods = pods(&server, "app%3Dweb").await;
        let right = pods.iter().all(|pod| pod["spec"]["containers"][0]["image"] == image);
        right
            && pods.len() as u64 == count
            && web["status"]["availableReplicas"] == count
            && web["status"]["updatedReplicas"] == count
    };
    until(async || available("i:1", 3).await).await;
    let endpoints = "/api/v1/namespaces/default/endpoints/web";
    until(async || {
        server.ask("GET", endpoints, None).await.1["subsets"][0]["addresses"]
            .as_array()
            .is_some_and(|all| all.len() == 3)
    })
    .await;

    let patch = json!({"spec": {"template": {"spec": {"containers": [{"name": "c", "image": "i:2"}]}}}});
    let strategic = "application/strategic-merge-patch+json";
    let path = format!("{DEPLOYMENTS}/web");
    assert_eq!(server.ask_as("PATCH", &path, strategic, ADMIN, Some(&patch)).await.0, 200);
    until(async || available("i:2", 3).await).await;
    let placed = pods(&server, "app%3Dweb").await;
    let on = |node: &str| placed.iter().filter(|pod| pod["spec"]["nodeName"] == node).count();
    assert!(on("n1") >= 1 && on("n2") >= 1, "spread over the nodes");
    let (_, web) = server.ask("GET", &path, None).await;
    assert_eq!(web["metadata"]["annotations"]["deployment.kubernetes.io/revision"], "2");
    // The old template again: its set is taken again, as the newest revision.
    let patch = json!({"spec": {"template": {"spec": {"containers": [{"name": "c", "image": "i:1"}]}}}});
    assert_eq!(server.ask_as("PATCH", &path, strategic, ADMIN, Some(&patch)).await.0, 200);
    until(async || available("i:1", 3).await).await;
    let (_, sets) = server.ask("GET", "/apis/apps/v1/namespaces/default/replicasets", None).await;
    assert_eq!(sets["items"].as_array().unwrap().len(), 2);

    assert_eq!(
        server
            .ask_as("PATCH", &format!("{path}/scale"), MERGE, ADMIN, Some(&json!({"spec": {"replicas": 1}})))
            .await
            .0,
        200
    );
    until(async || available("i:1", 1).await).await;
    assert_eq!(server.ask("DELETE", &path, None).await.0, 200);
    until(async || {
        run_pods(&server, "Running").await;
        pods(&server, "app%3Dweb").await.is_empty()
    })
    .await;
    server.stop().await;
}

#[tokio::test]
async fn a_daemon_set_is_on_every_node_that_fits_and_a_job_ends() {
    let server = TestServer::start().await;
    until(async || {
        server.ask("GET", "/api/v1/namespaces/default/serviceaccounts/default", None).await.0 == 200
    })
    .await;
    node(&server, "n1").await;
    let set = json!({"metadata": {"name": "ds"}, "spec": {"selector": {"matchLabels": {"app": "ds"}}, "template": template("ds", "i:1")}});
    let sets = "/apis/apps/v1/namespaces/default/daemonsets";
    assert_eq!(server.ask("POST", sets, Some(&set)).await.0, 201);
    let on = async || -> Vec<String> {
        run_pods(&server, "Running").await;
        let mut nodes: Vec<String> = pods(&server, "app%3Dds")
            .await
            .iter()
            .map(|pod| pod["spec"]["nodeName"].as_str().unwrap_or_default().to_owned())
            .collect();
        nodes.sort();
        nodes
    };
    until(async || on().await == ["n1"]).await;
    node(&server, "n2").await;
    until(async || on().await == ["n1", "n2"]).await;
    assert_eq!(server.ask("DELETE", "/api/v1/nodes/n2", None).await.0, 200);
    until(async || on().await == ["n1"]).await;
    until(async || server.ask("GET", &format!("{sets}/ds"), None).await.1["status"]["numberAvailable"] == 1)
        .await;
    assert_eq!(server.ask("DELETE", &format!("{sets}/ds"), None).await.0, 200);

    let mut template = template("job", "i:1");
    template["spec"]["restartPolicy"] = json!("Never");
    let job = json!({"metadata": {"name": "j"}, "spec": {"completions": 2, "parallelism": 2, "template": template}});
    let jobs = "/apis/batch/v1/namespaces/default/jobs";
    assert_eq!(server.ask("POST", jobs, Some(&job)).await.0, 201);
    until(async || {
        run_pods(&server, "Succeeded").await;
        let (_, job) = server.ask("GET", &format!("{jobs}/j"), None).await;
        let conditions = job["status"]["conditions"].as_array().cloned().unwrap_or_default();
        job["status"]["succeeded"] == 2 && conditions.iter().any(|held| held["type"] == "Complete")
    })
    .await;
    server.stop().await;
}
