//! Requests over a link: who waits for which answer.
//!
//! A hub's client asks a node with a reply topic; the request goes over the node's link as a Live record
//! with a correlation id of this hop. On the node it is delivered with the reply topic `_INBOX/_hop/<token>`,
//! where the token is 64 random bits: who was not asked cannot guess where to answer. What is published there
//! goes back as a Live record with the same id, once. A relay passes a request on under an id of the next hop.
//! When the path breaks, whoever waits is told at once.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use codec::{
    Class, Flags, FrameView,
    frame::{FrameParts, header},
};

use super::{
    Core, DropReason, Timer,
    event::{Delivery, Origin, Output, SessionId},
};
use crate::limits;

/// First levels of the topics that answer requests from over a link.
pub(super) const HOP_PREFIX: &str = "_INBOX/_hop/";
/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(60);
/// What a requester is told when the path to the node is broken.
const OFFLINE: &str = "node offline";

#[derive(Debug, Default)]
pub(super) struct Requests {
    last: u64,
    waiting: BTreeMap<u64, Waiting>,
    /// On a node: where the answer to each token goes, and when it was asked.
    hops: BTreeMap<u64, (SessionId, u64, Duration)>,
    timer_set: bool,
}

#[derive(Debug)]
struct Waiting {
    asker: Asker,
    /// Who is asked, and by which link.
    node: Origin,
    session: SessionId,
    asked: Duration,
}

/// Where an answer goes.
#[derive(Debug)]
enum Asker {
    /// To a client here.
    Inbox(Arc<str>),
    /// Back over the link that the request came by, with that hop's correlation id.
    Hop(SessionId, u64),
}

impl Requests {
    /// True if nobody has set the timer yet; it is set from now on.
    fn needs_timer(&mut self) -> bool {
        !std::mem::replace(&mut self.timer_set, true)
    }
}

impl Core {
    /// Sends a request to a node's link, or answers that nobody is there.
    pub(super) fn forward_request(&mut self, node: &Origin, inbox: &Arc<str>, frame: &Bytes) {
        self.ask(node, Asker::Inbox(Arc::clone(inbox)), frame);
    }

    /// On a relay: passes a request on to a node behind it, under a correlation id of the next hop.
    pub(super) fn pass_request(&mut self, from: SessionId, node: &Origin, correlation: u64, frame: &Bytes) {
        self.ask(node, Asker::Hop(from, correlation), frame);
    }

    fn ask(&mut self, node: &Origin, asker: Asker, frame: &Bytes) {
        let Some(session) = self.link_of(node) else {
            return self.answer_asker(&asker, node, OFFLINE);
        };
        let link = self.links.get_mut(&session).expect("an established link");
        let full = link.queued + frame.len() > limits::LINK_QUEUE_BYTES;
        if full || self.requests.waiting.len() >= limits::REQUESTS_MAX {
            self.stats.drop(DropReason::LinkQueue);
            return self.answer_asker(&asker, node, "overloaded");
        }
        self.requests.last += 1;
        let correlation = self.requests.last;
        link.asked.insert(correlation);
        let waiting = Waiting { asker, node: Arc::clone(node), session, asked: self.now.mono };
        let first = self.requests.needs_timer();
        self.requests.waiting.insert(correlation, waiting);
        link.push_live(node, Class::Event, Flags::REQUEST, correlation, frame.clone());
        self.pump_links.insert(session);
        if first {
            self.after(PATIENCE, Timer::Requests);
        }
    }

    /// Tells whoever asked that there is no answer.
    fn answer_asker(&mut self, asker: &Asker, node: &Origin, text: &str) {
        match asker {
            Asker::Inbox(inbox) => self.no_responders(inbox, "503", text),
            Asker::Hop(session, correlation) => {
                let frame = nobody("_INBOX", "503", text, self.now.wall_us);
                self.answer(*session, node, *correlation, frame);
            }
        }
    }

    /// A node is offline now: whoever waits for its answer by this link hears of it at once.
    pub(super) fn fail_requests(&mut self, session: SessionId, node: &Origin) {
        let Some(link) = self.links.get(&session) else { return };
        let of_node = |id: &&u64| self.requests.waiting.get(id).is_some_and(|waiting| waiting.node == *node);
        let lost = link.asked.iter().filter(of_node).copied().collect();
        self.fail_all_requests(&lost);
    }

    pub(super) fn fail_all_requests(&mut self, lost: &BTreeSet<u64>) {
        for correlation in lost {
            if let Some(waiting) = self.requests.waiting.remove(correlation) {
                if let Some(link) = self.links.get_mut(&waiting.session) {
                    link.asked.remove(correlation);
                }
                self.answer_asker(&waiting.asker, &waiting.node, OFFLINE);
            }
        }
    }

    /// A reply topic for a request that came over a link; none if too many are open.
    pub(super) fn open_hop(&mut self, session: SessionId, correlation: u64) -> Option<Arc<str>> {
        if self.requests.hops.len() >= limits::REQUESTS_MAX {
            return None;
        }
        if self.requests.needs_timer() {
            self.after(PATIENCE, Timer::Requests);
        }
        let token: u64 = rand::Rng::random(&mut self.rng);
        self.requests.hops.insert(token, (session, correlation, self.now.mono));
        Some(format!("{HOP_PREFIX}{token:016x}").into())
    }

