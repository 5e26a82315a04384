//! Watches of State: a list, `Synced`, then changes, as fast as the session takes them.
//!
//! A watch holds a position, never a queue: while its session's outbox is full it falls behind, and goes on
//! when the outbox has drained. In a space with a change window it then gets every change by itself; in any
//! other, each key at its newest version. Where what it has not seen is no longer known, it ends with
//! [`StateEvent::TooOld`].

use std::sync::Arc;

use super::{
    Core, Party,
    event::{Command, Origin, Output, Response, SessionId, StateEntry, StateEvent},
    space::{Change, Space, Version},
};
use crate::limits;

/// A watch of a session: numbers count up within the session's watches.
pub(super) type WatchId = (SessionId, u32);

#[derive(Debug)]
pub(super) struct Watch {
    space: usize,
    /// Sorted; none is a prefix of another.
    prefixes: Vec<Arc<str>>,
    with_previous: bool,
    /// Listed up to this key; `None` once the list is complete.
    listing: Option<Arc<str>>,
    /// Everything up to this local revision has been sent, or is in the list.
    sent: u64,
    /// `Synced` is owed.
    owes_synced: bool,
}

/// What comes next on a watch.
enum Next {
    Event(StateEvent),
    /// Nothing to show: the watch only moved.
    Nothing,
    /// It has seen everything there is.
    UpToDate,
    TooOld(u64),
}

impl Core {
    pub(super) fn on_state_watch(&mut self, command: Command) -> Response {
        let Command::StateWatch { session, origin, space, prefixes, from, with_previous } = command else {
            unreachable!("called for watches alone")
        };
        if !matches!(self.sessions.get(&session), Some(Party::Client(_))) {
            return Response::Refused("no such session".to_owned());
        }
        let of_session = (session, 0)..=(session, u32::MAX);
        let number = self.watches.range(of_session.clone()).next_back().map_or(0, |((_, last), _)| last + 1);
        if self.watches.range(of_session).count() >= limits::WATCHES_MAX
            || prefixes.len() > limits::WATCHES_MAX
        {
            return Response::Refused(format!("more than {} watches or prefixes", limits::WATCHES_MAX));
        }
        let index = match self.existing_space(&origin, &space) {
            Some(index) => index,
            // Of its own, one that nobody has written to yet.
            None if origin == self.own => self.space_of(&origin, &space),
            None => return Response::Refused(format!("no space {space} of {origin:?}")),
        };
        let space = &self.spaces[index];
        if with_previous && space.window.is_none() {
            return Response::Refused(format!("space {} keeps no change window", space.name));
        }
        if let Some(from) = from
            && (from == 0 || from - 1 < space.known_after() || from > space.seen + 1)
        {
            return Response::TooOld { oldest: space.known_after() + 1 };
        }
        let watch = Watch {
            space: index,
            prefixes: minimal(prefixes),
            with_previous,
            listing: from.is_none().then(|| "".into()),
            sent: from.map_or(space.seen, |from| from - 1),
            owes_synced: from.is_none(),
        };
        self.spaces[index].watchers.insert((session, number));
        self.watches.insert((session, number), watch);
        self.pump_watch((session, number));
        Response::Done
    }

    /// The session ended.
    pub(super) fn end_watches(&mut self, session: SessionId) {
        while let Some((id, _)) = self.watches.range((session, 0)..=(session, u32::MAX)).next() {
            let id = *id;
            self.end_watch(id);
        }
    }

    fn end_watch(&mut self, id: WatchId) {
        if let Some(watch) = self.watches.remove(&id) {
            self.spaces[watch.space].watchers.remove(&id);
        }
    }

    /// The session's outbox has room again.
    pub(super) fn wake_watches(&mut self, session: SessionId) {
        if self.watches.is_empty() {
            return;
        }
        let ids: Vec<WatchId> =
            self.watches.range((session, 0)..=(session, u32::MAX)).map(|(id, _)| *id).collect();
        for id in ids {
            self.pump_watch(id);
        }
    }

    /// Something of this space became durable, or it became complete.
    pub(super) fn pump_watches_of(&mut self, space: usize) {
        let ids: Vec<WatchId> = self.spaces[space].watchers.iter().copied().collect();
        for id in ids {
            self.pump_watch(id);
        }
    }

    /// Sends what the watch has not seen, as far as its session's outbox has room.
    fn pump_watch(&mut self, id: WatchId) {
        let (session, _) = id;
        let Some(Party::Client(ix)) = self.sessions.get(&session).copied() else { return };
        loop {
            let client = &self.clients[&ix];
            if client.queued >= limits::CLIENT_QUEUE_BYTES || client.closing {
                return;
            }
            let Some(watch) = self.watches.get_mut(&id) else { return };
            match watch.next(&self.spaces[watch.space], &self.own) {
                Next::Event(event) => self.output_to_client(ix, session, Output::State(event)),
                Next::Nothing => {}
                Next::UpToDate => return,
                Next::TooOld(oldest) => {
                    self.end_watch(id);
                    self.stats.slow_consumers += 1;
                    let event = StateEvent::TooOld { oldest };
                    return self.output_to_client(ix, session, Output::State(event));
                }
            }
        }
    }

