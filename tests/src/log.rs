//! What `octobus log read -o json` prints.

use std::{collections::BTreeMap, path::Path};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde_json::Value;

use crate::octobus::octobus;

/// One line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Line {
    /// A message.
    Record(Record),
    /// What a policy removed, or a change of epoch.
    Gap {
        /// Name of the stream.
        stream: String,
        /// First seq removed.
        from: u64,
        /// Last seq removed; less than `from` if nothing was.
        to: u64,
        /// Why.
        reason: String,
    },
}

/// A message in a Log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Name of the stream.
    pub stream: String,
    /// Epoch as printed.
    pub epoch: String,
    /// Number in the stream.
    pub seq: u64,
    /// Topic.
    pub topic: String,
    /// Payload.
    pub payload: Vec<u8>,
}

/// Where to read from.
#[derive(Debug, Clone, Copy)]
pub enum From<'a> {
    /// A running process.
    Admin(&'a Path),
    /// A data folder that nobody uses.
    Data(&'a Path),
}

/// Reads every stream of a node; nothing if it has none yet.
///
/// # Panics
/// If the command fails or prints what cannot be understood.
#[must_use]
pub fn read(from: From<'_>, node: &str, more: &[&str]) -> Vec<Line> {
    let (flag, path) = match from {
        From::Admin(path) => ("--admin", path),
        From::Data(path) => ("--data", path),
    };
    let path = path.to_str().expect("a UTF-8 path");
    let args = [&["log", "read", flag, path, "--node", node, "-o", "json"], more].concat();
    let done = octobus(&args);
    if done.status.code() == Some(3) {
        return Vec::new(); // "not found": a Log begins with its first record
    }
    let lines = done.ok();
    lines.iter().map(|line| parse(line).unwrap_or_else(|| panic!("not a line of a log: {line}"))).collect()
}

/// Only the messages.
#[must_use]
pub fn records(lines: &[Line]) -> Vec<Record> {
    let record = |line: &Line| match line {
        Line::Record(record) => Some(record.clone()),
        Line::Gap { .. } => None,
    };
    lines.iter().filter_map(record).collect()
}

/// Every seq of a stream is either a message or in a gap, once, in order.
///
/// # Panics
/// If not, naming the place.
pub fn assert_no_silent_loss(lines: &[Line]) {
    let mut next: BTreeMap<&str, u64> = BTreeMap::new();
    for line in lines {
        let (stream, from, to) = match line {
            Line::Record(record) => (&record.stream, record.seq, record.seq),
            Line::Gap { stream, from, to, .. } => (stream, *from, *to),
        };
        if to < from {
            continue; // a change of epoch removes nothing
        }
        let expected = next.insert(stream, to + 1).unwrap_or(from);
        assert_eq!(from, expected, "stream {stream} goes on at {from} instead of {expected}");
    }
}

fn parse(line: &str) -> Option<Line> {
    let value: Value = serde_json::from_str(line).ok()?;
    let text = |value: &Value| match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    let stream = value["stream"].as_str()?.to_owned();
    if let Some(gap) = value.get("gap").filter(|gap| gap.is_object()) {
        let reason = text(&gap["reason"]);
        return Some(Line::Gap { stream, from: gap["from"].as_u64()?, to: gap["to"].as_u64()?, reason });
    }
    Some(Line::Record(Record {
        stream,
        epoch: text(&value["epoch"]),
        seq: value["seq"].as_u64()?,
        topic: value["topic"].as_str()?.to_owned(),
        payload: STANDARD.decode(value["payload"].as_str()?).ok()?,
    }))
}
