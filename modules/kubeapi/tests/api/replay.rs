//! Asks what a real server was asked and compares what it answered: status, reason and every field but those
//! that are of one run (uids, revisions, times).

use std::collections::BTreeMap;

use bytes::Bytes;
use http_body_util::BodyExt as _;
use serde_json::{Value, json};

use super::{
    client::{TestServer, value_of},
    semantics::until,
};

/// Exchanges of which only the status is compared, and why. This list may only shrink.
const STATUS_ONLY: [(&str, &str); 23] = [
    ("version", "it says what this server is"),
    ("api", "clients are not told by which address to come"),
    ("apis", "that server has more groups, and custom ones"),
    ("api aggregated", "that server has more resources"),
    ("apis aggregated", "that server has more groups, and custom ones"),
    ("resources /api/v1", "that server has more resources"),
    ("resources /apis/storage.k8s.io/v1", "that server has more resources"),
    ("resources /apis/networking.k8s.io/v1", "that server has more resources"),
    ("openapi v3 index", "that server has more groups; addresses hold a hash of the document"),
    ("readyz verbose", "it names that server's parts"),
    ("unsupported media", "protobuf is not served"),
    ("not acceptable", "protobuf is not served"),
    ("list bad continue", "the message quotes another JSON parser"),
    ("watch too old", "a new server knows all its revisions"),
    ("pod immutable field", "the message shows a difference of Go structs"),
    ("pod status patch", "who makes the list of conditions depends on the moment"),
    ("pod delete grace", "who makes the list of conditions depends on the moment"),
    ("pod delete now", "who makes the list of conditions depends on the moment"),
    ("deployment after controllers", "it names a set whose name is made up and not seen before"),
    ("self subject access review", "a question has no managed fields"),
    ("self subject rules", "roles are in another order"),
    ("token request", "a question has no managed fields"),
    ("events", "how often the scheduler looked depends on the moment"),
];

/// Exchanges that this server refuses, and why. This list may only shrink.
const REFUSED: [(&str, &str); 1] =
    [("resources /apis/admissionregistration.k8s.io/v1", "webhooks and admission policies are not served")];

const EXCHANGES: &str = include_str!("../data/exchanges.jsonl");

#[tokio::test]
async fn a_real_servers_answers_are_given() {
    let server = TestServer::start().await;
    let mut seen = Seen::default();
    let mut wrong = Vec::new();
    for line in EXCHANGES.lines() {
        let exchange: Value = serde_json::from_str(line).unwrap();
        let name = exchange["name"].as_str().unwrap();
        let (request, recorded) = (&exchange["request"], &exchange["response"]);
        if REFUSED.iter().any(|(refused, _)| *refused == name) {
            continue;
        }
        let answered = ask(&server, name, request, &seen, recorded.get("events").is_some()).await;
        let wanted = recorded["status"].as_u64().unwrap();
        if u64::from(answered.0) != wanted {
            wrong.push(format!("{name}: status {} instead of {wanted}: {}", answered.0, answered.1));
            continue;
        }
        let body = recorded.get("events").unwrap_or_else(|| &recorded["body"]);
        seen.learn(body, &answered.1);
        settle(&server, name).await;
        if STATUS_ONLY.iter().any(|(only, _)| *only == name) {
            continue;
        }
        let mut differences = Vec::new();
        let body: Value = serde_json::from_str(&seen.replaced(&body.to_string())).unwrap();
        compare(&masked(&body), &masked(&answered.1), "", &mut differences);
        if !differences.is_empty() {
            wrong.push(format!("{name}:\n  {}", differences.join("\n  ")));
        }
    }
    server.stop().await;
    assert!(wrong.is_empty(), "{} differ:\n{}", wrong.len(), wrong.join("\n"));
}

/// What the recorded server's controllers had done before the next exchange.
async fn settle(server: &TestServer, name: &str) {
    let there = async |path: &str| server.ask("GET", path, None).await;
    match name {
        "namespace create" => {
            until(async || there("/api/v1/namespaces/fx/configmaps/kube-root-ca.crt").await.0 == 200).await;
        }
        "scale put" => {
            let path = "/apis/apps/v1/namespaces/fx/deployments/d";
            until(async || there(path).await.1["status"]["observedGeneration"] == 2).await;
            until(async || there(path).await.1["status"]["replicas"] == 1).await;
        }
        "crd create" => {
            let path = "/apis/fx.example/v1/namespaces/fx/foos";
            until(async || there(path).await.0 == 200).await;
        }
        _ => {}
    }
}

