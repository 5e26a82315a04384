//! What this replica has to write for each of its nodes, and what is to be asked of NATS for it. No I/O.
//!
//! A lane is one node: its groups are told durable in their order, and none waits for another node's. Within a lane
//! each Log has one message on its way, and so has the node's State as a whole. Operations go out by
//! [`Lanes::take_op`] and come back by [`Lanes::done`]; what comes back for an adoption that is over is nobody's.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use broker::event::{
    Group, Lsn, Origin, SessionId,
    tier::{Adopt, AdoptedLog, AdoptedSpace, Adoption, Ask, DownLog, News, come_again},
};
use codec::{Kind, Record, batch, proto};

use super::{
    log::{self, Append, LogWriter},
    message::{End, LogPlace, Message, Summary},
    state::{self, Put, StateWriter},
};

/// What did not happen is tried again after this long.
const RETRY: Duration = Duration::from_millis(200);
/// A full stream is tried again after this long.
const FULL_RETRY: Duration = Duration::from_secs(1);
/// Messages older than this are on the servers' disks, seconds: nodes keep what they sent for as long.
const FLUSHED_S: u64 = 300;
/// Looks at the ends of Logs after a disturbance follow each other like this.
const LOOK_EVERY: Duration = Duration::from_micros(100);
/// A node that was fenced for what it wrote comes again after this long: its position is looked up anew.
const FENCED_RETRY_MS: u32 = 200;

/// A claim, as whoever makes it knows it.
pub(super) type Held = u64;

/// An operation on NATS.
#[derive(Debug)]
pub(super) struct Op {
    pub(super) token: Token,
    /// Not before this long from now.
    pub(super) delay: Duration,
    pub(super) what: What,
}

/// Whose an operation is.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Token {
    pub(super) node: Origin,
    /// Counts adoptions.
    life: u64,
    part: Part,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Part {
    Node,
    Log(Arc<str>),
    State,
    /// A tombstone of a sweep, in place of this revision.
    Sweep(u64),
    /// Nobody waits for it.
    Nothing,
}

/// What to do.
#[derive(Debug)]
pub(super) enum What {
    /// Claim a node, and read where it stands.
    Adopt(Box<Adopt>),
    /// Give a claim back; first write where the node stood, if that is not written.
    Release { held: Held, summary: Option<Put> },
    /// Whether a claim is the newest, by the bucket itself.
    StillOurs { held: Held },
    /// Append to a Log.
    Append { stream: Arc<str>, append: Append },
    /// Read a Log's last message.
    Last { stream: Arc<str> },
    /// Write a key of a node.
    Put(Put),
    /// Read a key of a node.
    Get { key: String },
    /// Read the first entry below a key of a node from this sequence on.
    Sweep { below: String, from: u64 },
    /// Keep a record that no message of its kind can hold.
    Letter { stream: Arc<str>, record: Record, reason: String },
}

/// What came of an operation.
#[derive(Debug)]
pub(super) enum Outcome {
    Adopted(Result<Box<Standing>, proto::Refusal>),
    /// Of an append or a put: it happened, with this sequence.
    Written(u64),
    /// It did not: something else was written in between.
    Conflict,
    /// It did not, for now.
    Unavailable,
    /// It did not: the stream is full.
    Full,
    /// It did not, and never will.
    Refused(String),
    /// Perhaps.
    Unknown,
    /// Of a read: what is there.
    Found(Option<Message>, Option<String>),
    Ours(bool),
    /// Nobody waits for it.
    Nothing,
}

/// Where a node stands, as it was read when it was claimed.
#[derive(Debug, Default)]
pub(super) struct Standing {
    pub(super) held: Held,
    /// The last message of all of its keys.
    pub(super) summary: Option<Message>,
    /// Of each Log that was asked for: the oldest seq that the node holds, and where it ends, if it was read and
    /// there is anything.
    pub(super) logs: Vec<(Arc<str>, u64, Option<End>)>,
    pub(super) down: Option<DownLog>,
    /// How long a message of a Log stays at most; zero: for ever.
    pub(super) log_age: Duration,
    /// Wall time, seconds.
    pub(super) now_s: u64,
}

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct Lanes {
    lanes: BTreeMap<Origin, Lane>,
    sources: BTreeMap<u32, Named>,
    life: u64,
    payload_max: usize,
    /// Wall time, seconds: whoever does the operations keeps it.
    pub(super) now_s: u64,
    encoder: batch::Encoder,
    ops: VecDeque<Op>,
    news: VecDeque<News>,
    pub(super) counts: Counts,
}

