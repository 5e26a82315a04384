//! `octobus log read`: from a running process, or from a folder that no process uses.

use std::{future::poll_fn, path::Path, sync::Arc};

use broker::{
    event::ReadRequest,
    store::{Recovered, SourceKind, Store as _, StoreEvent, lmdb},
};
use codec::{Filter, FrameView, Kind, Record, proto};
use ops::api::{self, Entry, Start};

use crate::{
    cli::{LogArgs, Messages, store_folder},
    exit::{Failure, Outcome},
    output,
};

/// Bytes of records read from the store at a time.
const PAGE_BYTES: usize = 1 << 20;

pub(crate) async fn read(args: &LogArgs) -> Outcome {
    match &args.admin {
        Some(socket) => from_process(args, socket).await,
        None => from_folder(args, args.data.as_deref().unwrap_or_else(|| Path::new("."))).await,
    }
}

async fn from_process(args: &LogArgs, socket: &Path) -> Outcome {
    let from = args.from.map(|from| match from.epoch {
        Some(epoch) => format!("{epoch:016x}:{}", from.seq),
        None => from.seq.to_string(),
    });
    let time = begins_at(args).map(api::rfc3339);
    let optional = [("stream", &args.stream), ("topic", &args.topic), ("from", &from), ("time", &time)];
    let mut query = vec![("node", args.node.as_str())];
    query.extend(optional.into_iter().filter_map(|(name, value)| Some((name, value.as_deref()?))));
    if args.follow {
        query.push(("follow", "true"));
    }
    let mut lines = ops::client::Client::new(socket).lines("/v1/log", &query).await?;
    while let Some(line) = lines.next().await? {
        if args.output == Messages::Json {
            output::line(&line)?;
        } else {
            print(&serde_json::from_slice(&line).map_err(Failure::failed)?, args.output)?;
        }
    }
    Ok(())
}

/// Microseconds since 1970 from which on records are wanted.
fn begins_at(args: &LogArgs) -> Option<u64> {
    let ago = args.since.map(|since| {
        broker::clock::wall_us().saturating_sub(u64::try_from(since.as_micros()).unwrap_or(u64::MAX))
    });
    args.from_time.or(ago)
}

/// Opens the store as a process does: it takes the folder's lock, and replays the journal.
async fn from_folder(args: &LogArgs, data: &Path) -> Outcome {
    let folder = store_folder(data);
    if !folder.is_dir() {
        return Err(Failure::not_found(format!("there is no folder {}", folder.display())));
    }
    let topic = args.topic.as_deref().map(Filter::parse).transpose().map_err(Failure::usage)?;
    let (store, recovered) = lmdb::open(&folder, lmdb::Options::node()).map_err(Failure::failed)?;
    let mut reader = Reader { store, read: 0 };
    let logs = logs(&recovered, args);
    if logs.is_empty() {
        let stream = args.stream.as_ref().map_or(String::new(), |stream| format!(" stream {stream:?} of"));
        return Err(Failure::not_found(format!(
            "{} holds no{stream} Log of node {:?}",
            folder.display(),
            args.node
        )));
    }
    for log in logs {
        reader.print(&log, args, topic.as_ref()).await?;
    }
    Ok(())
}

/// A Log in the folder.
#[derive(Debug)]
struct Log {
    source: u32,
    stream: Arc<str>,
    first: u64,
    last: u64,
    epoch: u64,
    /// What policy removed below `first`.
    removed: Vec<api::Gap>,
}

/// The Logs that were asked for, by name of their stream.
fn logs(recovered: &Recovered, args: &LogArgs) -> Vec<Log> {
    let wanted = |source: &&broker::store::Source| {
        source.kind == SourceKind::Log
            && *source.origin == *args.node
            && args.stream.as_ref().is_none_or(|stream| *source.name == **stream)
    };
    let mut logs: Vec<Log> = Vec::new();
    for source in recovered.sources.iter().filter(wanted) {
        if let Some(log) = recovered.logs.iter().find(|log| log.source == source.number) {
            let (first, last, epoch) = (log.first, log.last, log.last_epoch);
            let removed = removed(recovered, source.number);
            logs.push(Log {
                source: source.number,
                stream: Arc::clone(&source.name),
                first,
                last,
                epoch,
                removed,
            });
        }
    }
    logs.sort_by(|a, b| a.stream.cmp(&b.stream));
    logs
}