async fn ask(server: &TestServer, name: &str, request: &Value, seen: &Seen, watch: bool) -> (u16, Value) {
    let mut path = seen.replaced(request["path"].as_str().unwrap());
    if watch {
        let end = path.find("&timeoutSeconds").unwrap_or(path.len());
        path = format!("{}&timeoutSeconds=1", &path[..end]);
    }
    let headers = request["headers"].as_object().unwrap().iter();
    let mut headers: Vec<(String, String)> =
        headers.map(|(name, value)| (name.clone(), value.as_str().unwrap().to_owned())).collect();
    // Credentials were not recorded.
    match name {
        "unauthorized" => headers.push(("authorization".to_owned(), "Bearer nobody".to_owned())),
        "anonymous" => headers.push(("authorization".to_owned(), String::new())),
        _ => {}
    }
    let body = match &request["body"] {
        Value::Null => None,
        Value::String(text) => Some(Bytes::from(text.clone())),
        body => Some(Bytes::from(seen.replaced(&body.to_string()))),
    };
    let response = server.send(request["method"].as_str().unwrap(), &path, &headers, body).await;
    let status = response.status().as_u16();
    if !watch {
        return (status, value_of(response).await);
    }
    let bytes = response.into_body().collect().await.unwrap().to_bytes();
    let lines = bytes.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
    (status, lines.map(|line| serde_json::from_slice::<Value>(line).unwrap()).collect())
}

/// What stands here for what stood there.
#[derive(Default)]
struct Seen(BTreeMap<String, String>);

impl Seen {
    fn learn(&mut self, recorded: &Value, answered: &Value) {
        match (recorded, answered) {
            (Value::Object(recorded), Value::Object(answered)) => {
                for (name, value) in recorded {
                    let Some(other) = answered.get(name) else { continue };
                    let of_one_run =
                        ["uid", "resourceVersion", "continue", "name", "pod-template-hash", "token"]
                            .contains(&name.as_str());
                    // Only names that were made up differ.
                    let made_up = |text: &str| {
                        ["gen-", "d-", "kube-api-access-"].iter().any(|start| text.starts_with(start))
                    };
                    if let (true, Some(there), Some(here)) = (of_one_run, value.as_str(), other.as_str())
                        && (name != "name" || made_up(there) && made_up(here))
                    {
                        self.0.insert(there.to_owned(), here.to_owned());
                    }
                    self.learn(value, other);
                }
            }
            (Value::Array(recorded), Value::Array(answered)) => {
                recorded.iter().zip(answered).for_each(|(there, here)| self.learn(there, here));
            }
            _ => {}
        }
    }

    fn replaced(&self, text: &str) -> String {
        // A name that begins with another one comes before it.
        self.0.iter().rev().fold(text.to_owned(), |text, (there, here)| {
            if there.len() < 4 { text } else { text.replace(there.as_str(), here) }
        })
    }
}

fn masked(value: &Value) -> Value {
    const OF_ONE_RUN: [&str; 8] = [
        "uid",
        "resourceVersion",
        "continue",
        "time",
        "ca.crt",
        "description",
        "token",
        "remainingItemCount",
    ];
    match value {
        Value::Object(map) if map.get("kind").is_some_and(|kind| kind == "Table") => {
            // What stands in it is of one moment.
            json!({"columns": masked(&map["columnDefinitions"])})
        }
        Value::Object(map) => {
            let kept =
                map.iter().filter(|(name, _)| *name != "storageVersionHash" && *name != "remainingItemCount");
            let masked = kept.map(|(name, value)| {
                let time = name.ends_with("Time") || name.ends_with("Timestamp");
                let of_one_run = (OF_ONE_RUN.contains(&name.as_str()) || time) && !value.is_null();
                (name.clone(), if of_one_run && !value.is_object() { json!("*") } else { masked(value) })
            });
            Value::Object(masked.collect())
        }
        Value::Array(list) => {
            // When the scheduler looks, and what else a cluster puts into each namespace, is its own matter.
            let others = |value: &&Value| {
                value["manager"] != "kube-scheduler"
                    && value["type"] != "PodScheduled"
                    && value["metadata"]["name"] != "openshift-service-ca.crt"
                    && value["object"]["metadata"]["name"] != "openshift-service-ca.crt"
                    && value["object"]["rows"][0]["cells"][0] != "openshift-service-ca.crt"
                    && value["configMap"]["name"] != "openshift-service-ca.crt"
            };
            // How many bookmarks come depends on the moment too.
            let mut marked = false;
            let first_mark =
                |value: &&Value| value["type"] != "BOOKMARK" || !std::mem::replace(&mut marked, true);
            Value::Array(list.iter().filter(others).filter(first_mark).map(masked).collect())
        }
        Value::String(text) if text.contains("current: ") => {
            json!(text.split("current: ").next())
        }
        other => other.clone(),
    }
}

fn compare(wanted: &Value, found: &Value, path: &str, differences: &mut Vec<String>) {
    match (wanted, found) {
        (Value::Object(wanted), Value::Object(found)) => {
            for name in wanted.keys().chain(found.keys().filter(|name| !wanted.contains_key(*name))) {
                let path = format!("{path}.{name}");
                match (wanted.get(name), found.get(name)) {
                    (Some(wanted), Some(found)) => compare(wanted, found, &path, differences),
                    (Some(wanted), None) => differences.push(format!("{path} is missing: {wanted}")),
                    (None, Some(found)) => differences.push(format!("{path} is there: {found}")),
                    (None, None) => {}
                }
            }
        }
        (Value::Array(wanted), Value::Array(found)) if wanted.len() == found.len() => {
            for (index, (wanted, found)) in wanted.iter().zip(found).enumerate() {
                compare(wanted, found, &format!("{path}[{index}]"), differences);
            }
        }
        _ if wanted != found => differences.push(format!("{path}: {found} instead of {wanted}")),
        _ => {}
    }
}