/// Since the process started.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Counts {
    /// Messages of Logs that were written, and records in them.
    pub batches: u64,
    /// See `batches`.
    pub records: u64,
    /// Entries of State that were written.
    pub entries: u64,
    /// Writes that found another message than expected.
    pub conflicts: u64,
    /// Writes of which nobody knew whether they happened.
    pub unknown: u64,
    /// Records that turned out to be there.
    pub repeated: u64,
    /// Nodes that were let go because their Logs did not fit.
    pub fenced: u64,
    /// Writes that met a full stream.
    pub full: u64,
    /// Records that NATS can never hold.
    pub letters: u64,
}

#[derive(Debug, Clone)]
struct Named {
    origin: String,
    name: Arc<str>,
}

#[derive(Debug)]
struct Lane {
    life: u64,
    phase: Phase,
    sources: Vec<u32>,
    /// Groups that wait, with how many of their records do.
    groups: VecDeque<(Lsn, usize)>,
    logs: BTreeMap<Arc<str>, LogWriter>,
    state: StateWriter,
}

#[derive(Debug)]
enum Phase {
    Adopting(SessionId),
    Adopted(Held),
    /// It is to be let go: nothing is taken for it.
    Fenced(Held),
}

impl Lanes {
    pub(super) fn new(payload_max: usize) -> Self {
        Self {
            lanes: BTreeMap::new(),
            sources: BTreeMap::new(),
            life: 0,
            payload_max,
            now_s: 0,
            encoder: batch::Encoder::new(),
            ops: VecDeque::new(),
            news: VecDeque::new(),
            counts: Counts::default(),
        }
    }

    /// The next operation.
    pub(super) fn take_op(&mut self) -> Option<Op> {
        self.ops.pop_front()
    }

    /// The next thing to tell the core.
    pub(super) fn take_news(&mut self) -> Option<News> {
        self.news.pop_front()
    }

    /// The node whose `down` Log a source is.
    pub(super) fn down_of(&self, source: u32) -> Option<&str> {
        let named = self.sources.get(&source)?;
        named.name.strip_prefix("down/").filter(|_| named.origin.is_empty())
    }

    pub(super) fn ask(&mut self, ask: Ask) {
        self.life += 1;
        match ask {
            Ask::Adopt(adopt) => {
                let node = Arc::clone(&adopt.node);
                // Whatever an earlier adoption waits for is over; its claim goes over into the new one.
                self.forget(&node);
                let lane = Lane {
                    life: self.life,
                    phase: Phase::Adopting(adopt.session),
                    sources: Vec::new(),
                    groups: VecDeque::new(),
                    logs: BTreeMap::new(),
                    state: StateWriter::default(),
                };
                self.lanes.insert(Arc::clone(&node), lane);
                self.op(&node, Part::Node, What::Adopt(adopt), Duration::ZERO);
            }
            Ask::Release { node } => {
                let summary = self
                    .lanes
                    .get(&node)
                    .filter(|lane| lane.state.is_late && matches!(lane.phase, Phase::Adopted(_)));
                let summary = summary.map(|lane| lane.state.summary_put());
                let Some(lane) = self.forget(&node) else { return };
                if let Phase::Adopted(held) | Phase::Fenced(held) = lane.phase {
                    let token = Token { node, life: self.life, part: Part::Nothing };
                    let what = What::Release { held, summary };
                    self.ops.push_back(Op { token, delay: Duration::ZERO, what });
                }
            }
        }
    }

    fn forget(&mut self, node: &Origin) -> Option<Lane> {
        let lane = self.lanes.remove(node)?;
        for source in &lane.sources {
            self.sources.remove(source);
        }
        Some(lane)
    }

    fn op(&mut self, node: &Origin, part: Part, what: What, delay: Duration) {
        let life = self.lanes.get(node).map_or(0, |lane| lane.life);
        let token = Token { node: Arc::clone(node), life, part };
        self.ops.push_back(Op { token, delay, what });
    }

    // ---- groups ----

