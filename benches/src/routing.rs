//! A core without a driver, and the frames that it routes.

use std::time::Duration;

use broker::{
    core::{Config, Core},
    event::{
        Action, Event, Front, Lsn, Now, OriginFilter, Output, Publish, RetainedOnSubscribe, SessionId,
        SessionOpen, Subscription, Target,
    },
    store::Recovered,
};
use bytes::Bytes;
use codec::{Filter, FrameParts};

/// The topic that the benches publish to.
pub const TOPIC: &str = "plant/line-7/boiler/temperature";

/// An encoded frame with a trusted time on this topic.
#[must_use]
pub fn frame(topic: &str, payload: &[u8]) -> Bytes {
    FrameParts { topic, time_us: 1_700_000_000_000_000, time_trusted: true, payload, ..FrameParts::default() }
        .encode()
}

/// An encoded frame of exactly this size, head included.
///
/// # Panics
/// If the head alone is larger.
#[must_use]
pub fn frame_of_size(topic: &str, size: usize) -> Bytes {
    let head = frame(topic, &[0; 128]).len() - 128;
    let guess = size.checked_sub(head).expect("room for the head");
    // The payload's length is itself of varying length.
    (guess.saturating_sub(4)..=guess + 4)
        .map(|payload| frame(topic, &vec![b'x'; payload]))
        .find(|frame| frame.len() == size)
        .expect("some payload fills the frame")
}

/// A publish of QoS 0, or of a higher one with a packet id, to the broker's own topic space.
#[must_use]
pub fn publish(frame: &Bytes, qos: u8) -> Publish {
    Publish {
        target: Target::Own,
        frame: frame.clone(),
        qos,
        packet_id: u16::from(qos > 0),
        dup: false,
        retain: false,
        reply: None,
    }
}

/// A session that is part of this process.
#[must_use]
pub fn opened(session: SessionId) -> Event {
    Event::SessionOpened(SessionOpen {
        session,
        front: Front::Internal,
        client_id: "".into(),
        clean_start: true,
        expiry_s: 0,
        receive_max: u16::MAX,
        will: None,
    })
}

/// Live interest in this filter.
///
/// # Panics
/// If it is none.
#[must_use]
pub fn subscribed(session: SessionId, id: u32, filter: &str) -> Event {
    let subscription = Subscription {
        id,
        origin: OriginFilter::Own,
        filter: Filter::parse(filter).expect("a valid filter"),
        qos: 0,
        group: None,
        no_local: false,
        retain_as_published: false,
        retained: RetainedOnSubscribe::DoNotSend,
        wildcard_matches_dollar: false,
        identifier: 0,
    };
    Event::Subscribed { session, token: id, subscriptions: vec![subscription] }
}

/// A node's core that is applied to directly: what routing costs without driver, queues and sockets.
#[derive(Debug)]
pub struct Bare {
    core: Core,
    now: Now,
    actions: Vec<Action>,
    publisher: SessionId,
    /// What was delivered to each session and not yet reported as sent.
    unsent: Vec<(SessionId, usize)>,
}

impl Bare {
    /// With `others` filters that do not match [`TOPIC`], and `matching` sessions that each hold one that does.
    #[must_use]
    pub fn new(others: u32, matching: u32) -> Self {
        let now = Now { mono: Duration::ZERO, wall_us: 1_700_000_000_000_000, trusted: true };
        let mut actions = Vec::new();
        let core = Core::restore(Config::node("bench", [1; 16], 1), Recovered::default(), now, &mut actions);
        let mut bare = Self { core, now, actions, publisher: SessionId(1), unsent: Vec::new() };
        bare.apply(opened(SessionId(1)));
        bare.apply(opened(SessionId(2)));
        for n in 0..others {
            bare.apply(subscribed(SessionId(2), n, &other_filter(n)));
        }
        for n in 0..matching {
            let session = SessionId(u64::from(n) + 3);
            bare.apply(opened(session));
            bare.apply(subscribed(session, 1, "plant/+/boiler/#"));
        }
        bare.settle();
        bare
    }

    fn apply(&mut self, event: Event) {
        self.core.apply(self.now, event, &mut self.actions);
    }

    /// Publishes in one event; what comes out is looked at and thrown away, as a driver would move it on.
    pub fn publish(&mut self, messages: Vec<Publish>) -> u64 {
        self.apply(Event::Published { session: self.publisher, messages });
        self.settle()
    }

    /// Deliveries; groups become durable at once, and writers report what they sent at every 16 KiB.
    fn settle(&mut self) -> u64 {
        let mut delivered = 0;
        let mut durable: Option<Lsn> = None;
        loop {
            for action in self.actions.drain(..) {
                match action {
                    Action::Output { session, output } => {
                        delivered += u64::from(matches!(output, Output::Deliver(_)));
                        charge(&mut self.unsent, session, output.cost());
                    }
                    Action::Persist(group) => durable = Some(group.lsn),
                    Action::Read(_) | Action::Respond { .. } | Action::Tier(_) => {}
                }
            }
            if let Some(lsn) = durable.take() {
                self.core.apply(self.now, Event::Persisted(lsn), &mut self.actions);
                continue;
            }
            self.report_sent();
            if self.actions.is_empty() {
                return delivered;
            }
        }
    }

    fn report_sent(&mut self) {
        for (session, bytes) in &mut self.unsent {
            if *bytes >= broker::limits::SENT_REPORT_BYTES {
                let event = Event::Sent { session: *session, bytes: std::mem::take(bytes) };
                self.core.apply(self.now, event, &mut self.actions);
            }
        }
    }
}

fn charge(unsent: &mut Vec<(SessionId, usize)>, session: SessionId, cost: usize) {
    match unsent.iter_mut().find(|(held, _)| *held == session) {
        Some((_, bytes)) => *bytes += cost,
        None => unsent.push((session, cost)),
    }
}

/// Filters of other devices: a third each exact, with `+`, with `#`.
fn other_filter(n: u32) -> String {
    match n % 3 {
        0 => format!("plant/line-{}/pump/{n}", n + 100),
        1 => format!("plant/+/pump-{n}/pressure"),
        _ => format!("site-{n}/#"),
    }
}

/// Identity of what a message carries, to see whether it was copied on its way.
#[must_use]
pub fn address(frame: &Bytes) -> usize {
    frame.as_ptr().addr()
}
