//! `octobus ctl describe`: one pod or the node, and what happened to it lately.
//!
//! Events are read from the node's own Log, where they stand whether they have reached the hub or not.

use std::fmt::Write as _;

use ops::{
    api::{self, Entry, LogRow},
    client::Client,
};
use serde_json::Value;

use super::{Api, escaped, get, pod_path};
use crate::{
    cli::ctl::DescribeArgs,
    exit::{Failure, Outcome},
    output,
};

/// Events that are shown: the youngest.
const EVENTS_MAX: usize = 20;

pub(super) async fn run(args: &DescribeArgs) -> Outcome {
    let api = Api::new(args.target.client()?);
    let (kind, name) = get::split(&args.kind, args.name.as_deref());
    let (plural, _) = get::resource(kind)?;
    let (path, kind) = match (plural, name) {
        ("pods", Some(name)) => (pod_path(&args.namespace, name), "Pod"),
        ("nodes", Some(name)) => (format!("/api/v1/nodes/{}", escaped(name)), "Node"),
        ("nodes", None) => (format!("/api/v1/nodes/{}", escaped(&api.node().await?)), "Node"),
        ("pods", None) => return Err(Failure::usage("name a pod: `octobus ctl describe pod NAME`")),
        _ => {
            return Err(Failure::usage(
                "pods and the node are described; `octobus ctl get` shows the others",
            ));
        }
    };
    let object = api.json(&path, "application/json").await?;
    let mut text = match kind {
        "Pod" => pod(&object),
        _ => node(&object),
    };
    let name = object["metadata"]["name"].as_str().unwrap_or_default();
    let events = events(&api.client, kind, name, &object["metadata"]["namespace"]).await?;
    show_events(&mut text, &events);
    output::bytes(text.as_bytes())
}

fn field(text: &mut String, name: &str, value: &Value) {
    let value = match value {
        Value::Null => return,
        Value::String(value) => value.clone(),
        other => other.to_string(),
    };
    writeln!(text, "{:<14}{value}", format!("{name}:")).expect("a String takes everything");
}

fn pairs(text: &mut String, name: &str, map: &Value) {
    for (at, (key, value)) in map.as_object().into_iter().flatten().enumerate() {
        let name = if at == 0 { format!("{name}:") } else { String::new() };
        let value = value.as_str().unwrap_or_default();
        writeln!(text, "{name:<14}{key}={value}").expect("a String takes everything");
    }
}

fn metadata(text: &mut String, object: &Value) {
    let of = &object["metadata"];
    field(text, "Name", &of["name"]);
    field(text, "Namespace", &of["namespace"]);
    pairs(text, "Labels", &of["labels"]);
    field(text, "Created", &of["creationTimestamp"]);
    field(text, "Deletion", &of["deletionTimestamp"]);
}

fn pod(pod: &Value) -> String {
    let mut text = String::new();
    metadata(&mut text, pod);
    let status = &pod["status"];
    field(&mut text, "Node", &pod["spec"]["nodeName"]);
    field(&mut text, "Status", &status["phase"]);
    field(&mut text, "Reason", &status["reason"]);
    field(&mut text, "Message", &status["message"]);
    field(&mut text, "IP", &status["podIP"]);
    field(&mut text, "Started", &status["startTime"]);
    for (title, specs, states) in [
        ("Init Containers", "initContainers", "initContainerStatuses"),
        ("Containers", "containers", "containerStatuses"),
    ] {
        let specs = pod["spec"][specs].as_array().map_or(&[][..], Vec::as_slice);
        if specs.is_empty() {
            continue;
        }
        writeln!(text, "{title}:").expect("a String takes everything");
        for spec in specs {
            let of_name =
                status[states].as_array().into_iter().flatten().find(|state| state["name"] == spec["name"]);
            container(&mut text, spec, of_name.unwrap_or(&Value::Null));
        }
    }
    conditions(&mut text, status);
    text
}