    pub(super) fn submit(&mut self, group: Group) {
        let node = group.lane;
        let mut parts = 0;
        let mut letters = Vec::new();
        let mut logs: Vec<Arc<str>> = Vec::new();
        for record in group.records {
            if record.header.kind == Kind::DECLARE {
                self.declared(&node, &record);
                continue;
            }
            let Some(lane) = self.lanes.get_mut(&node).filter(|lane| matches!(lane.phase, Phase::Adopted(_)))
            else {
                continue;
            };
            let named = self.sources.get(&record.header.source);
            match (record.header.kind, named) {
                (Kind::LOG | Kind::GAP, Some(named)) if named.origin.is_empty() => letters.push(record),
                (Kind::LOG | Kind::GAP, Some(named)) => {
                    if !lane.logs.contains_key(&named.name) {
                        lane.logs.insert(Arc::clone(&named.name), LogWriter::default());
                    }
                    let writer = lane.logs.get_mut(&named.name).expect("just there");
                    writer.push(group.lsn, record);
                    parts += 1;
                    if !logs.contains(&named.name) {
                        logs.push(Arc::clone(&named.name));
                    }
                }
                (Kind::PUT | Kind::TOMBSTONE | Kind::BARRIER, Some(named)) => {
                    lane.state.push(group.lsn, &named.name, record);
                    parts += 1;
                }
                (Kind::META, _) => {
                    if let Some((source, run)) = run_of(&record)
                        && let Some(named) = self.sources.get(&source)
                    {
                        lane.state.follow_run(&named.name, run);
                    }
                }
                _ => {} // facts of this process alone
            }
        }
        for record in letters {
            // The core puts aside what no broker can take; what it names it by is in the frame.
            self.letter(&node, "dead-letter".into(), record, "refused by the broker".to_owned());
        }
        match self.lanes.get_mut(&node) {
            Some(lane) if matches!(lane.phase, Phase::Fenced(_)) => return,
            Some(lane) if parts > 0 || !lane.groups.is_empty() => {
                lane.groups.push_back((group.lsn, parts));
            }
            _ => return self.news.push_back(News::Written { node, lsn: group.lsn }),
        }
        for stream in logs {
            self.go_on_with_log(&node, &stream);
        }
        self.go_on_with_state(&node);
        self.tell_written(&node);
    }

    fn declared(&mut self, node: &Origin, record: &Record) {
        let Ok(declare) = codec::decode::<proto::Declare>(record.body.clone()) else { return };
        let number = record.header.source;
        let named = Named { origin: declare.origin, name: declare.name.into() };
        let is_lanes = !named.origin.is_empty() || named.name.starts_with("down/");
        self.sources.insert(number, named);
        if let Some(lane) = self.lanes.get_mut(node).filter(|_| is_lanes) {
            lane.sources.push(number);
        }
    }

    /// These records are durable.
    fn settle(&mut self, node: &Origin, lsns: &[Lsn]) {
        let Some(lane) = self.lanes.get_mut(node) else { return };
        for lsn in lsns {
            if let Ok(at) = lane.groups.binary_search_by_key(lsn, |(lsn, _)| *lsn) {
                lane.groups[at].1 = lane.groups[at].1.saturating_sub(1);
            }
        }
        self.tell_written(node);
    }

    fn tell_written(&mut self, node: &Origin) {
        let Some(lane) = self.lanes.get_mut(node) else { return };
        let mut written = None;
        while lane.groups.front().is_some_and(|(_, left)| *left == 0) {
            written = lane.groups.pop_front();
        }
        if let Some((lsn, _)) = written {
            self.news.push_back(News::Written { node: Arc::clone(node), lsn });
        }
    }

    // ---- writers ----

    fn go_on_with_log(&mut self, node: &Origin, stream: &Arc<str>) {
        loop {
            let Some(writer) = self.lanes.get_mut(node).and_then(|lane| lane.logs.get_mut(stream)) else {
                return;
            };
            match writer.next(&mut self.encoder, self.payload_max) {
                log::Next::Nothing => return,
                log::Next::There(lsns) => {
                    self.counts.repeated += lsns.len() as u64;
                    self.settle(node, &lsns);
                }
                log::Next::Look => {
                    let what = What::Last { stream: Arc::clone(stream) };
                    return self.op(node, Part::Log(Arc::clone(stream)), what, Duration::ZERO);
                }
                log::Next::Append(append) => {
                    let what = What::Append { stream: Arc::clone(stream), append };
                    return self.op(node, Part::Log(Arc::clone(stream)), what, Duration::ZERO);
                }
                log::Next::Poison(record) => {
                    self.letter(
                        node,
                        Arc::clone(stream),
                        record,
                        "larger than any message may be".to_owned(),
                    );
                }
            }
        }
    }

