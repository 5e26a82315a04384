//! Examines a store that nobody uses, and changes nothing in it but what a start removes: unfinished files.
//!
//! Checked is what a reader or a restart would rely on: that each segment is this store's and its groups are
//! whole, that the records stand where the index says, each seq once, that State and facts can be read, and
//! that no cursor is beyond its Log.

use std::{collections::BTreeMap, fs::File, io, path::Path};

use codec::{Kind, proto};
use serde::Serialize;

use super::{
    Checkpoint, MAP_BYTES, MAP_BYTES_MAX, compact, io_error, lock, overlay, overlay::Overlay, recover,
};
use crate::store::{
    OpenError, Recovered, SourceKind,
    facts::{self, Span},
    journal::{
        format::segment_name,
        scan::{self, Seen},
    },
};

/// What was examined and found.
#[derive(Debug, Default, Serialize)]
pub struct Report {
    /// Segments of the journal.
    pub segments: u64,
    /// Groups above the checkpoint, which the next start replays.
    pub groups: u64,
    /// Logs.
    pub logs: u64,
    /// Records of Logs, gaps included.
    pub records: u64,
    /// State entries, tombstones included.
    pub state: u64,
    /// Cursors, sessions, packet ids, marks and tables.
    pub facts: u64,
    /// What is wrong, one sentence each.
    pub problems: Vec<String>,
}

/// Examines the store in this folder.
///
/// # Errors
/// It is in use, or there is none.
pub fn check(path: &Path) -> Result<Report, OpenError> {
    let (journal, data) = (path.join("journal"), path.join("checkpoint"));
    for part in [&journal, &data.join("data.mdb")] {
        std::fs::metadata(part).map_err(|source| io_error("find", part, source))?;
    }
    let _lock = lock(path)?;
    let mut report = Report::default();
    if let Some(what) = super::damage_of(&data)? {
        report.problems.push(format!("checkpoint: {what}"));
        return Ok(report);
    }
    let (checkpoint, summary) = match Checkpoint::open(&data, MAP_BYTES, MAP_BYTES_MAX, [0; 16]) {
        Ok(opened) => opened,
        Err(error) => {
            report.problems.push(error.to_string());
            return Ok(report);
        }
    };
    report.problems.extend(summary.lost.iter().map(|(what, _)| format!("checkpoint: {what}")));
    let mut overlay = Overlay::new(summary.ends);
    let scanned = scan::scan(&journal, summary.applied, &mut |seen| match seen {
        Seen::Group(found) => {
            report.groups += 1;
            overlay.apply(found.lsn, found.place, scan::split(found.records).map(compact));
        }
        Seen::Damaged(damaged) if damaged.is_new => overlay.lose(damaged.place),
        Seen::Damaged(_) => {}
    });
    let found = match scanned {
        Ok(found) => found,
        Err(error) => {
            report.problems.push(error.to_string());
            return Ok(report);
        }
    };
    for damaged in &found.damage {
        let (name, offset) = (segment_name(damaged.place.segment), damaged.place.offset);
        report.problems.push(format!("segment {name} is damaged at byte {offset}: {}", damaged.what));
    }
    let mut salts = BTreeMap::new();
    for segment in found.segments.iter().chain(&found.rewritten) {
        report.segments += 1;
        salts.insert(segment.header.number, segment.header.salt);
        if segment.header.store_id != summary.store_id {
            let name = segment_name(segment.header.number);
            report.problems.push(format!("segment {name} belongs to another store"));
        }
    }
    let unreadable = |error: super::checkpoint::Error| format!("checkpoint: {error}");
    match recover(&checkpoint, &overlay, overlay.active.last_lsn.max(summary.applied)) {
        Err(error) => report.problems.push(unreadable(error)),
        Ok(recovered) => examine(&recovered, &mut report),
    }
    for source in overlay.ends.keys() {
        report.logs += 1;
        if let Err(error) = check_log(&checkpoint, &overlay, (&journal, &salts), *source, &mut report) {
            report.problems.push(unreadable(error));
        }
    }
    Ok(report)
}