    pub(super) fn forget_requests(&mut self) {
        let now = self.now.mono;
        let (links, waiting) = (&mut self.links, &mut self.requests.waiting);
        waiting.retain(|correlation, waiting| {
            let keep = waiting.asked + PATIENCE > now;
            if let Some(link) = links.get_mut(&waiting.session).filter(|_| !keep) {
                link.asked.remove(correlation);
            }
            keep
        });
        self.requests.hops.retain(|_, (_, _, asked)| *asked + PATIENCE > now);
        let asked = self.requests.waiting.values().map(|waiting| waiting.asked);
        let oldest = asked.chain(self.requests.hops.values().map(|(_, _, asked)| *asked)).min();
        self.requests.timer_set = oldest.is_some();
        if let Some(oldest) = oldest {
            self.after((oldest + PATIENCE).saturating_sub(now), Timer::Requests);
        }
    }

    /// A node's answer: it may answer only what it was asked, once.
    pub(super) fn on_reply(&mut self, session: SessionId, origin: &Origin, correlation: u64, frame: &Bytes) {
        let asked = self
            .requests
            .waiting
            .get(&correlation)
            .is_some_and(|waiting| waiting.session == session && waiting.node == *origin);
        if !asked {
            return self.stats.drop(DropReason::UnknownReply);
        }
        let waiting = self.requests.waiting.remove(&correlation).expect("looked at it");
        if let Some(link) = self.links.get_mut(&session) {
            link.asked.remove(&correlation);
        }
        let inbox = match waiting.asker {
            Asker::Inbox(inbox) => inbox,
            Asker::Hop(above, correlation) => {
                return self.answer(above, origin, correlation, frame.clone());
            }
        };
        let Ok(view) = FrameView::parse(frame) else { return };
        let headers: Vec<(&str, &[u8])> = view.headers().collect();
        let parts = FrameParts {
            topic: &inbox,
            time_us: view.time_us(),
            time_trusted: view.time_trusted(),
            trace: view.trace(),
            ttl_s: 0,
            headers: &headers,
            payload: view.payload(),
        };
        let nobody = view.header(header::SERVICE_ERROR_CODE) == Some(b"503") && view.payload().is_empty();
        self.deliver_answer(&inbox, parts.encode(), nobody);
    }

    /// On a node: something was published to the reply topic of a request that came over a link.
    pub(super) fn answer_hop(&mut self, topic: &str, frame: &Bytes) {
        let token = topic.strip_prefix(HOP_PREFIX).and_then(|token| u64::from_str_radix(token, 16).ok());
        let Some((session, correlation, _)) = token.and_then(|token| self.requests.hops.remove(&token))
        else {
            return self.stats.drop(DropReason::UnknownReply);
        };
        let own = Arc::clone(&self.own);
        self.answer(session, &own, correlation, frame.clone());
    }

    pub(super) fn answer_nobody(&mut self, session: SessionId, correlation: u64) {
        let frame = nobody("_INBOX", "503", "no responders", self.now.wall_us);
        let own = Arc::clone(&self.own);
        self.answer(session, &own, correlation, frame);
    }

    fn answer(&mut self, session: SessionId, origin: &Origin, correlation: u64, frame: Bytes) {
        let Some(link) = self.links.get_mut(&session) else {
            return self.stats.drop(DropReason::UnknownReply);
        };
        link.push_live(origin, Class::Event, Flags::REPLY, correlation, frame);
        self.pump_links.insert(session);
    }

    /// Tells a requester that nobody answers.
    pub(super) fn no_responders(&mut self, inbox: &Arc<str>, code: &str, text: &str) {
        let frame = nobody(inbox, code, text, self.now.wall_us);
        self.deliver_answer(inbox, frame, true);
    }

    fn deliver_answer(&mut self, inbox: &Arc<str>, frame: Bytes, no_responders: bool) {
        let own = Arc::clone(&self.own);
        for matched in self.trie.matches(&own, &own, inbox).into_iter().flatten() {
            for target in &matched.targets {
                let Some(session) = self.clients.get(&target.client).and_then(|client| client.session) else {
                    continue;
                };
                let delivery = Delivery {
                    frame: frame.clone(),
                    origin: Arc::clone(&own),
                    sub: target.sub,
                    identifiers: None,
                    qos: 0,
                    packet_id: 0,
                    dup: false,
                    retain: false,
                    position: None,
                    reply: None,
                    no_responders,
                };
                self.stats.delivered += 1;
                self.output(session, Output::Deliver(delivery));
            }
        }
    }
}

fn nobody(topic: &str, code: &str, text: &str, time_us: u64) -> Bytes {
    let headers = [(header::SERVICE_ERROR_CODE, code.as_bytes()), (header::SERVICE_ERROR, text.as_bytes())];
    FrameParts { topic, time_us, headers: &headers, ..FrameParts::default() }.encode()
}