fn container(text: &mut String, spec: &Value, status: &Value) {
    writeln!(text, "  {}:", spec["name"].as_str().unwrap_or("?")).expect("a String takes everything");
    let mut line = |name: &str, value: &Value| {
        let value = match value {
            Value::Null => return,
            Value::String(value) => value.clone(),
            other => other.to_string(),
        };
        writeln!(text, "    {:<14}{value}", format!("{name}:")).expect("a String takes everything");
    };
    line("Image", &spec["image"]);
    line("Container ID", &status["containerID"]);
    for (name, key) in [("State", "state"), ("Last State", "lastState")] {
        for (state, of) in status[key].as_object().into_iter().flatten() {
            line(name, &Value::String(state.clone()));
            for (name, key) in [
                ("  Reason", "reason"),
                ("  Message", "message"),
                ("  Exit Code", "exitCode"),
                ("  Started", "startedAt"),
                ("  Finished", "finishedAt"),
            ] {
                line(name, &of[key]);
            }
        }
    }
    line("Ready", &status["ready"]);
    line("Restarts", &status["restartCount"]);
    line("Limits", &spec["resources"]["limits"]);
    line("Requests", &spec["resources"]["requests"]);
}

fn node(node: &Value) -> String {
    let mut text = String::new();
    metadata(&mut text, node);
    let status = &node["status"];
    for (name, key) in [
        ("Kernel", "kernelVersion"),
        ("OS", "osImage"),
        ("Runtime", "containerRuntimeVersion"),
        ("Agent", "kubeletVersion"),
        ("Architecture", "architecture"),
    ] {
        field(&mut text, name, &status["nodeInfo"][key]);
    }
    pairs(&mut text, "Capacity", &status["capacity"]);
    pairs(&mut text, "Allocatable", &status["allocatable"]);
    conditions(&mut text, status);
    text
}

fn conditions(text: &mut String, status: &Value) {
    let all = status["conditions"].as_array().map_or(&[][..], Vec::as_slice);
    if all.is_empty() {
        return;
    }
    writeln!(text, "Conditions:").expect("a String takes everything");
    for condition in all {
        let part = |name: &str| condition[name].as_str().unwrap_or_default();
        let line =
            format!("  {:<26}{:<9}{}  {}", part("type"), part("status"), part("reason"), part("message"));
        writeln!(text, "{}", line.trim_end()).expect("a String takes everything");
    }
}

/// Those of an object, the youngest last.
async fn events(client: &Client, kind: &str, name: &str, namespace: &Value) -> Outcome<Vec<Value>> {
    let logs: Vec<LogRow> = client.get("/v1/logs", &[]).await?;
    // A node that has noted nothing has no such stream.
    let Some(own) = logs.iter().find(|log| log.stream == "events" && !log.node.is_empty()) else {
        return Ok(Vec::new());
    };
    let query = [("node", own.node.as_str()), ("stream", "events"), ("topic", "$octobus/event")];
    let mut lines = client.lines("/v1/log", &query).await?;
    let mut found = Vec::new();
    while let Some(line) = lines.next().await? {
        let Ok(Entry::Record(record)) = serde_json::from_slice::<Entry>(&line) else { continue };
        let Ok(payload) = api::payload(&record.payload) else { continue };
        let Ok(event) = serde_json::from_slice::<Value>(&payload) else { continue };
        let about = &event["involvedObject"];
        let same = about["kind"] == kind && about["name"] == name;
        if same && (namespace.is_null() || about["namespace"] == *namespace) {
            found.push(event);
        }
    }
    Ok(found.split_off(found.len().saturating_sub(EVENTS_MAX)))
}

fn show_events(text: &mut String, events: &[Value]) {
    if events.is_empty() {
        text.push_str("Events:       <none on this node>\n");
        return;
    }
    text.push_str("Events:\n");
    for event in events {
        let part = |name: &str| event[name].as_str().unwrap_or_default();
        let line = format!(
            "  {}  {:<8}{:<20}{}",
            part("lastTimestamp"),
            part("type"),
            part("reason"),
            part("message")
        );
        writeln!(text, "{}", line.trim_end()).expect("a String takes everything");
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_container_shows_why_it_ended_last() {
        let shown = pod(&json!({
            "metadata": {"name": "p", "namespace": "default", "labels": {"app": "web"}},
            "spec": {"nodeName": "edge-1", "containers": [{"name": "c", "image": "busybox"}]},
            "status": {"phase": "Running", "containerStatuses": [{
                "name": "c", "ready": true, "restartCount": 2, "state": {"running": {"startedAt": "now"}},
                "lastState": {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}}]}}));
        for line in [
            "Name:         p",
            "Labels:       app=web",
            "    Image:        busybox",
            "      Reason:     OOMKilled",
            "      Exit Code:  137",
            "    Restarts:     2",
        ] {
            assert!(shown.contains(line), "{line:?} in:\n{shown}");
        }
    }
}
