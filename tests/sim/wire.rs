//! A connection between a node and the hub: in order within a class, free between classes, and each end may
//! learn of its end at another time.
//!
//! It keeps books of what both sides said, and holds them to it: nothing is acknowledged that was not sent or
//! does not stand on the receiver's disk, no acknowledgement goes back, no window is exceeded.

use std::{
    collections::{BTreeMap, VecDeque},
    time::Duration,
};

use broker::{core::event::SessionId, limits};
use codec::{Class, FrameView, Kind, Record, RecordHeader, proto};
use octobus_tests::script::Age;

use crate::shadow::{Pair, Shadow, rule};

/// To the hub.
pub(crate) const UP: usize = 0;
/// To the node.
pub(crate) const DOWN: usize = 1;

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Wire {
    /// The host that dialled.
    pub(crate) node: usize,
    /// The sessions at both ends, by the way that leads there; none once that end is closed.
    pub(crate) ends: [Option<SessionId>; 2],
    lanes: [BTreeMap<Class, VecDeque<Vec<Record>>>; 2],
    /// What goes this way is swallowed.
    pub(crate) deaf: [bool; 2],
    pub(crate) deaf_since: Option<Duration>,
    age: Age,
    books: [Books; 2],
}

/// What the sender of one direction has said.
#[derive(Debug, Default)]
struct Books {
    sources: BTreeMap<u32, Source>,
    established: bool,
}

#[derive(Debug, Default)]
struct Source {
    kind: u32,
    origin: String,
    name: String,
    /// Sent and not acknowledged, as its sender sees it.
    in_flight: VecDeque<(Pair, usize)>,
    bytes: usize,
    /// State that arrived and is not acknowledged.
    arrived: Vec<(Pair, String)>,
    /// The greatest acknowledgement that was given.
    acknowledged: Option<Pair>,
}

/// What a batch does to the world beside being applied.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    /// Barriers of (origin, space, incarnation).
    pub(crate) barriers: Vec<(String, String, u64)>,
}

impl Wire {
    pub(crate) fn new(node: usize, at_node: SessionId, at_hub: SessionId, age: Age) -> Self {
        Self {
            node,
            ends: [Some(at_hub), Some(at_node)],
            lanes: [BTreeMap::new(), BTreeMap::new()],
            deaf: [false; 2],
            deaf_since: None,
            age,
            books: [Books::default(), Books::default()],
        }
    }

    pub(crate) fn is_idle(&self) -> bool {
        self.lanes.iter().all(BTreeMap::is_empty)
    }

    /// The classes in which something waits to go this way.
    pub(crate) fn waiting(&self, way: usize) -> impl Iterator<Item = Class> {
        self.lanes[way].keys().copied()
    }

    /// An end sends.
    pub(crate) fn send(&mut self, way: usize, class: Class, records: Vec<Record>, sender: &Shadow) {
        for record in &records {
            self.note_sent(way, record, sender);
        }
        if self.ends[way].is_some() {
            self.lanes[way].entry(class).or_default().push_back(records);
        }
    }

    fn note_sent(&mut self, way: usize, record: &Record, sender: &Shadow) {
        let header = &record.header;
        match header.kind {
            Kind::DECLARE => {
                let declare: proto::Declare = codec::decode(record.body.clone()).expect("a declare");
                let source = Source {
                    kind: declare.kind,
                    origin: declare.origin,
                    name: declare.name,
                    ..Source::default()
                };
                let older = self.books[way].sources.insert(header.source, source);
                rule!(older.is_none(), "a_source_is_declared_once", "{}", header.source);
            }
            Kind::LOG | Kind::GAP | Kind::PUT | Kind::TOMBSTONE | Kind::BARRIER => {
                let source = self.books[way].sources.get_mut(&header.source);
                rule!(source.is_some(), "a_record_needs_a_declared_source", "{header:?}");
                let source = source.expect("just looked");
                let window = if source.kind == 2 {
                    limits::LINK_LOG_WINDOW_BYTES
                } else {
                    limits::LINK_STATE_WINDOW_BYTES
                };
                source.bytes += record.wire_len();
                source.in_flight.push_back(((header.epoch, header.seq), record.wire_len()));
                rule!(
                    source.bytes <= window + limits::FRAME_MAX,
                    "every_queue_is_bounded",
                    "{} bytes of {} in flight",
                    source.bytes,
                    source.name
                );
            }
            Kind::CONTROL => self.note_control(way, record, sender),
            _ => {}
        }
    }

