//! Logs: which there are, and reading them page by page.

use std::{sync::Arc, time::Duration};

use axum::{
    Json,
    extract::{Query, State},
    http::StatusCode,
    response::Response,
};
use broker::{
    Handle, clock, event,
    event::{Command, LogInfo, Origin},
};
use codec::{Filter, Record};
use serde::Deserialize;

use super::{
    Admin, Refusal,
    stream::{self, Gone, Lines},
    unexpected,
};
use crate::api::{Entry, LogRow, Start, parse_time};

/// Bytes of records in one page: what a slow reader makes us hold, beside the lines themselves.
const PAGE_BYTES: usize = 128 << 10;
/// A follower looks for new records this often.
const FOLLOW_PERIOD: Duration = Duration::from_millis(200);

#[derive(Debug, Deserialize)]
pub(super) struct ListQuery {
    node: Option<String>,
}

pub(super) async fn list(
    State(admin): State<Admin>,
    Query(query): Query<ListQuery>,
) -> Result<Json<Vec<LogRow>>, Refusal> {
    let logs = logs_of(&admin.broker, query.node.as_deref()).await?;
    Ok(Json(logs.iter().map(LogRow::from).collect()))
}

#[derive(Debug, Deserialize)]
pub(super) struct ReadQuery {
    node: String,
    stream: Option<String>,
    from: Option<String>,
    /// RFC 3339: only what entered the bus at this time or later.
    time: Option<String>,
    topic: Option<String>,
    #[serde(default)]
    follow: bool,
}

/// Streams of one node, one after the other, from `from` or their oldest record to where they end now;
/// with `follow`, one stream without end.
pub(super) async fn read(
    State(admin): State<Admin>,
    Query(query): Query<ReadQuery>,
) -> Result<Response, Refusal> {
    let topic = query.topic.as_deref().map(Filter::parse).transpose();
    let topic = topic.map_err(|error| Refusal::bad(format!("topic: {error}")))?;
    let from = query.from.as_deref().map(str::parse::<Start>).transpose();
    let from = from.map_err(|error| Refusal::bad(format!("from: {error}")))?;
    if query.stream.is_none() && (from.is_some() || query.follow) {
        return Err(Refusal::bad("from and follow need one stream: name it"));
    }
    let since = query.time.as_deref().map(parse_time).transpose();
    let since = since.map_err(|error| Refusal::bad(format!("time: {error}")))?;
    if from.is_some() && since.is_some() {
        return Err(Refusal::bad("from and time exclude each other: name one of them"));
    }
    let follow = query.follow;
    let mut logs = logs_of(&admin.broker, Some(&query.node)).await?;
    if let Some(stream) = &query.stream {
        logs.retain(|log| *log.stream == **stream);
    }
    if logs.is_empty() {
        return Err(Refusal::not_found(no_log(&query)));
    }
    if let Some(from) = from {
        // A position belongs to one history: the one it names, else the current.
        let named = from.epoch.and_then(|epoch| logs.iter().position(|log| log.epoch == epoch));
        logs.drain(..named.unwrap_or(logs.len() - 1));
        check_epoch(&admin.broker, &logs[0], from).await?;
    } else if follow {
        logs.drain(..logs.len() - 1);
    }
    let Admin { broker, tasks, .. } = admin;
    Ok(stream::ndjson(&tasks, "admin log", move |mut lines| async move {
        for (index, log) in logs.iter().enumerate() {
            let reader = Reader { broker: &broker, log, topic: topic.as_ref() };
            let seq = match (from.filter(|_| index == 0), since) {
                (Some(from), _) => from.seq,
                (None, Some(time_us)) => seek(&broker, log, time_us).await.unwrap_or(log.next),
                // What policy removed at the front is told too.
                (None, None) => log.begin,
            };
            let seq = reader.copy(seq, log.next, &mut lines).await?;
            if follow {
                reader.follow(seq, &mut lines).await?;
            }
        }
        lines.flush().await
    }))
}