    fn go_on_with_state(&mut self, node: &Origin) {
        loop {
            let Some(lane) = self.lanes.get_mut(node).filter(|lane| matches!(lane.phase, Phase::Adopted(_)))
            else {
                return;
            };
            let what = match lane.state.next() {
                state::Next::Nothing => return,
                state::Next::There(lsn) => {
                    self.counts.repeated += 1;
                    self.settle(node, &[lsn]);
                    continue;
                }
                state::Next::Put(put) => What::Put(put),
                state::Next::Sweep { below, from } => What::Sweep { below, from },
            };
            return self.op(node, Part::State, what, Duration::ZERO);
        }
    }

    fn letter(&mut self, node: &Origin, stream: Arc<str>, record: Record, reason: String) {
        self.counts.letters += 1;
        self.op(node, Part::Nothing, What::Letter { stream, record, reason }, Duration::ZERO);
    }

    /// The node is to say again what it has.
    fn fence(&mut self, node: &Origin, why: &str) {
        let Some(lane) = self.lanes.get_mut(node) else { return };
        let Phase::Adopted(held) = lane.phase else { return };
        lane.phase = Phase::Fenced(held);
        lane.groups.clear();
        lane.logs.clear();
        lane.state = StateWriter::default();
        self.counts.fenced += 1;
        let refusal = come_again(why, FENCED_RETRY_MS);
        self.news.push_back(News::Fenced { node: Arc::clone(node), refusal });
    }

    /// Another replica has the node now, or this one may have none.
    pub(super) fn lost(&mut self, node: &Origin) {
        if node.is_empty() {
            for node in self.lanes.keys().cloned().collect::<Vec<_>>() {
                self.lost(&node);
            }
            return;
        }
        self.fence(node, "another replica has taken this node, or this one has lost the tier");
    }

    /// The servers may have lost what they had not flushed: whatever was written of late, and what stood at an
    /// adoption, is looked at. A few at a time, because it may be much.
    pub(super) fn disturbed(&mut self) {
        let since_s = self.now_s.saturating_sub(FLUSHED_S);
        let mut due = Vec::new();
        for (node, lane) in &mut self.lanes {
            for (stream, writer) in &mut lane.logs {
                if matches!(lane.phase, Phase::Adopted(_)) && writer.look(since_s) {
                    due.push((Arc::clone(node), Arc::clone(stream)));
                }
            }
        }
        for (nth, (node, stream)) in (0..).zip(due) {
            let part = Part::Log(Arc::clone(&stream));
            self.op(&node, part, What::Last { stream }, LOOK_EVERY * nth);
        }
    }

    // ---- outcomes ----

    /// An operation ended. `what` is what was asked, back from whoever did it.
    pub(super) fn done(&mut self, token: &Token, what: Asked, outcome: Outcome) {
        let Some(lane) = self.lanes.get(&token.node).filter(|lane| lane.life == token.life) else {
            return self.done_for_nobody(token, outcome);
        };
        let fenced = matches!(lane.phase, Phase::Fenced(_));
        let node = Arc::clone(&token.node);
        match (&token.part, outcome) {
            (Part::Node, Outcome::Adopted(outcome)) => self.adopted(&node, outcome),
            _ if fenced => {}
            (Part::Log(stream), outcome) => {
                let stream = Arc::clone(stream);
                self.done_for_log(&node, &stream, outcome);
                self.go_on_with_log(&node, &stream);
            }
            (Part::State, outcome) => {
                self.done_for_state(&node, what, outcome);
                self.go_on_with_state(&node);
            }
            (Part::Sweep(expected), outcome) => {
                let settled = matches!(outcome, Outcome::Written(_) | Outcome::Conflict);
                if let Some(lane) = self.lanes.get_mut(&node) {
                    lane.state.sweep_written(*expected, settled);
                }
                self.go_on_with_state(&node);
            }
            (Part::Node | Part::Nothing, _) => {}
        }
    }