    /// An acknowledgement may only say what is on the disk of who gives it.
    fn note_control(&mut self, way: usize, record: &Record, receiver: &Shadow) {
        use proto::control::Message;
        let Ok(control) = codec::decode::<proto::Control>(record.body.clone()) else { return };
        match control.message {
            Some(Message::Welcome(_)) => self.books.iter_mut().for_each(|books| books.established = true),
            Some(Message::Ack(ack)) => {
                for at in &ack.sources {
                    if let Some(source) = self.books[1 - way].sources.get_mut(&at.source) {
                        source.acknowledge((at.epoch, at.seq), receiver);
                    }
                }
            }
            _ => {}
        }
    }

    /// The head of a lane, as its receiver gets it; none if nothing is there to get it.
    pub(crate) fn take(&mut self, way: usize, class: Class) -> Option<(SessionId, Vec<Record>)> {
        let lane = self.lanes[way].get_mut(&class)?;
        let records = lane.pop_front().expect("no empty lanes are kept");
        if lane.is_empty() {
            self.lanes[way].remove(&class);
        }
        let session = self.ends[way].filter(|_| !self.deaf[way])?;
        Some((session, self.translate(way, records)))
    }

    /// What a receiver is about to be given.
    pub(crate) fn note_arrived(&mut self, way: usize, records: &[Record]) -> Seen {
        let mut seen = Seen::default();
        for record in records {
            let pair = (record.header.epoch, record.header.seq);
            match record.header.kind {
                Kind::PUT | Kind::TOMBSTONE => {
                    let key = FrameView::parse(&record.body).expect("a frame").topic().to_owned();
                    if let Some(source) = self.books[way].sources.get_mut(&record.header.source) {
                        source.arrived.push((pair, key));
                    }
                }
                Kind::BARRIER => {
                    if let Some(source) = self.books[way].sources.get(&record.header.source) {
                        seen.barriers.push((source.origin.clone(), source.name.clone(), pair.0));
                    }
                }
                Kind::CONTROL => self.note_ack_arrived(way, record),
                _ => {}
            }
        }
        seen
    }

    fn note_ack_arrived(&mut self, way: usize, record: &Record) {
        let Ok(control) = codec::decode::<proto::Control>(record.body.clone()) else { return };
        let Some(proto::control::Message::Ack(ack)) = control.message else { return };
        for at in &ack.sources {
            let Some(source) = self.books[1 - way].sources.get_mut(&at.source) else { continue };
            let log = source.kind == 2;
            let done = |pair: &Pair| if log { pair.1 <= at.seq } else { *pair <= (at.epoch, at.seq) };
            while source.in_flight.front().is_some_and(|(pair, _)| done(pair)) {
                let (_, bytes) = source.in_flight.pop_front().expect("looked at the front");
                source.bytes -= bytes;
            }
        }
    }

    /// The head of some lane will arrive twice. A declare may come once only; anything else must be harmless.
    pub(crate) fn repeat(&mut self, way: usize) {
        let lanes = self.lanes[way].iter_mut().filter(|(class, _)| **class != Class::Control);
        for (_, lane) in lanes {
            if let Some(head) = lane.front().cloned()
                && head.iter().all(|record| record.header.kind != Kind::DECLARE)
            {
                lane.push_front(head);
                return;
            }
        }
    }

