//! `octobus get`: what a running process holds, as tables or JSON.

use std::collections::{BTreeMap, BTreeSet};

use ops::{
    api::{self, ConditionRow, LogRow, SessionRow, StateRow},
    client::Client,
};
use serde::Serialize;

use crate::{
    cli::{GetArgs, Rows, What},
    exit::{Failure, Outcome},
    output::{self, Table},
};

const IDENTITY: &str = "identity/";
/// Characters of a value in a table.
const PREVIEW: usize = 60;

pub(crate) async fn run(args: &GetArgs) -> Outcome {
    let client = args.target.client()?;
    match args.what {
        What::Nodes => nodes(&client, args).await,
        What::Sessions => sessions(&client, args).await,
        What::Streams => streams(&client, args).await,
        What::Conditions => conditions(&client, args).await,
        What::Retained => retained(&client, args).await,
        What::State => state(&client, args).await,
    }
}

/// A node as a hub knows it.
#[derive(Debug, Serialize)]
struct NodeRow {
    name: String,
    linked: bool,
    generation: Option<u64>,
    enrolled: Option<String>,
    streams: usize,
}

async fn nodes(client: &Client, args: &GetArgs) -> Outcome {
    let enrolled = entries(client, "", "sys", IDENTITY).await?;
    let sessions: Vec<SessionRow> = client.get("/v1/sessions", &[]).await?;
    let linked: BTreeSet<&str> = sessions
        .iter()
        .filter(|session| matches!(&*session.kind, "link" | "relayed") && session.established)
        .map(|session| session.name.as_str())
        .collect();
    let logs: Vec<LogRow> = client.get("/v1/logs", &[]).await?;
    let rows = enrolled.iter().filter_map(|entry| node(entry, &linked, &logs));
    let rows: Vec<NodeRow> =
        rows.filter(|row| args.node.as_ref().is_none_or(|name| *name == row.name)).collect();
    if let (Some(name), true) = (&args.node, rows.is_empty()) {
        return Err(Failure::not_found(format!("no node {name} is enrolled here")));
    }
    print(args.output, &rows, &["NAME", "LINKED", "GENERATION", "STREAMS", "ENROLLED"], |row| {
        let generation = row.generation.map_or_else(|| "?".to_owned(), |generation| generation.to_string());
        let enrolled = row.enrolled.clone().unwrap_or_else(|| "?".to_owned());
        vec![row.name.clone(), yes(row.linked), generation, row.streams.to_string(), enrolled]
    })
}

fn node(entry: &StateRow, linked: &BTreeSet<&str>, logs: &[LogRow]) -> Option<NodeRow> {
    let name = entry.key.strip_prefix(IDENTITY)?;
    let value = api::payload(&entry.value).ok()?;
    let value: serde_json::Value = serde_json::from_slice(&value).unwrap_or_default();
    Some(NodeRow {
        name: name.to_owned(),
        linked: linked.contains(name),
        generation: value["generation"].as_u64(),
        enrolled: value["enrolled_us"].as_u64().map(api::rfc3339),
        streams: logs.iter().filter(|log| log.node == name && log.stream != "down").count(),
    })
}

async fn sessions(client: &Client, args: &GetArgs) -> Outcome {
    let mut rows: Vec<SessionRow> = client.get("/v1/sessions", &[]).await?;
    rows.retain(|row| {
        args.node.as_ref().is_none_or(|node| matches!(&*row.kind, "link" | "relayed") && row.name == *node)
    });
    let heading = ["ID", "KIND", "NAME", "CONNECTED", "SUBSCRIPTIONS", "QUEUED"];
    print(args.output, &rows, &heading, |row| {
        let connected = match (row.connected, row.kind == "link" && !row.established) {
            (true, true) => "greeting".to_owned(),
            (connected, _) => yes(connected),
        };
        let name = if row.name.is_empty() { "-".to_owned() } else { row.name.clone() };
        let (subscriptions, queued) = (row.subscriptions.to_string(), human(row.queued_bytes as u64));
        vec![row.session.to_string(), row.kind.clone(), name, connected, subscriptions, queued]
    })
}

async fn streams(client: &Client, args: &GetArgs) -> Outcome {
    let query: Vec<(&str, &str)> = args.node.iter().map(|node| ("node", node.as_str())).collect();
    let rows: Vec<LogRow> = client.get("/v1/logs", &query).await?;
    let heading =
        ["NODE", "STREAM", "CLASS", "FIRST", "NEXT", "RECORDS", "BYTES", "QUOTA", "FULL-IN", "EPOCH"];
    print(args.output, &rows, &heading, |row| {
        let (node, stream, class) = (tier(&row.node), row.stream.clone(), row.class.clone());
        let (first, next, records) = (row.first.to_string(), row.next.to_string(), row.records.to_string());
        let full = row.seconds_to_full.map_or_else(|| "-".to_owned(), time_left);
        let (bytes, quota) = (human(row.bytes), human(row.max_bytes));
        vec![node, stream, class, first, next, records, bytes, quota, full, row.epoch.clone()]
    })
}

