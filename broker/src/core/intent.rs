//! Intents: who does not own a space asks its owner to change it.
//!
//! ```text
//!  node                                          hub
//!  Log `intent/fleet`  ------------------------> applied or refused, in one group with the Log's mark
//!  fleet: the change, `intent-result/<node>/<id>` <----
//!
//!  Log `down/<node>`   <------------------------ a message at `$octobus/intent`
//!  applied or refused, in one group with the Log's mark
//!  twin: the change, status: `intent-result/<id>` ---->
//! ```
//!
//! The Log brings an intent once; change, answer and mark are one group: it has its effect exactly once,
//! whoever restarts in between. An answer is State of the owner: it is there when the asker looks, and goes
//! after a day. An intent names what its asker saw; if something else is there by now, it is refused; so is one
//! that comes after a day. What a Log itself drops (`down/<node>` has a time to live) has no answer: it is
//! counted there.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use codec::{Class, Flags, FrameView, frame::FrameParts, proto};

use super::{
    Core, DropReason, Timer,
    event::{Intent, Origin, Seen},
    link::{FEATURE_NO_INTENTS, Side},
    space::scope::INTENT_RESULT,
};
use crate::limits;

/// The topic of an intent: no client's message has one that begins so.
pub(super) const TOPIC: &str = "$octobus/intent";
/// A Log of intents is named this and the space.
const LOG: &str = "intent/";
/// The space of a node that its hub may ask it to change.
const OF_NODES: &str = "twin";
/// An intent that its owner has not seen by then is refused; an answer goes after as long.
const TTL: Duration = Duration::from_hours(24);
/// Answers are looked through this often, while there are any.
const SWEEP: Duration = Duration::from_mins(10);
/// The answers of a replica outlive those of their owner, who removes them.
const REPLICA_TTL: Duration = Duration::from_hours(48);

/// True of a Log that carries intents, which are nobody's messages.
pub(super) fn is_log(stream: &str) -> bool {
    stream.starts_with(LOG)
}

impl Core {
    /// Asks the owner of a space: the tier, or at a hub a node. True: it is durable and on its way once this
    /// group is.
    pub(super) fn intend(&mut self, owner: &Origin, intent: Intent) -> Result<(), String> {
        if self.refusing {
            return Err("the store takes no writes now".to_owned());
        }
        check_id(&intent.id)?;
        codec::topic::validate_topic(&intent.key).map_err(|error| format!("key: {error}"))?;
        if intent.value.as_ref().is_some_and(|value| value.len() > limits::INTENT_VALUE_MAX) {
            return Err(format!("a value of more than {} bytes", limits::INTENT_VALUE_MAX));
        }
        let space = Arc::clone(&intent.space);
        let stream: Arc<str> = match (self.config.is_hub(), owner.is_empty()) {
            (false, true) => format!("{LOG}{space}").into(),
            (true, false) if self.is_enrolled(owner) => format!("down/{owner}").into(),
            (true, false) => return Err(format!("no node {owner} is enrolled here")),
            _ => return Err(format!("space {space} of {owner:?} is nobody's to ask from here")),
        };
        let asks_hub = owner.is_empty();
        let mut above = self.links.values().filter(|link| link.side == Side::Above);
        if asks_hub && above.any(|link| link.can(FEATURE_NO_INTENTS)) {
            return Err("this tier applies no intents of nodes: write at a hub (`octobus put`)".to_owned());
        }
        let origin: Origin = if asks_hub { Arc::clone(&self.own) } else { "".into() };
        let log = self.log_of(&origin, &stream, Class::Event, None);
        if asks_hub && self.logs[&log].next > self.passed_upto(log) + limits::INTENTS_MAX {
            return Err(format!("{} intents wait for the hub already", limits::INTENTS_MAX));
        }
        let (seen, any) = match intent.seen {
            Seen::Any => ((0, 0), true),
            Seen::Absent => ((0, 0), false),
            Seen::At { incarnation, revision } => ((incarnation, revision), false),
        };
        let body = codec::encode(&proto::Intent {
            id: intent.id,
            space: space.to_string(),
            key: intent.key,
            value: intent.value,
            any,
            incarnation: seen.0,
            revision: seen.1,
        });
        let frame = FrameParts {
            topic: TOPIC,
            time_us: self.now.wall_us,
            time_trusted: self.now.trusted,
            payload: &body,
            ..FrameParts::default()
        };
        self.append(log, Flags::QOS1, 0, frame.encode());
        Ok(())
    }

