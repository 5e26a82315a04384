//! How much may be on its way, unacknowledged: granted by the receiver.
//!
//! A receiver shares what it is ready to hold among its links, and grants nothing while its store takes no
//! writes: its peers then keep what they have, and go on by themselves once it grants again. A peer that
//! grants nothing because it is of an older build gets the windows that build was made for.

use codec::{Class, proto};

use super::{
    Core,
    event::SessionId,
    link::{FEATURE_CREDIT, Link, Phase},
};
use crate::limits;

/// What a peer that says nothing is ready to take.
pub(super) const UNTOLD: proto::Window = proto::Window {
    log_bytes: limits::LINK_LOG_WINDOW_BYTES as u64,
    state_bytes: limits::LINK_STATE_WINDOW_BYTES as u64,
    link_bytes: u64::MAX,
};

const NOTHING: proto::Window = proto::Window { log_bytes: 0, state_bytes: 0, link_bytes: 0 };

impl Link {
    /// Whether another record of this class may be sent, as far as the link as a whole is concerned. Alarms
    /// and State have windows of their own, which what is less urgent cannot use up.
    pub(super) fn has_credit(&self, class: Class) -> bool {
        let urgent = matches!(class, Class::Control | Class::Alarm | Class::State);
        let used = if urgent { 0 } else { self.in_flight_bytes as u64 };
        used < self.window.link_bytes
    }
}

impl Core {
    /// What the peer of this link is told that it may send.
    pub(super) fn grant(&mut self, session: SessionId) -> proto::Window {
        let window = self.window();
        self.links.get_mut(&session).expect("the link that is granted").granted = window;
        window
    }

    fn window(&self) -> proto::Window {
        if self.takes_no_data() {
            return NOTHING;
        }
        proto::Window {
            log_bytes: self.share.min(limits::LINK_LOG_WINDOW_BYTES as u64),
            state_bytes: self.share.min(limits::LINK_STATE_WINDOW_BYTES as u64),
            link_bytes: self.share,
        }
    }

    /// Links came or went, or the store began or ended to refuse: peers learn of it if it matters to them.
    pub(super) fn grant_anew(&mut self) {
        let links = self.links.len();
        let share = share_of(links);
        // What shrinks does so at once, what grows does so when it will last.
        if share < self.share || share_of(links + links / 4) > self.share {
            self.share = share;
        }
        let window = self.window();
        if window == self.granted {
            return;
        }
        self.granted = window;
        for session in self.links.keys().copied().collect::<Vec<_>>() {
            self.grant_if_outdated(session);
        }
    }

    /// Tells a peer what it may send if that is not what it was told: it may have changed while the link was
    /// not yet established.
    pub(super) fn grant_if_outdated(&mut self, session: SessionId) {
        let window = self.window();
        let link = self.links.get_mut(&session).expect("a link of this core");
        let told = link.phase != Phase::Established || !link.can(FEATURE_CREDIT);
        if told || link.granted == window {
            return;
        }
        link.granted = window;
        let ack = proto::Ack { sources: Vec::new(), window: Some(window) };
        self.send_control(session, proto::control::Message::Ack(ack));
    }
}

/// A link's part of what this broker is ready to hold: a power of two, so that it seldom changes.
fn share_of(links: usize) -> u64 {
    let part = limits::LINKS_WINDOW_BYTES / links.max(1);
    let part = part.clamp(limits::LINK_WINDOW_MIN, limits::LINK_WINDOW_MAX) as u64;
    1 << part.ilog2()
}

/// The share of the first link.
pub(super) fn first_share() -> u64 {
    share_of(1)
}
