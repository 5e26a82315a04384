//! Rewriting of segments that are mostly dead.
//!
//! A closed segment keeps its disk until nothing in it is alive: one old alarm keeps eight megabytes of
//! telemetry. So what is alive in such segments is copied to a new one, in five steps, each of which a crash
//! may follow:
//!
//! 1. the survivors are written to a temporary file (a crash: the next start removes it);
//! 2. the file is synced and gets its name (a crash: no index entry points to it, the next start removes it);
//! 3. the index entries move to it in one commit;
//! 4. from here on nothing points to the old segments, and they are freed like any other dead segment (a
//!    crash: the next start frees them).
//!
//! Nothing is renamed over a file that is in use: a reader that holds an entry from before the third step
//! reads the old segment, or finds it freed and looks again.
//!
//! Survivors are Log records and gaps that an index entry claims. All else is in the checkpoint by now, or was
//! dropped. What an entry does not claim does not come back by being copied, so a run that is cut while its
//! segment is copied needs no care.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs::File,
    io,
    ops::ControlFlow,
};

use codec::{Kind, Record};

use super::{
    checkpoint::{Live, Move},
    segments::Segments,
    topics::Topics,
};
use crate::store::{
    facts::Span,
    journal::{
        Place,
        format::{REWRITTEN, segment_name},
        rewrite::Rewrite,
        scan::{self, Segment},
    },
};

/// Survivors that were copied.
#[derive(Debug)]
pub(super) struct Copied {
    /// Durable under its name; `None` if nothing survived.
    pub(super) new: Option<Segment>,
    /// Where each index entry's records are now.
    pub(super) moves: Vec<Move>,
}

/// Why survivors were not copied.
#[derive(Debug, thiserror::Error)]
#[error("copying of segment {segment:x}: {error}")]
pub(super) struct CopyError {
    pub(super) segment: u64,
    /// The segment is damaged: it will not be better the next time.
    pub(super) is_damage: bool,
    pub(super) error: io::Error,
}

/// How long each segment's live bytes have stood still.
#[derive(Debug, Default)]
pub(super) struct Settled(HashMap<u64, (u64, u32)>);

impl Settled {
    /// A checkpoint was written.
    pub(super) fn observe(&mut self, closed: &[Segment], live: &BTreeMap<u64, Live>) {
        let mut now = HashMap::with_capacity(closed.len());
        for number in closed.iter().map(|segment| segment.header.number) {
            let bytes = live.get(&number).map_or(0, |live| live.bytes);
            let checkpoints = match self.0.get(&number) {
                Some((before, checkpoints)) if *before == bytes => checkpoints.saturating_add(1),
                _ => 0,
            };
            now.insert(number, (bytes, checkpoints));
        }
        self.0 = now;
    }

    fn checkpoints(&self, number: u64) -> u32 {
        self.0.get(&number).map_or(0, |(_, checkpoints)| *checkpoints)
    }
}

/// Which of the closed segments are worth rewriting together, in the order of their records; none if nothing
/// pays. What comes of them is no larger than a segment.
pub(super) fn choose(
    closed: &[Segment],
    live: &BTreeMap<u64, Live>,
    settled: &Settled,
    rewrite_after: u32,
    segment_bytes: u64,
) -> Vec<Segment> {
    let live_bytes = |segment: &Segment| live.get(&segment.header.number).map_or(0, |live| live.bytes);
    let is_alive = |segment: &&Segment| live.get(&segment.header.number).is_some_and(|live| live.entries > 0);
    let is_small = |segment: &Segment| {
        segment.header.number & REWRITTEN != 0 && segment.bytes <= segment_bytes / SMALL_SHARE
    };
    let is_half_dead = |segment: &Segment| {
        live_bytes(segment) <= segment.bytes / 2
            && settled.checkpoints(segment.header.number) >= rewrite_after
    };
    let mut chosen: Vec<Segment> = closed
        .iter()
        .filter(is_alive)
        .filter(|segment| !is_small(segment) && is_half_dead(segment))
        .copied()
        .collect();
    if chosen.is_empty() {
        chosen.extend(closed.iter().filter(is_alive).filter(|segment| is_small(segment)));
        if chosen.len() < SMALL_MANY {
            return Vec::new();
        }
    }
    chosen.sort_by_key(|segment| segment.header.first_lsn);
    let mut bytes = 0;
    let fits = chosen.iter().take_while(|segment| {
        bytes += live_bytes(segment);
        bytes <= segment_bytes
    });
    let fits = fits.count().max(1);
    chosen.truncate(fits);
    chosen
}