    /// What another version at the other end would have made of it.
    fn translate(&self, way: usize, mut records: Vec<Record>) -> Vec<Record> {
        match self.age {
            Age::Same => {}
            Age::Newer => {
                for record in &mut records {
                    record.header.flags.0 |= 1 << 15;
                    if record.header.kind == Kind::CONTROL {
                        record.body = with_unknown_field(&record.body);
                    }
                }
                let control = records.iter().any(|record| record.header.kind == Kind::CONTROL);
                if self.books[way].established && !control {
                    records.insert(0, unknown_record(records[0].header.class));
                }
            }
            Age::Older => {
                records.retain(|record| record.header.kind <= Kind::DECLARE);
                for record in &mut records {
                    if record.header.kind == Kind::CONTROL {
                        record.body = of_the_first_version(&record.body);
                    }
                }
            }
        }
        records
    }
}

impl Source {
    fn acknowledge(&mut self, at: Pair, receiver: &Shadow) {
        if let Some(held) = self.acknowledged {
            let back = if self.kind == 2 { held.0 == at.0 && held.1 > at.1 } else { held > at };
            rule!(
                !back,
                "a_mark_never_goes_back",
                "{} of {:?}: {held:?}, then {at:?}",
                self.name,
                self.origin
            );
        }
        self.acknowledged = Some(at);
        if self.kind == 2 {
            let next = receiver.history(&self.origin, &self.name, at.0).map_or(1, |log| log.next);
            rule!(
                at.1 < next,
                "what_a_receiver_acknowledges_is_on_its_disk",
                "{} of {:?}: {at:?} with next {next}",
                self.name,
                self.origin
            );
            return;
        }
        let arrived = std::mem::take(&mut self.arrived);
        for (pair, key) in arrived {
            if pair > at {
                self.arrived.push((pair, key));
                continue;
            }
            let held = receiver.key(&self.origin, &self.name, &key).map(|held| held.pair);
            rule!(
                held.is_some_and(|held| held >= pair),
                "what_a_receiver_acknowledges_is_on_its_disk",
                "{} of {:?}: {key} at {pair:?} is {held:?}",
                self.name,
                self.origin
            );
        }
    }
}

/// A field that no version has had yet, in the message of a control and in the control itself.
fn with_unknown_field(body: &[u8]) -> bytes::Bytes {
    // Field 900, three bytes.
    const UNKNOWN: [u8; 6] = [0xa2, 0x38, 3, b'n', b'e', b'w'];
    let mut out = body.to_vec();
    out.extend_from_slice(&UNKNOWN);
    // A second occurrence of a message field is merged into the first.
    if let Some(tag) = body.first() {
        out.extend_from_slice(&[*tag, 6]);
        out.extend_from_slice(&UNKNOWN);
    }
    out.into()
}

/// A record of a kind that no version has had yet, of a source that it declared in its own way.
fn unknown_record(class: u8) -> Record {
    let header = RecordHeader {
        kind: Kind(15),
        class,
        flags: codec::Flags::default(),
        source: 4_000_000,
        epoch: 1,
        seq: 2,
        aux: 3,
    };
    Record { header, body: bytes::Bytes::from_static(b"from the future") }
}

/// A control message with the fields that the first version had, and none of its features.
fn of_the_first_version(body: &bytes::Bytes) -> bytes::Bytes {
    use proto::control::Message;
    const FIRST: u64 = 7;
    let known = body.first().is_some_and(|tag| u64::from(*tag >> 3) <= FIRST);
    let Ok(control) = codec::decode::<proto::Control>(body.clone()) else { return body.clone() };
    let message = match control.message {
        _ if !known => None,
        Some(Message::Hello(mut hello)) => {
            hello.features.clear();
            Some(Message::Hello(hello))
        }
        Some(Message::Welcome(mut welcome)) => {
            welcome.features.clear();
            Some(Message::Welcome(welcome))
        }
        other => other,
    };
    codec::encode(&proto::Control { message })
}