    /// A Log that may bear intents has just brought a message, in the same group.
    pub(super) fn take_intent(&mut self, origin: &Origin, frame: &Bytes) {
        if !FrameView::parse(frame).is_ok_and(|view| view.topic() == TOPIC) {
            return;
        }
        let asked = FrameView::parse(frame).ok().and_then(|view| {
            let intent = codec::decode::<proto::Intent>(frame.slice_ref(view.payload())).ok()?;
            check_id(&intent.id).ok()?;
            Some((intent, self.has_expired(&view, TTL)))
        });
        let Some((intent, expired)) = asked else {
            return self.stats.drop(DropReason::NotAuthorized);
        };
        let own = Arc::clone(&self.own);
        let (answers, prefix) = if self.config.is_hub() {
            ("fleet", format!("{INTENT_RESULT}{origin}/"))
        } else {
            ("status", INTENT_RESULT.to_owned())
        };
        let answers = self.space_of(&own, &answers.into());
        let key = format!("{prefix}{}", intent.id);
        if self.spaces[answers].knows(&key) {
            return; // it was answered, and came again because its asker's disk was put back
        }
        let result =
            if expired { result(proto::IntentOutcome::ExpiredIntent) } else { self.judge(origin, &intent) };
        let value = codec::encode(&result);
        let now = self.now;
        self.spaces[answers].write(&mut self.ledger, now, &key, Some(&value));
        self.bound_answers(answers, &prefix);
        self.sweep_answers_later();
    }

    /// Applies an intent, or says why not.
    fn judge(&mut self, origin: &Origin, intent: &proto::Intent) -> proto::IntentResult {
        let own = Arc::clone(&self.own);
        let allowed = if self.config.is_hub() { intent.space == "fleet" } else { intent.space == OF_NODES };
        if !allowed {
            return result(proto::IntentOutcome::NotAuthorizedIntent);
        }
        let valid = codec::topic::validate_topic(&intent.key).is_ok()
            && intent.value.as_ref().is_none_or(|value| value.len() <= limits::INTENT_VALUE_MAX);
        if !valid {
            return result(proto::IntentOutcome::Malformed);
        }
        let index = self.space_of(&own, &intent.space.as_str().into());
        let space = &mut self.spaces[index];
        // A node may ask to change what it must have, and nothing else.
        if space.scoped && !space.listing(&intent.key).any(|node| node == origin) {
            return result(proto::IntentOutcome::NotAuthorizedIntent);
        }
        let found = space.latest(&intent.key).map_or((0, 0), |held| held.pair);
        if !intent.any && found != (intent.incarnation, intent.revision) {
            let mut conflict = result(proto::IntentOutcome::Conflict);
            (conflict.incarnation, conflict.revision) = found;
            return conflict;
        }
        let revision = space.write(&mut self.ledger, self.now, &intent.key, intent.value.as_deref());
        let mut applied = result(proto::IntentOutcome::Applied);
        (applied.incarnation, applied.revision) = (space.at.0, revision);
        applied
    }

    /// The oldest answers to one asker make room.
    fn bound_answers(&mut self, index: usize, prefix: &str) {
        let space = &mut self.spaces[index];
        let answers = space.live(prefix);
        let surplus = answers.len().saturating_sub(limits::INTENT_RESULTS_MAX);
        for (_, key) in answers.into_iter().take(surplus) {
            space.write(&mut self.ledger, self.now, &key, None);
        }
    }

    fn sweep_answers_later(&mut self) {
        if !std::mem::replace(&mut self.sweeping, true) {
            self.after(SWEEP, Timer::IntentResults);
        }
    }

    /// Answers that are older than a day go. Nothing goes for its age on a clock that may be wrong.
    pub(super) fn sweep_answers(&mut self) {
        self.sweeping = false;
        let now = self.now;
        let older = |entry_us: u64, ttl: Duration| {
            now.trusted && u128::from(now.wall_us.saturating_sub(entry_us)) > ttl.as_micros()
        };
        let mut left = false;
        for space in &mut self.spaces {
            for (key, time_us) in space.timed(INTENT_RESULT) {
                if space.owned && older(time_us, TTL) {
                    space.write(&mut self.ledger, now, &key, None);
                } else if space.scoped && !space.owned && older(time_us, REPLICA_TTL) {
                    space.unlist(&mut self.ledger, now, &key);
                } else {
                    left |= space.owned || space.scoped;
                }
            }
        }
        if left {
            self.sweep_answers_later();
        }
    }

    /// After a restart.
    pub(super) fn resume_answers(&mut self) {
        if self.spaces.iter().any(|space| !space.timed(INTENT_RESULT).is_empty()) {
            self.sweep_answers_later();
        }
    }
}

fn result(outcome: proto::IntentOutcome) -> proto::IntentResult {
    proto::IntentResult { outcome: outcome as i32, incarnation: 0, revision: 0 }
}

/// An id is part of a key.
fn check_id(id: &str) -> Result<(), String> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    if (1..=64).contains(&id.len()) && id.bytes().all(plain) {
        Ok(())
    } else {
        Err("an id has 1 to 64 letters, digits, dots, hyphens and underscores".to_owned())
    }
}
