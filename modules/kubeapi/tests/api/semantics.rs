//! What generic clients rely on.

use std::time::Duration;

use bytes::Bytes;
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use serde_json::{Value, json};

use super::client::{ADMIN, TestServer, token, value_of};

const MAPS: &str = "/api/v1/namespaces/default/configmaps";

fn map(name: &str, labels: Value) -> Value {
    json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name, "labels": labels}, "data": {"k": "v"}})
}

async fn made(server: &TestServer, path: &str, object: &Value) -> Value {
    let (code, answer) = server.ask("POST", path, Some(object)).await;
    assert_eq!(code, 201, "{answer}");
    answer
}

/// Lines of a watch as they come.
struct Lines {
    body: Incoming,
    rest: Vec<u8>,
}

impl Lines {
    async fn of(server: &TestServer, path: &str) -> Self {
        let response = server.send("GET", path, &[], None).await;
        assert_eq!(response.status(), 200);
        Self { body: response.into_body(), rest: Vec::new() }
    }

    /// Type and object of the next event; `None` at the end.
    async fn next(&mut self) -> Option<(String, Value)> {
        loop {
            if let Some(end) = self.rest.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.rest.drain(..=end).collect();
                let event: Value = serde_json::from_slice(&line).unwrap();
                return Some((event["type"].as_str().unwrap().to_owned(), event["object"].clone()));
            }
            let frame =
                tokio::time::timeout(Duration::from_secs(10), self.body.frame()).await.expect("in time")?;
            self.rest.extend_from_slice(&frame.unwrap().into_data().unwrap());
        }
    }

    async fn shown(&mut self) -> (String, String) {
        let (ty, object) = self.next().await.expect("an event");
        (ty, object["metadata"]["name"].as_str().unwrap_or_default().to_owned())
    }
}

fn shown(ty: &str, name: &str) -> (String, String) {
    (ty.to_owned(), name.to_owned())
}

#[tokio::test]
async fn every_page_of_a_list_is_of_one_revision() {
    let server = TestServer::start().await;
    for n in 0..25 {
        made(&server, MAPS, &map(&format!("m{n:02}"), json!({"page": "y"}))).await;
    }
    let (mut next, mut names, mut revisions) = (String::new(), Vec::new(), Vec::new());
    for round in 0.. {
        let (code, page) =
            server.ask("GET", &format!("{MAPS}?labelSelector=page&limit=7&continue={next}"), None).await;
        assert_eq!(code, 200, "{page}");
        names.extend(
            page["items"]
                .as_array()
                .unwrap()
                .iter()
                .map(|item| item["metadata"]["name"].as_str().unwrap().to_owned()),
        );
        revisions.push(page["metadata"]["resourceVersion"].clone());
        // What is written between the pages is in none of them.
        made(&server, MAPS, &map(&format!("m{round:02}x"), json!({"page": "y"}))).await;
        let gone = format!("{MAPS}/m{:02}", 20 + round);
        assert_eq!(server.ask("DELETE", &gone, None).await.0, 200);
        next = page["metadata"]["continue"].as_str().unwrap_or_default().to_owned();
        if next.is_empty() {
            break;
        }
    }
    assert_eq!(names, (0..25).map(|n| format!("m{n:02}")).collect::<Vec<_>>());
    assert!(revisions.iter().all(|revision| *revision == revisions[0]));
    server.stop().await;
}

#[tokio::test]
async fn a_watch_shows_objects_come_into_a_selector_and_leave_it() {
    let server = TestServer::start().await;
    let first = made(&server, MAPS, &map("a", json!({"app": "x"}))).await;
    made(&server, MAPS, &map("b", json!({"app": "y"}))).await;
    let since = first["metadata"]["resourceVersion"].as_str().unwrap();
    let mut watch =
        Lines::of(&server, &format!("{MAPS}?watch=1&labelSelector=app%3Dx&resourceVersion={since}")).await;
    for (name, label) in [("b", "x"), ("a", "y"), ("b", "y"), ("a", "x")] {
        let patch = json!({"metadata": {"labels": {"app": label}}});
        let path = format!("{MAPS}/{name}");
        let (code, _) =
            server.ask_as("PATCH", &path, "application/merge-patch+json", ADMIN, Some(&patch)).await;
        assert_eq!(code, 200);
    }
    assert_eq!(server.ask("DELETE", &format!("{MAPS}/a"), None).await.0, 200);
    for wanted in [("ADDED", "b"), ("DELETED", "a"), ("DELETED", "b"), ("ADDED", "a"), ("DELETED", "a")] {
        assert_eq!(watch.shown().await, shown(wanted.0, wanted.1));
    }
    server.stop().await;
}