    /// What was claimed for an adoption that is over is given back, unless the node is asked for again.
    fn done_for_nobody(&mut self, token: &Token, outcome: Outcome) {
        if let Outcome::Adopted(Ok(standing)) = outcome
            && !self.lanes.contains_key(&token.node)
        {
            let what = What::Release { held: standing.held, summary: None };
            let token = Token { part: Part::Nothing, ..token.clone() };
            self.ops.push_back(Op { token, delay: Duration::ZERO, what });
        }
    }

    fn done_for_log(&mut self, node: &Origin, stream: &Arc<str>, outcome: Outcome) {
        let Some(lane) = self.lanes.get_mut(node) else { return };
        let Phase::Adopted(held) = lane.phase else { return };
        let Some(writer) = lane.logs.get_mut(stream) else { return };
        let part = Part::Log(Arc::clone(stream));
        let again = What::Last { stream: Arc::clone(stream) };
        match outcome {
            Outcome::Written(sequence) => {
                let lsns = writer.appended(sequence, self.now_s);
                let end = writer.end;
                self.counts.batches += 1;
                self.counts.records += lsns.len() as u64;
                self.moved(node, stream, end);
                self.settle(node, &lsns);
            }
            Outcome::Conflict => {
                self.counts.conflicts += 1;
                self.op(node, part, again, Duration::ZERO);
            }
            Outcome::Unknown => {
                self.counts.unknown += 1;
                self.op(node, part, again, RETRY);
            }
            // Of an append it did not happen; of a read nothing is known, so it is read again in either case.
            Outcome::Unavailable => self.op(node, part, again, RETRY),
            Outcome::Full => {
                self.counts.full += 1;
                self.op(node, part, again, FULL_RETRY);
            }
            Outcome::Refused(reason) => {
                if let Some(record) = writer.refused() {
                    self.letter(node, Arc::clone(stream), record, reason);
                }
            }
            Outcome::Found(message, _) => {
                let end = message.as_ref().and_then(super::message::end_of);
                if message.is_some() && end.is_none() {
                    return self
                        .fence(node, "a message that is not of this tier stands at the end of a stream");
                }
                let verdict = writer.found(end);
                self.judged(node, stream, held, end, verdict);
            }
            Outcome::Ours(true) => {
                let Some(end) = writer.asked.take() else { return };
                let verdict = writer.still_ours(end);
                self.judged(node, stream, held, Some(end), verdict);
            }
            Outcome::Ours(false) => self.lost(node),
            Outcome::Adopted(_) | Outcome::Nothing => {}
        }
    }

    fn judged(
        &mut self,
        node: &Origin,
        stream: &Arc<str>,
        held: Held,
        end: Option<End>,
        verdict: log::Verdict,
    ) {
        match verdict {
            log::Verdict::GoOn(lsns) => {
                self.counts.repeated += lsns.len() as u64;
                if !lsns.is_empty() {
                    self.moved(node, stream, end);
                }
                self.settle(node, &lsns);
            }
            log::Verdict::AskWhose => {
                if let Some(writer) = self.lanes.get_mut(node).and_then(|lane| lane.logs.get_mut(stream)) {
                    writer.asked = end;
                }
                self.op(node, Part::Log(Arc::clone(stream)), What::StillOurs { held }, Duration::ZERO);
            }
            log::Verdict::Fence(why) => {
                tracing::warn!(%node, %stream, why, "a node is asked again");
                self.fence(node, why);
            }
        }
    }

    fn moved(&mut self, node: &Origin, stream: &Arc<str>, end: Option<End>) {
        let (Some(lane), Some(end)) = (self.lanes.get_mut(node), end) else { return };
        let End { epoch, mark, crc, class, .. } = end;
        let place = LogPlace { epoch, mark, crc, time_s: self.now_s, class };
        lane.state.note_mark(stream, place);
    }