    /// A page of the live entries under a prefix, as they are now or were at a revision.
    pub(super) fn list_state(
        &self,
        origin: &Origin,
        space: &Arc<str>,
        prefix: &str,
        after: Option<&str>,
        limit: usize,
        at: Option<u64>,
    ) -> Response {
        let Some(index) = self.existing_space(origin, space) else {
            return Response::Entries { entries: Vec::new(), revision: 0, more: false };
        };
        let space = &self.spaces[index];
        let at = at.unwrap_or(space.seen);
        let floor = space.window.as_ref().map_or(space.seen, |window| window.floor());
        if at < floor || at > space.seen {
            return Response::TooOld { oldest: floor };
        }
        let (mut entries, mut more, mut bytes) = (Vec::new(), false, 0);
        for (key, version) in space.list_at(at, prefix, after) {
            let entry = version.seen_as(key);
            bytes += entry.key.len() + entry.frame.len();
            let full = bytes > limits::STATE_LIST_BYTES_MAX && !entries.is_empty();
            if full || entries.len() >= limit.min(limits::STATE_LIST_MAX) {
                more = true;
                break;
            }
            entries.push(entry);
        }
        Response::Entries { entries, revision: at, more }
    }
}

impl Watch {
    fn matches(&self, key: &str) -> bool {
        self.prefixes.iter().any(|prefix| key.starts_with(&**prefix))
    }

    fn next(&mut self, space: &Space, own: &str) -> Next {
        if let Some(after) = &self.listing {
            let found = self.prefixes.iter().find_map(|prefix| {
                // What is newer than the list's beginning comes as a change, before `Synced`.
                let mut listed =
                    space.range(prefix, Some(after).filter(|after| !after.is_empty()).map(|key| &**key));
                listed.find(|(_, version)| !version.tombstone && version.local <= self.sent)
            });
            let Some((key, version)) = found else {
                self.listing = None;
                return Next::Nothing;
            };
            self.listing = Some(Arc::clone(key));
            return Next::Event(StateEvent::Put { entry: version.seen_as(key), previous: None });
        }
        if self.sent < space.known_after() {
            return Next::TooOld(space.known_after() + 1);
        }
        let (key, previous, new) = match &space.window {
            Some(window) => match window.after(self.sent).next() {
                Some(Change { key, previous, new }) => (key, previous.as_ref(), new),
                None => return self.at_the_end(space, own),
            },
            None => match space.change_after(self.sent) {
                Some((key, new)) => (key, None, new),
                None => return self.at_the_end(space, own),
            },
        };
        self.sent = new.local;
        let was = previous.filter(|previous| !previous.tombstone);
        // In a window every state is known: what was absent and is removed shows nothing.
        let no_change = new.tombstone && was.is_none() && space.window.is_some();
        if !self.matches(key) || no_change {
            return Next::Nothing;
        }
        let previous = was.filter(|_| self.with_previous).map(|version| Box::new(version.seen_as(key)));
        Next::Event(event_of(key, new, previous))
    }

    fn at_the_end(&mut self, space: &Space, own: &str) -> Next {
        self.sent = self.sent.max(space.seen);
        if self.owes_synced && space.is_complete(own) {
            self.owes_synced = false;
            return Next::Event(StateEvent::Synced { revision: space.seen });
        }
        Next::UpToDate
    }
}

impl Space {
    /// Everything that happened after this local revision can be told: each change with a window, else each
    /// key at its newest version.
    fn known_after(&self) -> u64 {
        self.window.as_ref().map_or(self.horizon.local, |window| window.floor())
    }

    /// Live entries at a local revision that the window reaches.
    fn list_at<'a>(
        &'a self,
        at: u64,
        prefix: &'a str,
        after: Option<&'a str>,
    ) -> impl Iterator<Item = (&'a Arc<str>, &'a Version)> {
        let undone = match &self.window {
            Some(window) if at < self.seen => window.undone_to(at),
            _ => std::collections::BTreeMap::new(),
        };
        // Keys that are gone by now and of which no tombstone is left.
        let within = |key: &str| key.starts_with(prefix) && after.is_none_or(|after| key > after);
        let gone: Vec<(&Arc<str>, &Version)> = undone
            .iter()
            .filter(|(key, _)| within(key) && self.visible(key).is_none())
            .filter_map(|(key, version)| Some((*key, (*version)?)))
            .collect();
        let held = self.range(prefix, after).filter_map(move |(key, version)| match undone.get(key) {
            Some(then) => Some((key, (*then)?)),
            None => Some((key, version)),
        });
        merged(held, gone.into_iter()).filter(|(_, version)| !version.tombstone)
    }
}

/// Two sequences in key order as one.
fn merged<'a, V>(
    left: impl Iterator<Item = (&'a Arc<str>, V)>,
    right: impl Iterator<Item = (&'a Arc<str>, V)>,
) -> impl Iterator<Item = (&'a Arc<str>, V)> {
    let (mut left, mut right) = (left.peekable(), right.peekable());
    std::iter::from_fn(move || match (left.peek(), right.peek()) {
        (Some((a, _)), Some((b, _))) if b < a => right.next(),
        (Some(_), _) => left.next(),
        (None, _) => right.next(),
    })
}

fn event_of(key: &str, version: &Version, previous: Option<Box<StateEntry>>) -> StateEvent {
    if version.tombstone {
        StateEvent::Deleted { key: key.to_owned(), revision: version.pair.1, local: version.local, previous }
    } else {
        StateEvent::Put { entry: version.seen_as(key), previous }
    }
}

/// Sorted, without those that another one covers.
fn minimal(mut prefixes: Vec<String>) -> Vec<Arc<str>> {
    prefixes.sort_unstable();
    let mut kept: Vec<Arc<str>> = Vec::new();
    for prefix in prefixes {
        if !kept.last().is_some_and(|last| prefix.starts_with(&**last)) {
            kept.push(prefix.into());
        }
    }
    kept
}