#[tokio::test]
async fn a_streamed_list_ends_with_a_bookmark_and_goes_on_without_a_gap() {
    let server = TestServer::start().await;
    for n in 0..3 {
        made(&server, MAPS, &map(&format!("m{n}"), json!({"s": "1"}))).await;
    }
    let query = "watch=1&labelSelector=s&sendInitialEvents=true&resourceVersionMatch=NotOlderThan&allowWatchBookmarks=true&timeoutSeconds=3";
    let mut watch = Lines::of(&server, &format!("{MAPS}?{query}")).await;
    for n in 0..3 {
        assert_eq!(watch.shown().await, shown("ADDED", &format!("m{n}")));
    }
    let (ty, end) = watch.next().await.unwrap();
    assert_eq!(
        (ty.as_str(), &end["metadata"]["annotations"]["k8s.io/initial-events-end"]),
        ("BOOKMARK", &json!("true"))
    );
    let after = made(&server, MAPS, &map("m3", json!({"s": "1"}))).await;
    assert_eq!(watch.shown().await, shown("ADDED", "m3"));
    // The last bookmark is behind everything that was shown.
    let (ty, last) = watch.next().await.unwrap();
    let revision =
        |object: &Value| object["metadata"]["resourceVersion"].as_str().unwrap().parse::<u64>().unwrap();
    assert_eq!(ty, "BOOKMARK");
    assert!(revision(&last) >= revision(&after));
    assert_eq!(watch.next().await, None);
    let (_, too_old) = Lines::of(&server, &format!("{MAPS}?watch=1&resourceVersion={}", u64::MAX / 2))
        .await
        .next()
        .await
        .unwrap();
    assert_eq!(too_old["reason"], "Timeout", "{too_old}");
    server.stop().await;
}

#[tokio::test]
async fn of_many_writers_with_one_revision_one_wins() {
    let server = TestServer::start().await;
    let mut object = made(&server, MAPS, &map("c", json!({}))).await;
    let path = format!("{MAPS}/c");
    let mut attempts = Vec::new();
    for n in 0..6 {
        object["data"]["k"] = json!(n.to_string());
        let object = object.clone();
        let (server, path) = (&server, &path);
        attempts.push(async move { server.ask("PUT", path, Some(&object)).await });
    }
    let mut codes = Vec::new();
    let mut running: Vec<_> = attempts.into_iter().map(Box::pin).collect();
    for attempt in &mut running {
        codes.push(attempt.await.0);
    }
    drop(running);
    codes.sort_unstable();
    assert_eq!(codes, [200, 409, 409, 409, 409, 409]);
    // Without a revision a patch is tried again.
    let patch = json!({"data": {"p": "1"}});
    let patched = server.ask_as("PATCH", &path, "application/merge-patch+json", ADMIN, Some(&patch)).await;
    assert_eq!(patched.0, 200);
    server.stop().await;
}

#[tokio::test]
async fn a_dry_run_writes_nothing_whatever_it_does() {
    let server = TestServer::start().await;
    made(&server, MAPS, &map("d", json!({}))).await;
    let path = format!("{MAPS}/d");
    let (_, before) = server.ask("GET", MAPS, None).await;
    let merge = "application/merge-patch+json";
    let patch = json!({"data": {"x": "1"}});
    let apply =
        json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "d"}, "data": {"k": "2"}});
    let dry = |path: &str| format!("{path}?dryRun=All&fieldManager=f&force=true");
    let all = [
        server.ask("POST", &dry(MAPS), Some(&map("e", json!({})))).await,
        server.ask_as("PATCH", &dry(&path), merge, ADMIN, Some(&patch)).await,
        server.ask_as("PATCH", &dry(&path), "application/apply-patch+yaml", ADMIN, Some(&apply)).await,
        server.ask("PUT", &dry(&path), Some(&map("d", json!({"l": "1"})))).await,
        server.ask("DELETE", &dry(&path), None).await,
        server.ask("DELETE", &dry(MAPS), None).await,
    ];
    for (code, answer) in all {
        assert!(code < 300, "{answer}");
    }
    assert_eq!(server.ask("GET", MAPS, None).await.1, before);
    server.stop().await;
}

#[tokio::test]
async fn what_is_owned_goes_after_its_owner_before_it_or_not_at_all() {
    let server = TestServer::start().await;
    for (policy, stays) in [("Background", false), ("Foreground", false), ("Orphan", true)] {
        let owner = made(&server, MAPS, &map("owner", json!({}))).await;
        let mut owned = map("owned", json!({}));
        owned["metadata"]["ownerReferences"] = json!([{"apiVersion": "v1", "kind": "ConfigMap", "name": "owner",
            "uid": owner["metadata"]["uid"], "blockOwnerDeletion": true}]);
        made(&server, MAPS, &owned).await;
        let options = json!({"propagationPolicy": policy});
        assert_eq!(server.ask("DELETE", &format!("{MAPS}/owner"), Some(&options)).await.0, 200);
        until(async || server.ask("GET", &format!("{MAPS}/owner"), None).await.0 == 404).await;
        if stays {
            let (code, owned) = server.ask("GET", &format!("{MAPS}/owned"), None).await;
            assert_eq!((code, owned["metadata"].get("ownerReferences")), (200, None), "{policy}");
        } else {
            until(async || server.ask("GET", &format!("{MAPS}/owned"), None).await.0 == 404).await;
        }
    }
    server.stop().await;
}