    fn done_for_state(&mut self, node: &Origin, asked: Asked, outcome: Outcome) {
        let Some(lane) = self.lanes.get_mut(node) else { return };
        let verdict = match (outcome, asked) {
            (Outcome::Written(revision), Asked::Key(key)) => {
                self.counts.entries += 1;
                lane.state.written(key, revision)
            }
            (Outcome::Conflict, Asked::Key(key)) => {
                self.counts.conflicts += 1;
                return self.op(node, Part::State, What::Get { key }, Duration::ZERO);
            }
            (Outcome::Unknown | Outcome::Unavailable | Outcome::Full, Asked::Key(key)) => {
                self.counts.unknown += 1;
                return self.op(node, Part::State, What::Get { key }, RETRY);
            }
            (Outcome::Found(message, _), Asked::Key(key)) => lane.state.found(&key, message.as_ref()),
            (Outcome::Found(message, key), Asked::Below(_)) => {
                let found = message.as_ref().and_then(|message| Some((key?, message)));
                if let Some(put) = lane.state.swept(found) {
                    let part = Part::Sweep(put.expected.unwrap_or(0));
                    return self.op(node, part, What::Put(put), Duration::ZERO);
                }
                return;
            }
            (Outcome::Refused(reason), Asked::Key(_)) => {
                let (verdict, record) = lane.state.refused();
                if let Some(record) = record {
                    self.letter(node, "state".into(), record, reason);
                }
                verdict
            }
            (_, Asked::Below(from)) => {
                let below = from;
                lane.state.not_now();
                // Read again, a little later, from where it stands.
                if let state::Next::Sweep { from, .. } = lane.state.next() {
                    self.op(node, Part::State, What::Sweep { below, from }, RETRY);
                }
                return;
            }
            _ => return,
        };
        if let state::Verdict::Done(lsn) = verdict {
            self.settle(node, &[lsn]);
        }
    }

    // ---- adoption ----

    fn adopted(&mut self, node: &Origin, outcome: Result<Box<Standing>, proto::Refusal>) {
        let Some(lane) = self.lanes.get_mut(node) else { return };
        let Phase::Adopting(session) = lane.phase else { return };
        let standing = match outcome {
            Ok(standing) => *standing,
            Err(refusal) => {
                self.forget(node);
                return self.news.push_back(News::Adopted { session, outcome: Err(refusal) });
            }
        };
        let summary = standing.summary.as_ref().map(Summary::of).unwrap_or_default();
        let mut adoption = Adoption { down: standing.down, ..Adoption::default() };
        for (stream, first, end) in &standing.logs {
            let place = summary.logs.get(stream).filter(|place| standing.is_good(place, *first));
            let read = end.as_ref().map(|end| AdoptedLog {
                stream: Arc::clone(stream),
                class: end.class,
                epoch: end.epoch,
                from: end.from,
                mark: end.mark,
                crc: end.crc,
            });
            let noted = place.map(|place| AdoptedLog {
                stream: Arc::clone(stream),
                class: place.class,
                epoch: place.epoch,
                from: place.mark.max(1),
                mark: place.mark,
                crc: place.crc,
            });
            adoption.logs.extend(read.or(noted));
            lane.logs.insert(Arc::clone(stream), LogWriter::at(*end, self.now_s));
        }
        for (space, place) in &summary.spaces {
            adoption.spaces.push(AdoptedSpace {
                space: Arc::clone(space),
                incarnation: place.pair.0,
                revision: place.pair.1,
                run: place.run,
                listed: place.listed,
            });
        }
        lane.state = StateWriter::at(node, summary);
        lane.phase = Phase::Adopted(standing.held);
        self.news.push_back(News::Adopted { session, outcome: Ok(Box::new(adoption)) });
    }
}

impl Standing {
    /// Whether a mark that was noted stands although no message shows it: its messages have been there for as
    /// long as any is kept, or the node holds nothing any more that could be asked for again. Else they are lost.
    fn is_good(&self, place: &LogPlace, first: u64) -> bool {
        let expired =
            !self.log_age.is_zero() && place.time_s.saturating_add(self.log_age.as_secs()) <= self.now_s;
        expired || first > place.mark
    }
}

/// What an operation on State was about.
#[derive(Debug, Clone)]
pub(super) enum Asked {
    Key(String),
    Below(String),
    Else,
}

impl What {
    /// What comes back with its outcome.
    pub(super) fn asked(&self) -> Asked {
        match self {
            Self::Put(put) => Asked::Key(put.key.clone()),
            Self::Get { key } => Asked::Key(key.clone()),
            Self::Sweep { below, .. } => Asked::Below(below.clone()),
            _ => Asked::Else,
        }
    }
}

/// The source and the run that a fact of a core tells of.
fn run_of(record: &Record) -> Option<(u32, u64)> {
    let local: proto::Local = codec::decode(record.body.clone()).ok()?;
    let source = u32::from_be_bytes(local.key.strip_prefix(b"runs/")?.try_into().ok()?);
    let table: proto::LogTable = codec::decode(local.value?).ok()?;
    Some((source, table.epochs.last()?.epoch))
}