/// A time in its two greatest units.
fn time_left(seconds: u64) -> String {
    match seconds {
        0 => "now".to_owned(),
        1..60 => format!("{seconds}s"),
        60..3_600 => format!("{}m{}s", seconds / 60, seconds % 60),
        3_600..86_400 => format!("{}h{}m", seconds / 3_600, seconds % 3_600 / 60),
        _ => format!("{}d{}h", seconds / 86_400, seconds % 86_400 / 3_600),
    }
}

async fn conditions(client: &Client, args: &GetArgs) -> Outcome {
    let mut rows: Vec<ConditionRow> = client.get("/v1/conditions", &[]).await?;
    rows.retain(|row| args.node.as_ref().is_none_or(|node| row.subject == *node));
    print(args.output, &rows, &["CONDITION", "SUBJECT", "SINCE", "MESSAGE"], |row| {
        vec![row.kind.clone(), row.subject.clone(), row.since.clone(), row.message.clone()]
    })
}

/// A retained message.
#[derive(Debug, Serialize)]
struct RetainedRow {
    node: String,
    topic: String,
    #[serde(flatten)]
    entry: StateRow,
}

/// Of one node, or of every node that is heard of here.
async fn retained(client: &Client, args: &GetArgs) -> Outcome {
    let nodes = match &args.node {
        Some(node) => BTreeSet::from([node.clone()]),
        None => {
            let logs: Vec<LogRow> = client.get("/v1/logs", &[]).await?;
            let enrolled = entries(client, "", "sys", IDENTITY).await?;
            let enrolled =
                enrolled.iter().filter_map(|entry| entry.key.strip_prefix(IDENTITY).map(str::to_owned));
            logs.into_iter().map(|log| log.node).chain(enrolled).collect()
        }
    };
    let mut rows = Vec::new();
    for node in nodes {
        for entry in entries(client, &node, "retained", &args.prefix).await? {
            rows.push(RetainedRow { node: node.clone(), topic: entry.key.clone(), entry });
        }
    }
    print(args.output, &rows, &["NODE", "TOPIC", "TIME", "VALUE"], |row| {
        vec![tier(&row.node), row.topic.clone(), row.entry.time.clone(), value(&row.entry)]
    })
}

async fn state(client: &Client, args: &GetArgs) -> Outcome {
    let space = args.space.as_deref().unwrap_or_default();
    let rows = entries(client, args.node.as_deref().unwrap_or_default(), space, &args.prefix).await?;
    print(args.output, &rows, &["KEY", "REVISION", "TIME", "VALUE"], |row| {
        vec![row.key.clone(), row.revision.to_string(), row.time.clone(), value(row)]
    })
}

async fn entries(client: &Client, origin: &str, space: &str, prefix: &str) -> Outcome<Vec<StateRow>> {
    let query = [("origin", origin), ("space", space), ("prefix", prefix)];
    let mut lines = client.lines("/v1/state", &query).await?;
    let mut rows = Vec::new();
    while let Some(line) = lines.next().await? {
        rows.push(serde_json::from_slice(&line).map_err(Failure::failed)?);
    }
    Ok(rows)
}

fn print<T: Serialize>(
    output: Rows,
    rows: &[T],
    heading: &[&str],
    cells: impl Fn(&T) -> Vec<String>,
) -> Outcome {
    if output == Rows::Json {
        return output::json(&rows);
    }
    let mut table = Table::new(heading);
    for row in rows {
        table.row(cells(row));
    }
    table.print()
}

fn value(entry: &StateRow) -> String {
    api::payload(&entry.value).map_or_else(|_| "?".to_owned(), |bytes| output::preview(&bytes, PREVIEW))
}

fn tier(node: &str) -> String {
    if node.is_empty() { "(tier)".to_owned() } else { node.to_owned() }
}

fn yes(yes: bool) -> String {
    if yes { "yes" } else { "no" }.to_owned()
}

/// A size with one decimal.
#[allow(clippy::cast_precision_loss)] // one decimal
pub(crate) fn human(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut size = bytes as f64;
    let mut unit = 0;
    while size >= 1024.0 && unit + 1 < UNITS.len() {
        size /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{bytes}B") } else { format!("{size:.1}{}", UNITS[unit]) }
}

/// Samples of a page of metrics: name with labels, and value.
pub(crate) fn samples(page: &str) -> BTreeMap<&str, f64> {
    page.lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| line.rsplit_once(' '))
        .filter_map(|(name, value)| Some((name, value.parse().ok()?)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_one_decimal() {
        assert_eq!(human(17), "17B");
        assert_eq!(human(1536), "1.5KiB");
        assert_eq!(human(3 << 30), "3.0GiB");
    }

    #[test]
    fn samples_keep_their_labels() {
        let page = "# HELP a b\n# TYPE a gauge\na{x=\"1 2\"} 3\nb 4.5\n";
        assert_eq!(samples(page), BTreeMap::from([("a{x=\"1 2\"}", 3.0), ("b", 4.5)]));
    }
}