/// Waits for something that the server does by itself.
pub(crate) async fn until(mut done: impl AsyncFnMut() -> bool) {
    let waited = tokio::time::timeout(Duration::from_secs(20), async {
        while !done().await {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    waited.await.expect("it happens in time");
}

#[tokio::test]
async fn a_namespace_ends_when_it_is_empty_and_takes_nothing_new_meanwhile() {
    let server = TestServer::start().await;
    made(&server, "/api/v1/namespaces", &json!({"metadata": {"name": "n"}})).await;
    let mut held = map("held", json!({}));
    held["metadata"]["finalizers"] = json!(["example.com/hold"]);
    made(&server, "/api/v1/namespaces/n/configmaps", &held).await;
    made(&server, "/api/v1/namespaces/n/configmaps", &map("plain", json!({}))).await;
    assert_eq!(server.ask("DELETE", "/api/v1/namespaces/n", None).await.0, 200);
    let (code, refused) =
        server.ask("POST", "/api/v1/namespaces/n/configmaps", Some(&map("late", json!({})))).await;
    assert_eq!((code, &refused["reason"]), (403, &json!("Forbidden")));
    until(async || server.ask("GET", "/api/v1/namespaces/n/configmaps/plain", None).await.0 == 404).await;
    assert_eq!(server.ask("GET", "/api/v1/namespaces/n", None).await.1["status"]["phase"], "Terminating");
    let release = json!({"metadata": {"finalizers": null}});
    let merge = "application/merge-patch+json";
    server.ask_as("PATCH", "/api/v1/namespaces/n/configmaps/held", merge, ADMIN, Some(&release)).await;
    until(async || server.ask("GET", "/api/v1/namespaces/n", None).await.0 == 404).await;
    server.stop().await;
}

#[tokio::test]
async fn a_node_reads_the_secrets_of_its_pods_and_writes_itself_alone() {
    let node = token("node-token", "system:node:n1", &["system:nodes"]);
    let viewer = token("viewer-token", "eve", &[]);
    let server = TestServer::with_tokens(vec![node, viewer]).await;
    let ask = async |method: &str, path: &str, who: &str, body: Option<Value>| {
        server.ask_as(method, path, "application/json", &format!("Bearer {who}"), body.as_ref()).await
    };
    for name in ["n1", "n2"] {
        let (code, answer) =
            ask("POST", "/api/v1/nodes", "node-token", Some(json!({"metadata": {"name": name}}))).await;
        assert_eq!(code, if name == "n1" { 201 } else { 403 }, "{answer}");
    }
    let secrets = "/api/v1/namespaces/default/secrets";
    for name in ["used", "other"] {
        made(&server, secrets, &json!({"metadata": {"name": name}, "stringData": {"k": "v"}})).await;
    }
    until(async || {
        server.ask("GET", "/api/v1/namespaces/default/serviceaccounts/default", None).await.0 == 200
    })
    .await;
    let pod = json!({"metadata": {"name": "p"}, "spec": {"nodeName": "n1", "containers": [{"name": "c", "image": "i",
        "env": [{"name": "E", "valueFrom": {"secretKeyRef": {"name": "used", "key": "k"}}}]}]}});
    made(&server, "/api/v1/namespaces/default/pods", &pod).await;
    until(async || ask("GET", &format!("{secrets}/used"), "node-token", None).await.0 == 200).await;
    assert_eq!(ask("GET", &format!("{secrets}/other"), "node-token", None).await.0, 403);
    assert_eq!(ask("GET", secrets, "node-token", None).await.0, 403);
    let status = json!({"metadata": {"name": "p"}, "status": {"phase": "Running"}});
    let path = "/api/v1/namespaces/default/pods/p/status";
    assert_eq!(ask("PUT", path, "node-token", Some(status.clone())).await.0, 200);
    assert_eq!(ask("PUT", path, "viewer-token", Some(status)).await.0, 403);
    assert_eq!(ask("GET", "/api/v1/nodes", "nobody", None).await.0, 401);
    // Who gives rights must have them.
    let binding = |role: &str, user: &str| {
        json!({"metadata": {"name": format!("{role}-{user}")},
        "roleRef": {"kind": "ClusterRole", "name": role}, "subjects": [{"kind": "User", "name": user}]})
    };
    let bindings = "/apis/rbac.authorization.k8s.io/v1/namespaces/default/rolebindings";
    made(&server, bindings, &binding("admin", "eve")).await;
    until(async || ask("GET", bindings, "viewer-token", None).await.0 == 200).await;
    assert_eq!(ask("POST", bindings, "viewer-token", Some(binding("view", "mallory"))).await.0, 201);
    assert_eq!(ask("POST", bindings, "viewer-token", Some(binding("cluster-admin", "eve"))).await.0, 403);
    server.stop().await;
}

#[tokio::test]
async fn a_token_of_an_account_is_its_account_until_that_is_gone() {
    let server = TestServer::start().await;
    let accounts = "/api/v1/namespaces/default/serviceaccounts";
    made(&server, accounts, &json!({"metadata": {"name": "robot"}})).await;
    let (code, answer) =
        server.ask("POST", &format!("{accounts}/robot/token"), Some(&json!({"spec": {}}))).await;
    assert_eq!(code, 201, "{answer}");
    let token = format!("Bearer {}", answer["status"]["token"].as_str().unwrap());
    let review = "/apis/authentication.k8s.io/v1/selfsubjectreviews";
    let whoami =
        async |token: &str| server.ask_as("POST", review, "application/json", token, Some(&json!({}))).await;
    until(async || whoami(&token).await.0 == 201).await;
    let (_, who) = whoami(&token).await;
    assert_eq!(who["status"]["userInfo"]["username"], "system:serviceaccount:default:robot");
    let (signed, signature) = token.rsplit_once('.').unwrap();
    let turned: String = signature.chars().rev().collect();
    let forged = format!("{signed}.{turned}");
    assert_eq!(whoami(&forged).await.0, 401);
    assert_eq!(server.ask("DELETE", &format!("{accounts}/robot"), None).await.0, 200);
    until(async || whoami(&token).await.0 == 401).await;
    server.stop().await;
}

#[tokio::test]
async fn bodies_are_bounded_in_size_depth_and_values() {
    let server = TestServer::start().await;
    let headers = [("content-type".to_owned(), "application/json".to_owned())];
    let post = async |body: String| {
        let response = server.send("POST", MAPS, &headers, Some(Bytes::from(body))).await;
        (response.status().as_u16(), value_of(response).await)
    };
    let large = json!({"metadata": {"name": "l"}, "data": {"k": "x".repeat(4 << 20)}}).to_string();
    assert_eq!(post(large).await.0, 413);
    assert_eq!(post(format!("{}1{}", "[".repeat(100), "]".repeat(100))).await.0, 400);
    assert_eq!(post(format!("[{}1]", "1,".repeat(300_000))).await.0, 400);
    assert_eq!(server.ask("GET", MAPS, None).await.0, 200);
    server.stop().await;
}

#[tokio::test]
async fn behind_the_window_a_watch_and_a_page_are_gone_and_a_list_begins_anew() {
    const WINDOW: usize = 30;
    let server = TestServer::with_window(WINDOW).await;
    let first = made(&server, MAPS, &map("m00", json!({}))).await;
    let first = first["metadata"]["resourceVersion"].as_str().unwrap().to_owned();
    made(&server, MAPS, &map("m01", json!({}))).await;
    let (_, page) = server.ask("GET", &format!("{MAPS}?limit=1"), None).await;
    let next = page["metadata"]["continue"].as_str().unwrap().to_owned();
    for n in 2..2 * WINDOW {
        made(&server, MAPS, &map(&format!("m{n:02}"), json!({}))).await;
    }
    let mut lines = Lines::of(&server, &format!("{MAPS}?watch=1&resourceVersion={first}")).await;
    let (ty, status) = lines.next().await.expect("an event");
    assert_eq!((&*ty, &status["code"], &status["reason"]), ("ERROR", &json!(410), &json!("Expired")));
    assert!(lines.next().await.is_none(), "and nothing after it");
    let (code, status) = server.ask("GET", &format!("{MAPS}?limit=1&continue={next}"), None).await;
    assert_eq!((code, &status["reason"]), (410, &json!("Expired")));
    let (code, status) =
        server.ask("GET", &format!("{MAPS}?resourceVersion={first}&resourceVersionMatch=Exact"), None).await;
    assert_eq!((code, &status["reason"]), (410, &json!("Expired")));
    // What a client does then.
    let (code, list) = server.ask("GET", &format!("{MAPS}?labelSelector=!none"), None).await;
    let revision = list["metadata"]["resourceVersion"].as_str().unwrap().to_owned();
    assert_eq!(code, 200);
    let mut lines = Lines::of(&server, &format!("{MAPS}?watch=1&resourceVersion={revision}")).await;
    made(&server, MAPS, &map("new", json!({}))).await;
    assert_eq!(lines.shown().await, shown("ADDED", "new"));
    server.stop().await;
}