/// Copies what the runs claim out of the old segments. Calls `breathe` after every so many bytes that were
/// read; stops if that says so.
///
/// `None` if it was stopped. On an error nothing remains but a temporary file.
pub(super) fn copy(
    segments: &Segments,
    store_id: [u8; 16],
    old: &[Segment],
    runs: Vec<(u32, super::index::Key, super::index::Run)>,
    breathe: &mut dyn FnMut() -> ControlFlow<()>,
) -> Result<Option<Copied>, CopyError> {
    let number = segments.next_rewritten();
    let of_new = |error| CopyError { segment: number, is_damage: false, error };
    let mut rewrite = Rewrite::begin(&segments.dir, store_id, number).map_err(of_new)?;
    let mut moves: Vec<Move> = runs
        .into_iter()
        .map(|(source, key, run)| Move { source, key, run, to: None, bytes: 0, topics: Topics::default() })
        .collect();
    let order: HashMap<u64, usize> =
        old.iter().enumerate().map(|(at, segment)| (segment.header.number, at)).collect();
    moves.sort_unstable_by_key(|planned| (order[&planned.run.place.segment], planned.run.place.offset));
    let mut rest = &mut moves[..];
    for segment in old {
        let count = rest
            .partition_point(|planned| order[&planned.run.place.segment] <= order[&segment.header.number]);
        let (of_segment, others) = rest.split_at_mut(count);
        rest = others;
        let copied = copy_segment(segments, segment, of_segment, &mut rewrite, breathe);
        match copied {
            Ok(ControlFlow::Continue(())) => {}
            Ok(ControlFlow::Break(())) => {
                rewrite.abandon();
                return Ok(None);
            }
            Err(error) => {
                rewrite.abandon();
                let segment = segment.header.number;
                return Err(CopyError { segment, is_damage: scan::is_damage(&error), error });
            }
        }
    }
    let any = moves.iter().any(|planned| planned.to.is_some());
    let new = if any {
        Some(rewrite.finish().map_err(of_new)?)
    } else {
        rewrite.abandon();
        None
    };
    moves.sort_unstable_by_key(|planned| (planned.source, planned.key));
    Ok(Some(Copied { new, moves }))
}

/// `moves` are those of this segment, by offset.
fn copy_segment(
    segments: &Segments,
    segment: &Segment,
    moves: &mut [Move],
    rewrite: &mut Rewrite,
    breathe: &mut dyn FnMut() -> ControlFlow<()>,
) -> io::Result<ControlFlow<()>> {
    let file = File::open(segments.dir.join(segment_name(segment.header.number)))?;
    let (mut end, mut read) = (0, 0);
    // Those whose places reach over what is read now, by source.
    let mut reaching: HashMap<u32, Vec<usize>> = HashMap::new();
    let mut entered = 0;
    for at in 0..moves.len() {
        let place = moves[at].run.place;
        if place.len == 0 {
            // It stands for records that are lost, and goes on telling so.
            return Err(io::ErrorKind::InvalidData.into());
        }
        let from = place.offset.max(end);
        if place.offset + place.len <= from {
            continue;
        }
        end = place.offset + place.len;
        let mut groups = Vec::new();
        scan::read_groups(
            &file,
            segment.header.salt,
            from,
            (end - from) as usize,
            &mut |offset, lsn, records| {
                groups.push((offset, lsn, records));
            },
        )?;
        for (offset, lsn, records) in groups {
            while let Some(planned) = moves.get(entered).filter(|planned| planned.run.place.offset <= offset)
            {
                let of_source = reaching.entry(planned.source).or_default();
                of_source.retain(|at| moves[*at].run.place.offset + moves[*at].run.place.len > offset);
                of_source.push(entered);
                entered += 1;
            }
            copy_group(rewrite, lsn, offset, scan::split(records), moves, &reaching)?;
        }
        read += end - from;
        if read >= BREATHE_BYTES {
            read = 0;
            if breathe().is_break() {
                return Ok(ControlFlow::Break(()));
            }
        }
    }
    Ok(ControlFlow::Continue(()))
}

/// Copies what is claimed of one group.
fn copy_group(
    rewrite: &mut Rewrite,
    lsn: u64,
    offset: u64,
    records: impl Iterator<Item = Record>,
    moves: &mut [Move],
    reaching: &HashMap<u32, Vec<usize>>,
) -> io::Result<()> {
    let (mut kept, mut claimed_by) = (Vec::new(), BTreeSet::new());
    for record in records {
        let Some(span) = Span::of(&record) else { continue };
        let candidates = reaching.get(&record.header.source).map_or(&[][..], Vec::as_slice);
        let claimant = candidates.iter().copied().find(|at| claims(&moves[*at], offset, &record, span));
        if let Some(at) = claimant {
            let bytes = u32::try_from(record.wire_len()).expect("bodies are bounded by FRAME_MAX");
            moves[at].bytes = moves[at].bytes.saturating_add(bytes);
            if record.header.kind == Kind::LOG {
                moves[at].topics.add(&record);
            }
            claimed_by.insert(at);
            kept.push(record);
        }
    }
    if kept.is_empty() {
        return Ok(());
    }
    let place = rewrite.push(lsn, &kept)?;
    for at in claimed_by {
        let to = moves[at].to.get_or_insert(place);
        *to = Place { len: place.offset + place.len - to.offset, ..*to };
    }
    Ok(())
}

fn claims(planned: &Move, offset: u64, record: &Record, span: Span) -> bool {
    let place = planned.run.place;
    let is_gap = record.header.kind == Kind::GAP;
    (place.offset..place.offset + place.len).contains(&offset)
        && planned.run.gap == is_gap
        && if is_gap {
            planned.key == (span.start, span.order)
        } else {
            (planned.key.0..=planned.run.last).contains(&span.start)
        }
}

/// Bytes read between two breaths.
const BREATHE_BYTES: u64 = 1 << 20;
/// A rewritten segment is small if it is no more than this part of a segment: it waits for others.
const SMALL_SHARE: u64 = 8;
/// So many small ones become one.
const SMALL_MANY: usize = 8;