/// Every index entry points to whole groups that hold what it claims.
fn check_log(
    checkpoint: &Checkpoint,
    overlay: &Overlay,
    (journal, salts): (&Path, &BTreeMap<u64, u64>),
    source: u32,
    report: &mut Report,
) -> super::checkpoint::Result<()> {
    let (_, mut runs, _) = checkpoint.runs(source, 0, usize::MAX)?;
    if let Some(changes) = overlay.active.logs.get(&source) {
        changes.apply(&mut runs, overlay::END);
    }
    let mut covered = 0;
    for ((start, order), run) in runs {
        let name = segment_name(run.place.segment);
        let at =
            format!("Log {source}, seq {start} to {} in segment {name} at {}", run.last, run.place.offset);
        let mut seqs = Vec::new();
        let read = File::open(journal.join(&name)).and_then(|file| {
            let salt = *salts.get(&run.place.segment).ok_or(io::ErrorKind::NotFound)?;
            scan::read_groups(&file, salt, run.place.offset, run.place.len as usize, &mut |_, _, records| {
                for record in scan::split(records).filter(|record| record.header.source == source) {
                    let Some(span) = Span::of(&record) else { continue };
                    let claimed = if run.gap {
                        (span.start, span.order) == (start, order) && record.header.kind == Kind::GAP
                    } else {
                        record.header.kind == Kind::LOG && (start..=run.last).contains(&span.start)
                    };
                    if claimed {
                        seqs.push(span.start);
                        if record.header.kind == Kind::LOG && codec::FrameView::parse(&record.body).is_err() {
                            report.problems.push(format!("{at}: the frame at {} cannot be read", span.start));
                        }
                    }
                }
            })
        });
        if let Err(error) = read {
            report.problems.push(format!("{at}: {error}"));
            continue;
        }
        seqs.sort_unstable();
        seqs.dedup();
        report.records += seqs.len() as u64;
        let complete = match (seqs.first(), seqs.last()) {
            (Some(first), Some(last)) => *first == start && (run.gap || *last == run.last),
            _ => false,
        };
        if !complete {
            report.problems.push(format!("{at}: its groups do not hold what the index says"));
        }
        if order == facts::FULL {
            if start <= covered {
                report.problems.push(format!("{at}: what is up to {covered} is there twice"));
            }
            covered = run.last;
        }
    }
    Ok(())
}

/// State and facts can be read, and fit together.
fn examine(recovered: &Recovered, report: &mut Report) {
    let kinds: BTreeMap<u32, SourceKind> =
        recovered.sources.iter().map(|source| (source.number, source.kind)).collect();
    let lasts: BTreeMap<u32, u64> = recovered.logs.iter().map(|log| (log.source, log.last)).collect();
    report.state = recovered.state.len() as u64;
    report.facts = recovered.locals.len() as u64;
    for record in &recovered.state {
        let key = facts::state_key(record).unwrap_or_default();
        let key = String::from_utf8_lossy(&key);
        if kinds.get(&record.header.source) != Some(&SourceKind::State) {
            report.problems.push(format!("State {key}: source {} is no space", record.header.source));
        }
        if codec::FrameView::parse(&record.body).is_err() {
            report.problems.push(format!("State {key}: its frame cannot be read"));
        }
    }
    for log in &recovered.logs {
        if kinds.get(&log.source) != Some(&SourceKind::Log) {
            report.problems.push(format!("source {} is no Log, and has records", log.source));
        }
    }
    for fact in &recovered.locals {
        let value = fact.value.clone();
        let readable = match fact.kind {
            Kind::CURSOR => match codec::decode::<proto::Cursor>(value) {
                Ok(cursor) => {
                    let number = fact.key.last_chunk().map(|raw| u32::from_be_bytes(*raw));
                    let last = number.and_then(|number| lasts.get(&number)).copied().unwrap_or(0);
                    if cursor.low > last || cursor.acked.iter().any(|seq| *seq > last) {
                        let whose = String::from_utf8_lossy(&fact.key);
                        let whose = whose.split('\0').next().unwrap_or_default();
                        let found =
                            format!("the cursor of {whose:?} is at {}, its Log ends at {last}", cursor.low);
                        report.problems.push(found);
                    }
                    true
                }
                Err(_) => false,
            },
            Kind::SESSION => codec::decode::<proto::ClientSession>(value).is_ok(),
            Kind::MARK => codec::decode::<proto::Mark>(value).is_ok(),
            Kind::TABLE => codec::decode::<proto::LogTable>(value).is_ok(),
            _ => true,
        };
        if !readable {
            report.problems.push(format!("a fact of kind {} cannot be read", fact.kind.0));
        }
    }
}
