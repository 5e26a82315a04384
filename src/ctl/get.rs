//! `octobus ctl get`: objects as tables, the way kubectl shows them.

use bytes::BytesMut;
use http_body_util::BodyExt as _;
use hyper::Method;
use serde_json::Value;

use super::{Api, escaped};
use crate::{
    cli::ctl::{GetArgs, Shown},
    exit::{Failure, Outcome},
    output::{self, Table},
};

const AS_TABLE: &str = "application/json;as=Table;v=v1;g=meta.k8s.io,application/json";

/// Names for people, the name in paths, and whether its objects live in namespaces.
const RESOURCES: [(&[&str], &str, bool); 5] = [
    (&["po", "pod", "pods"], "pods", true),
    (&["no", "node", "nodes"], "nodes", false),
    (&["cm", "configmap", "configmaps"], "configmaps", true),
    (&["secret", "secrets"], "secrets", true),
    (&["sa", "serviceaccount", "serviceaccounts"], "serviceaccounts", true),
];

/// A resource that the node has, and whether it lives in namespaces.
pub(super) fn resource(name: &str) -> Outcome<(&'static str, bool)> {
    let found = RESOURCES.iter().find(|(names, ..)| names.contains(&name));
    found.map(|(_, path, namespaced)| (*path, *namespaced)).ok_or_else(|| {
        let known: Vec<&str> = RESOURCES.iter().map(|(_, path, _)| *path).collect();
        Failure::usage(format!("a node has {}; ask the hub for {name}", known.join(", ")))
    })
}

/// `pod/web-1` or `pod web-1`.
pub(super) fn split<'a>(kind: &'a str, name: Option<&'a str>) -> (&'a str, Option<&'a str>) {
    match kind.split_once('/') {
        Some((kind, name)) => (kind, Some(name)),
        None => (kind, name),
    }
}

pub(super) async fn run(args: &GetArgs) -> Outcome {
    let api = Api::new(args.target.client()?);
    let (kind, name) = split(&args.kind, args.name.as_deref());
    let (plural, namespaced) = resource(kind)?;
    let all = args.all_namespaces || !namespaced;
    let mut path = match (all, name) {
        (true, _) => format!("/api/v1/{plural}"),
        (false, _) => format!("/api/v1/namespaces/{}/{plural}", escaped(&args.namespace)),
    };
    let mut query = Vec::new();
    if let Some(name) = name {
        // A list of one, so that a watch of it is one too.
        query.push(format!("fieldSelector={}", escaped(&format!("metadata.name={name}"))));
    }
    query.extend(args.selector.as_ref().map(|selector| format!("labelSelector={}", escaped(selector))));
    path = format!("{path}?{}", query.join("&"));
    let accept = match args.output {
        Shown::Json | Shown::Name => "application/json",
        Shown::Text | Shown::Wide => AS_TABLE,
    };
    let list = api.json(&path, accept).await?;
    if let (Some(name), true) = (name, items(&list).is_empty()) {
        return Err(Failure::not_found(format!("{plural} \"{name}\" not found on this node")));
    }
    show(args, plural, &list, true)?;
    if args.watch {
        let revision = list["metadata"]["resourceVersion"].as_str().unwrap_or_default();
        follow(&api, args, plural, &format!("{path}&watch=true&resourceVersion={revision}"), accept).await?;
    }
    Ok(())
}

/// Rows of a table, or objects.
fn items(list: &Value) -> &[Value] {
    list["rows"].as_array().or_else(|| list["items"].as_array()).map_or(&[], Vec::as_slice)
}

async fn follow(api: &Api, args: &GetArgs, plural: &str, path: &str, accept: &str) -> Outcome {
    let mut body = api.ask(Method::GET, path, accept).await?.into_body();
    let mut waiting = BytesMut::new();
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame.map_err(Failure::failed)?.into_data() else { continue };
        waiting.extend_from_slice(&data);
        while let Some(end) = waiting.iter().position(|byte| *byte == b'\n') {
            let line = waiting.split_to(end + 1);
            let event: Value = serde_json::from_slice(&line).map_err(Failure::failed)?;
            let object = &event["object"];
            if event["type"] == "ERROR" {
                return Err(Failure::failed(object["message"].as_str().unwrap_or("the watch ended")));
            }
            let one = serde_json::json!({"items": [object]});
            show(args, plural, if object["rows"].is_array() { object } else { &one }, false)?;
        }
    }
    Ok(())
}

fn show(args: &GetArgs, plural: &str, list: &Value, heading: bool) -> Outcome {
    match args.output {
        Shown::Json => {
            let text = serde_json::to_vec_pretty(list).map_err(Failure::failed)?;
            output::line(&text)
        }
        Shown::Name => items(list).iter().try_for_each(|object| {
            output::line(
                format!("{plural}/{}", object["metadata"]["name"].as_str().unwrap_or("?")).as_bytes(),
            )
        }),
        Shown::Text | Shown::Wide => {
            let wide = args.output == Shown::Wide;
            if items(list).is_empty() && heading {
                return output::line(b"No resources found on this node.");
            }
            table(list, wide, args.all_namespaces, heading).print()
        }
    }
}

/// As the API says it: columns of priority 0, and the others where there is room.
fn table(list: &Value, wide: bool, namespaces: bool, heading: bool) -> Table {
    let no_columns = Vec::new();
    let columns = list["columnDefinitions"].as_array().unwrap_or(&no_columns);
    let shown: Vec<usize> =
        (0..columns.len()).filter(|at| wide || columns[*at]["priority"].as_i64().unwrap_or(0) == 0).collect();
    let mut titles: Vec<String> =
        shown.iter().map(|at| columns[*at]["name"].as_str().unwrap_or("?").to_uppercase()).collect();
    if namespaces {
        titles.insert(0, "NAMESPACE".to_owned());
    }
    let titles: Vec<&str> = titles.iter().map(String::as_str).collect();
    let mut table = if heading { Table::new(&titles) } else { Table::without_heading() };
    for row in items(list) {
        let mut cells: Vec<String> = shown.iter().map(|at| cell(&row["cells"][*at])).collect();
        if namespaces {
            cells.insert(0, cell(&row["object"]["metadata"]["namespace"]));
        }
        table.row(cells);
    }
    table
}

fn cell(value: &Value) -> String {
    match value {
        Value::Null => "<none>".to_owned(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_kind_and_its_name_are_one_word_or_two() {
        assert_eq!(split("pod/web-1", None), ("pod", Some("web-1")));
        assert_eq!(split("pods", Some("web-1")), ("pods", Some("web-1")));
        assert_eq!(resource("po").unwrap(), ("pods", true));
        assert!(resource("deployments").is_err());
    }

    #[test]
    fn columns_of_lower_priority_are_for_wide_tables() {
        let list = json!({
            "columnDefinitions": [{"name": "Name", "priority": 0}, {"name": "IP", "priority": 1}],
            "rows": [{"cells": ["a", null], "object": {"metadata": {"namespace": "default"}}}]});
        assert_eq!(table(&list, false, true, true).to_string(), "NAMESPACE  NAME\ndefault    a\n");
        assert_eq!(table(&list, true, false, true).to_string(), "NAME  IP\na     <none>\n");
    }
}