fn no_log(query: &ReadQuery) -> String {
    match &query.stream {
        Some(stream) => format!("there is no stream {stream:?} of node {:?} here", query.node),
        None => format!("there is no Log of node {:?} here", query.node),
    }
}

/// A reader that continues in another epoch than it read before would take other records for its own.
async fn check_epoch(broker: &Handle, log: &LogInfo, from: Start) -> Result<(), Refusal> {
    let Some(asked) = from.epoch else {
        return Ok(());
    };
    let (records, _next) = page(broker, log, from.seq, 1).await?;
    let found = records.first().map_or(log.epoch, |record| record.header.epoch);
    if found == asked {
        return Ok(());
    }
    let message = format!(
        "stream {:?} stands in epoch {found:016x} at seq {}, not {asked:016x}: positions of the two cannot be \
         compared; read from 0 and look for the gap record with reason epoch-change",
        &*log.stream, from.seq
    );
    Err(Refusal::new(StatusCode::CONFLICT, message))
}

struct Reader<'a> {
    broker: &'a Handle,
    log: &'a LogInfo,
    topic: Option<&'a Filter>,
}

impl Reader<'_> {
    /// Writes `[from, end)` and returns where to read on.
    async fn copy(&self, mut from: u64, end: u64, lines: &mut Lines) -> Result<u64, Gone> {
        while from < end {
            let Ok((records, next)) = page(self.broker, self.log, from, PAGE_BYTES).await else {
                return Ok(from);
            };
            for record in records.iter().filter(|record| record.header.seq < end) {
                self.write(record, lines).await?;
            }
            if records.is_empty() || next <= from {
                return Ok(from.max(next));
            }
            from = next;
        }
        Ok(from)
    }

    /// Writes what is appended from `from` on, until the reader hangs up.
    async fn follow(&self, mut from: u64, lines: &mut Lines) -> Result<(), Gone> {
        let mut ticks = clock::every(FOLLOW_PERIOD);
        loop {
            from = self.copy(from, u64::MAX, lines).await?;
            lines.flush().await?;
            tokio::select! {
                biased;
                () = lines.gone() => return Err(Gone),
                _at = ticks.tick() => {}
            }
        }
    }

    async fn write(&self, record: &Record, lines: &mut Lines) -> Result<(), Gone> {
        let Some(entry) = Entry::of(record, &self.log.origin, &self.log.stream) else {
            return Ok(());
        };
        // A gap may have held what the filter asks for, so it is always shown.
        let wanted = match (self.topic, entry.topic()) {
            (Some(filter), Some(topic)) => filter.matches(topic, true),
            _ => true,
        };
        if wanted { lines.line(&entry).await } else { Ok(()) }
    }
}

async fn page(
    broker: &Handle,
    log: &LogInfo,
    from: u64,
    bytes_max: usize,
) -> Result<(Vec<Record>, u64), Refusal> {
    let (origin, stream) = (Arc::clone(&log.origin), Arc::clone(&log.stream));
    let epoch = Some(log.epoch);
    match broker.call(Command::LogRead { origin, stream, epoch, from, bytes_max }).await? {
        event::Response::Records { records, next } => Ok((records, next)),
        other => Err(unexpected(other)),
    }
}

/// Where a Log reaches a time.
async fn seek(broker: &Handle, log: &LogInfo, time_us: u64) -> Result<u64, Refusal> {
    let (origin, stream) = (Arc::clone(&log.origin), Arc::clone(&log.stream));
    match broker.call(Command::LogSeek { origin, stream, epoch: Some(log.epoch), time_us }).await? {
        event::Response::Place(seq) => Ok(seq),
        other => Err(unexpected(other)),
    }
}

async fn logs_of(broker: &Handle, node: Option<&str>) -> Result<Vec<LogInfo>, Refusal> {
    let origin: Option<Origin> = node.map(Arc::from);
    match broker.call(Command::LogList { origin }).await? {
        event::Response::Logs(logs) => Ok(logs),
        other => Err(unexpected(other)),
    }
}