/// What a Log's table says of the records that are not there any more.
fn removed(recovered: &Recovered, source: u32) -> Vec<api::Gap> {
    let fact =
        |fact: &&broker::store::LocalFact| fact.kind == Kind::TABLE && *fact.key == source.to_be_bytes();
    let table = recovered.locals.iter().find(fact);
    let table =
        table.and_then(|fact| codec::decode::<proto::LogTable>(fact.value.clone()).ok()).unwrap_or_default();
    let mut from = table.epochs.first().map_or(1, |range| range.from);
    let mut gaps = Vec::new();
    for run in table.removed.iter().filter(|run| run.to < table.first) {
        let count = (run.to + 1).saturating_sub(from);
        gaps.push(api::Gap { from, to: run.to, count, reason: api::reason(run.reason()).to_owned() });
        from = run.to + 1;
    }
    gaps
}

struct Reader {
    store: lmdb::LmdbStore,
    read: u64,
}

impl Reader {
    async fn print(&mut self, log: &Log, args: &LogArgs, topic: Option<&Filter>) -> Outcome {
        let mut from = args.from.map_or(log.first, |from| from.seq);
        let mut begun = false;
        let since = begins_at(args);
        if args.from.is_none() && since.is_none() {
            for gap in &log.removed {
                let (node, stream, seq) = (args.node.clone(), log.stream.to_string(), gap.to);
                let epoch = format!("{:016x}", log.epoch);
                print(
                    &Entry::Gap(api::GapEntry { gap: gap.clone(), node, stream, epoch, seq }),
                    args.output,
                )?;
            }
        }
        while from <= log.last {
            let records = self.page(log.source, from).await?;
            if !begun {
                check_epoch(log, &records, args.from)?;
                begun = true;
            }
            for record in records.iter().filter(|record| !is_older(record, since)) {
                let Some(entry) = Entry::of(record, &args.node, &log.stream) else { continue };
                let shown = match (topic, entry.topic()) {
                    (Some(filter), Some(topic)) => filter.matches(topic, true),
                    _ => true,
                };
                if shown {
                    print(&entry, args.output)?;
                }
            }
            // A gap that removed nothing stands at the seq before its own.
            match records.iter().map(|record| record.header.seq).max() {
                Some(last) if last >= from => from = last + 1,
                _ => return Ok(()),
            }
        }
        if begun { Ok(()) } else { check_epoch(log, &[], args.from) }
    }

    async fn page(&mut self, source: u32, from: u64) -> Outcome<Vec<Record>> {
        self.read += 1;
        let read = self.read;
        self.store.read(ReadRequest { read, source, from, bytes_max: PAGE_BYTES, wanted: None });
        loop {
            match poll_fn(|cx| self.store.poll_event(cx)).await {
                StoreEvent::Read { read: done, records, .. } if done == read => return Ok(records),
                StoreEvent::Refused { reason, .. } => return Err(Failure::failed(reason)),
                _ => {}
            }
        }
    }
}

fn is_older(record: &Record, since: Option<u64>) -> bool {
    let time_us = || FrameView::parse(&record.body).map_or(u64::MAX, |view| view.time_us());
    record.header.kind == Kind::LOG && since.is_some_and(|since| time_us() < since)
}

/// A reader that continues in another epoch than it read before would take other records for its own.
fn check_epoch(log: &Log, records: &[Record], from: Option<Start>) -> Outcome {
    let Some(Start { epoch: Some(asked), seq }) = from else {
        return Ok(());
    };
    let found = records.first().map_or(log.epoch, |record| record.header.epoch);
    if found == asked {
        return Ok(());
    }
    Err(Failure::failed(format!(
        "stream {:?} stands in epoch {found:016x} at seq {seq}, not {asked:016x}: positions of the two cannot be \
         compared; read from 0 and look for the gap record with reason epoch-change",
        &*log.stream
    )))
}

fn print(entry: &Entry, output: Messages) -> Outcome {
    match (entry, output) {
        (entry, Messages::Json) => output::json(entry),
        (Entry::Gap(gap), Messages::Text) => {
            let api::Gap { from, to, count, reason } = &gap.gap;
            output::line(format!("{}  gap {from}..{to}: {count} records, {reason}", gap.stream).as_bytes())
        }
        (Entry::Gap(_), Messages::Raw) => Ok(()),
        (Entry::Record(record), output) => {
            let payload = api::payload(&record.payload).map_err(Failure::failed)?;
            if output == Messages::Raw {
                return output::line(&payload);
            }
            let shown = output::preview(&payload, 4096);
            let api::RecordEntry { stream, seq, time, topic, .. } = record;
            output::line(format!("{stream}  {seq}  {time}  {topic}  {shown}").as_bytes())
        }
    }
}
