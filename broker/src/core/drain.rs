//! The end of a process, in order: no new sessions, nodes elsewhere, everything durable.
//!
//! Links go in waves, over most of the time that there is, so that the rest of a tier is not stormed. A link is told
//! to go once everything that it brought is durable, behind the acknowledgements of that; its node dials again at
//! once, with jitter. What is left when the time is over is closed as it is: its node sends again what was not
//! acknowledged, and nothing is lost by it.

use std::{collections::BTreeSet, ops::Bound, sync::Arc, time::Duration};

use codec::proto;
use rand::Rng;

use super::{
    Core, Party, Timer,
    event::{CloseReason, CommandId, Output, Response, SessionId},
    ledger::Effect,
    link::Phase,
};

/// From one wave to the next.
const WAVE: Duration = Duration::from_millis(50);
/// Links of one wave at least: fewer spare nobody anything.
const WAVE_LEAST: usize = 64;
/// Nodes come back within this time after they were told, at random.
const RETURN_MS: u32 = 500;

/// A process on its way to its end.
#[derive(Debug)]
pub(super) struct Drain {
    /// Who waits for it; none once that was answered.
    id: Option<CommandId>,
    /// The last wave goes by then.
    told_by: Duration,
    /// What is left then is closed as it is.
    until: Duration,
    /// The link that was told last, and those that were told and are still here.
    last: SessionId,
    leaving: BTreeSet<SessionId>,
    clean: u64,
}

impl Core {
    /// Refuses new sessions and ends the others within this time; answered once all of it is durable.
    pub(super) fn drain(&mut self, within: Duration, id: CommandId) {
        self.write_cursors();
        let clients = self.sessions.iter().filter(|(_, party)| matches!(party, Party::Client(_)));
        for session in clients.map(|(session, _)| *session).collect::<Vec<_>>() {
            self.output(session, Output::Close(CloseReason::Shutdown));
        }
        self.draining = Some(Drain {
            id: Some(id),
            told_by: self.now.mono + within / 2,
            until: self.now.mono + within,
            last: SessionId(0),
            leaving: BTreeSet::new(),
            clean: 0,
        });
        self.drain_on();
    }

    /// What a stopped process still has to do: nothing, once drained.
    #[must_use]
    pub fn is_drained(&self) -> bool {
        self.draining.as_ref().is_some_and(|drain| drain.id.is_none()) && self.ledger.is_settled()
    }

    /// The next wave, or the end of the time.
    pub(super) fn drain_on(&mut self) {
        let Some(drain) = self.draining.as_ref().filter(|drain| drain.id.is_some()) else { return };
        if self.now.mono >= drain.until {
            return self.drain_by_force();
        }
        let waves = drain.told_by.saturating_sub(self.now.mono).as_millis() / WAVE.as_millis() + 1;
        let staying = self.links.len().saturating_sub(drain.leaving.len());
        let next = staying.div_ceil(usize::try_from(waves).unwrap_or(usize::MAX)).max(WAVE_LEAST);
        let from = (Bound::Excluded(drain.last), Bound::Unbounded);
        let wave: Vec<(SessionId, Arc<str>)> = self
            .links
            .range(from)
            .filter(|(_, link)| link.phase != Phase::Closing)
            .map(|(session, link)| (*session, Arc::clone(&link.peer.name)))
            .take(next)
            .collect();
        let drain = self.draining.as_mut().expect("looked at it");
        drain.leaving.extend(wave.iter().map(|(session, _)| *session));
        drain.last = wave.last().map_or(SessionId(u64::MAX), |(session, _)| *session);
        let more = wave.len() == next;
        let wait = if more { WAVE } else { drain.until.saturating_sub(self.now.mono) };
        for (session, node) in wave {
            if self.config.shared {
                self.ledger.enter(&node);
            }
            self.ledger.after(Effect::Leave(session));
        }
        self.after(wait, Timer::Drain);
        self.drained_if_empty();
    }

    /// Everything that this link brought is durable, and its peer knows: it goes.
    pub(super) fn leave(&mut self, session: SessionId) {
        if self.links.get(&session).is_none_or(|link| link.phase == Phase::Closing) {
            return;
        }
        let retry_after_ms = self.rng.random_range(0..=RETURN_MS);
        let drain = proto::Drain { retry_after_ms };
        self.send_control(session, proto::control::Message::Drain(drain));
        self.flush_link(session);
        self.output(session, Output::Close(CloseReason::Shutdown));
    }

    /// A link that was told to go is gone.
    pub(super) fn has_left(&mut self, session: SessionId) {
        let Some(drain) = self.draining.as_mut().filter(|drain| drain.id.is_some()) else { return };
        if drain.leaving.remove(&session) {
            drain.clean += 1;
            self.stats.drained_clean += 1;
        }
        self.drained_if_empty();
    }

    fn drained_if_empty(&mut self) {
        let gone = self.links.is_empty();
        let Some(drain) = self.draining.as_mut().filter(|_| gone) else { return };
        if let Some(id) = drain.id.take() {
            let response = Response::Drained { clean: drain.clean, forced: 0 };
            self.ledger.after(Effect::Respond(id, response));
        }
    }

    fn drain_by_force(&mut self) {
        let left: Vec<SessionId> = self.links.keys().copied().collect();
        let Some(drain) = self.draining.as_mut() else { return };
        let Some(id) = drain.id.take() else { return };
        let forced = left.len() as u64;
        self.stats.drained_forced += forced;
        self.ledger.after(Effect::Respond(id, Response::Drained { clean: drain.clean, forced }));
        for session in left {
            self.output(session, Output::Close(CloseReason::Shutdown));
        }
    }
}
