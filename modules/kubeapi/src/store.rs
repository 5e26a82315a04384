//! Objects in the broker's space `k8s`: revision is resourceVersion.
//!
//! An object is stored without its resourceVersion, which is the revision at which it stands. Every write
//! names what it has seen; several keys are written or checked in one group.
//!
//! Secrets are sealed as a whole, with a key that stands in the server's folder: last-applied annotations show
//! what `data` shows. One that an older version wrote plainly is read as it is, and sealed when it is next
//! written.

use std::{collections::VecDeque, sync::Arc};

use broker::{
    Handle, Outbox, Stopped,
    event::{
        Command, Event, Expect, Front, Output, Response, SessionOpen, StateChange, StateEntry, StateEvent,
        StateOp,
    },
    seal::{self, SealKey},
};
use bytes::Bytes;
use serde_json::{Value, json};

use crate::{json, limits, status::Status};

/// Why the store did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StoreError {
    /// What is asked for is no longer known, or not yet.
    #[error("too old resource version: the oldest is {oldest}")]
    TooOld { oldest: u64 },
    /// A key is not as expected; `found` is its revision, 0 for none.
    #[error("a key was changed by somebody else")]
    Conflict { index: usize, found: u64 },
    /// The broker has stopped.
    #[error(transparent)]
    Stopped(#[from] Stopped),
    /// The store takes no writes now, or not this one.
    #[error("{0}")]
    Refused(String),
}

impl From<StoreError> for Status {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::TooOld { .. } => Self::expired(
                "The provided continue parameter is too old to display a consistent list result. You can start \
                 a new list without the continue parameter.",
            ),
            StoreError::Conflict { .. } => Self::new(409, "Conflict", error.to_string()),
            StoreError::Stopped(_) | StoreError::Refused(_) => Self::unavailable(error.to_string()),
        }
    }
}

/// An object as it stands in the store.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Stored {
    /// Its key.
    pub(crate) key: String,
    /// The object, with its resourceVersion.
    pub(crate) object: Value,
    /// The revision at which it was last changed.
    pub(crate) revision: u64,
}

impl Stored {
    fn of(entry: &StateEntry, key: &SealKey) -> Self {
        let value = entry.value();
        let opened = seal::is_sealed(&value).then(|| seal::open(key, &entry.key, &value));
        let plain = match &opened {
            None => Some(&value[..]),
            Some(opened) => opened.as_deref(),
        };
        // What is not JSON was not written here; an empty object shows that something is there.
        let read = plain.and_then(|plain| serde_json::from_slice(plain).ok());
        let mut object: Value = read.unwrap_or_else(|| json!({}));
        set_revision(&mut object, entry.local);
        Self { key: entry.key.clone(), object, revision: entry.local }
    }
}

/// Shows an object at a revision.
pub(crate) fn set_revision(object: &mut Value, revision: u64) {
    json::set(object, "metadata.resourceVersion", revision.to_string());
}

/// A page of a list.
#[derive(Debug)]
pub(crate) struct Page {
    pub(crate) objects: Vec<Stored>,
    /// The revision at which it is the truth.
    pub(crate) revision: u64,
    /// There is more behind the last one.
    pub(crate) more: bool,
}

/// One key of a write.
#[derive(Debug)]
pub(crate) struct Write {
    key: String,
    change: StateChange,
    expect: Expect,
}

impl Write {
    /// Creates an object.
    pub(crate) fn create(key: String, object: &Value) -> Result<Self, Status> {
        Ok(Self { key, change: StateChange::Put(encoded(object)?), expect: Expect::Absent })
    }

    /// Replaces an object that stands at a revision.
    pub(crate) fn update(key: String, object: &Value, revision: u64) -> Result<Self, Status> {
        Ok(Self { key, change: StateChange::Put(encoded(object)?), expect: Expect::Revision(revision) })
    }

    /// Removes an object that stands at a revision.
    pub(crate) fn delete(key: String, revision: u64) -> Self {
        Self { key, change: StateChange::Delete, expect: Expect::Revision(revision) }
    }

    /// Holds only if the object still stands at a revision.
    pub(crate) fn check(key: String, revision: u64) -> Self {
        Self { key, change: StateChange::Check, expect: Expect::Revision(revision) }
    }
}

fn encoded(object: &Value) -> Result<Bytes, Status> {
    let mut object = object.clone();
    json::remove(&mut object, "metadata.resourceVersion");
    let bytes = serde_json::to_vec(&object).map_err(Status::internal)?;
    if bytes.len() > limits::OBJECT_MAX {
        return Err(Status::too_large(limits::OBJECT_MAX));
    }
    Ok(bytes.into())
}

/// Under which keys what is written is sealed.
const SEALED: &str = "core/secrets/";

/// The space of objects.
#[derive(Debug, Clone)]
pub(crate) struct Store {
    handle: Handle,
    space: Arc<str>,
    key: Arc<SealKey>,
}

impl Store {
    /// With the key of secrets.
    pub(crate) fn new(handle: Handle, space: Arc<str>, key: SealKey) -> Self {
        Self { handle, space, key: Arc::new(key) }
    }

    /// How many objects are sealed with another key: of those nothing can be read.
    pub(crate) async fn unreadable(&self) -> Result<usize, StoreError> {
        let (sealed, _) = self.all(SEALED).await?;
        Ok(sealed.iter().filter(|stored| json::text(&stored.object, "metadata.name").is_empty()).count())
    }

    /// One object.
    pub(crate) async fn get(&self, key: &str) -> Result<Option<Stored>, StoreError> {
        let command =
            Command::StateGet { origin: "".into(), space: Arc::clone(&self.space), key: key.to_owned() };
        match self.handle.call(command).await? {
            Response::Entry(entry) => Ok(entry.as_ref().map(|entry| Stored::of(entry, &self.key))),
            other => Err(unexpected(other)),
        }
    }

    /// A page of objects in the order of their keys, now or at a revision.
    pub(crate) async fn page(
        &self,
        prefix: &str,
        after: Option<String>,
        limit: usize,
        at: Option<u64>,
    ) -> Result<Page, StoreError> {
        let command = Command::StateList {
            origin: "".into(),
            space: Arc::clone(&self.space),
            prefix: prefix.to_owned(),
            after,
            limit,
            at,
        };
        match self.handle.call(command).await? {
            Response::Entries { entries, revision, more } => {
                let objects = entries.iter().map(|entry| Stored::of(entry, &self.key));
                Ok(Page { objects: objects.collect(), revision, more })
            }
            other => Err(unexpected(other)),
        }
    }

    /// All objects under a prefix at one revision.
    pub(crate) async fn all(&self, prefix: &str) -> Result<(Vec<Stored>, u64), StoreError> {
        let mut page = self.page(prefix, None, limits::PAGE, None).await?;
        let (revision, mut all) = (page.revision, page.objects);
        while page.more {
            let after = all.last().map(|last: &Stored| last.key.clone());
            page = self.page(prefix, after, limits::PAGE, Some(revision)).await?;
            all.append(&mut page.objects);
        }
        Ok((all, revision))
    }

    /// The newest durable revision.
    pub(crate) async fn revision(&self) -> Result<u64, StoreError> {
        Ok(self.page("\u{1}", None, 1, None).await?.revision)
    }

    /// Writes all or nothing. Returns the revision of each, 0 for one that changed nothing.
    pub(crate) async fn write(&self, writes: Vec<Write>) -> Result<Vec<u64>, StoreError> {
        let ops = writes.into_iter().map(|write| StateOp {
            space: Arc::clone(&self.space),
            change: match write.change {
                StateChange::Put(object) if write.key.starts_with(SEALED) => {
                    StateChange::Put(seal::seal(&self.key, &write.key, &object))
                }
                change => change,
            },
            key: write.key,
            expect: write.expect,
        });
        match self.handle.call(Command::StateWrite(ops.collect())).await? {
            Response::Written(revisions) => Ok(revisions),
            other => Err(unexpected(other)),
        }
    }

    /// Every change of these keys that came after a revision.
    pub(crate) async fn watch(&self, prefixes: Vec<String>, after: u64) -> Result<Watch, StoreError> {
        let (session, outbox) = self.handle.open_session();
        let open = SessionOpen {
            session,
            front: Front::Internal,
            client_id: "".into(),
            clean_start: true,
            expiry_s: 0,
            receive_max: u16::MAX,
            will: None,
        };
        self.handle.send(Event::SessionOpened(open), 0).await?;
        let watch = Watch {
            handle: self.handle.clone(),
            key: Arc::clone(&self.key),
            outbox,
            queue: VecDeque::new(),
            owed: 0,
            ended: false,
        };
        let command = Command::StateWatch {
            session,
            origin: "".into(),
            space: Arc::clone(&self.space),
            prefixes,
            from: Some(after + 1),
            with_previous: true,
        };
        match self.handle.call(command).await {
            Ok(Response::Done) => Ok(watch),
            Ok(other) => {
                watch.close().await;
                Err(unexpected(other))
            }
            Err(stopped) => Err(stopped.into()),
        }
    }
}

fn unexpected(response: Response) -> StoreError {
    match response {
        Response::TooOld { oldest } => StoreError::TooOld { oldest },
        Response::Conflict { index, found } => StoreError::Conflict { index, found },
        Response::Refused(reason) => StoreError::Refused(reason),
        other => StoreError::Refused(format!("the broker answered something else: {other:?}")),
    }
}

/// A change of one object.
#[derive(Debug)]
pub(crate) struct Change {
    /// When it happened.
    pub(crate) revision: u64,
    /// What was before.
    pub(crate) previous: Option<Stored>,
    /// What is now.
    pub(crate) new: Option<Stored>,
}

/// Changes as they happen. Close it when it is done: the broker keeps a session for it.
#[derive(Debug)]
pub(crate) struct Watch {
    handle: Handle,
    key: Arc<SealKey>,
    outbox: Outbox,
    queue: VecDeque<Output>,
    /// Cost of what was taken and not yet reported.
    owed: usize,
    ended: bool,
}

impl Watch {
    /// The next change. Cancel safe: nothing is lost.
    pub(crate) async fn next(&mut self) -> Result<Change, StoreError> {
        loop {
            if let Some(change) = self.take()? {
                return Ok(change);
            }
            self.report().await?;
            if self.queue.is_empty() {
                self.outbox.recv(&mut self.queue).await;
            }
        }
    }

    /// Whether everything up to a revision that was read before this call has been returned by
    /// [`next`](Self::next): nothing waits, and nothing was held back for want of room.
    pub(crate) fn is_idle(&mut self) -> bool {
        self.queue.is_empty() && self.owed == 0 && !self.outbox.try_recv(&mut self.queue)
    }

    /// Tells the broker what was taken, so that it goes on.
    pub(crate) async fn report(&mut self) -> Result<(), StoreError> {
        if self.owed > 0 {
            let session = self.outbox.session();
            self.handle.send(Event::Sent { session, bytes: self.owed }, 0).await?;
            self.owed = 0;
        }
        Ok(())
    }

    /// Ends it.
    pub(crate) async fn close(self) {
        let closed = Event::SessionClosed { session: self.outbox.session(), clean: true };
        if self.handle.send(closed, 0).await.is_err() {
            tracing::debug!("the broker stopped before a watch was closed");
        }
    }

    fn take(&mut self) -> Result<Option<Change>, StoreError> {
        if self.ended {
            return Err(StoreError::Stopped(Stopped));
        }
        while let Some(output) = self.queue.pop_front() {
            self.owed += output.cost();
            match output {
                Output::State(StateEvent::Put { entry, previous }) => {
                    let new = Stored::of(&entry, &self.key);
                    let previous = previous.as_deref().map(|entry| Stored::of(entry, &self.key));
                    return Ok(Some(Change { revision: new.revision, previous, new: Some(new) }));
                }
                Output::State(StateEvent::Deleted { local, previous, .. }) => {
                    let previous = previous.as_deref().map(|entry| Stored::of(entry, &self.key));
                    return Ok(Some(Change { revision: local, previous, new: None }));
                }
                Output::State(StateEvent::TooOld { oldest }) => {
                    self.ended = true;
                    return Err(StoreError::TooOld { oldest });
                }
                Output::Close(_) => {
                    self.ended = true;
                    return Err(StoreError::Stopped(Stopped));
                }
                _ => {}
            }
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use broker::{Tasks, core, driver, store::mem::MemStore};

    use super::*;

    const KEY: &str = "core/secrets/default/s";

    async fn raw(handle: &Handle, key: &str) -> Bytes {
        let command = Command::StateGet { origin: "".into(), space: "k8s".into(), key: key.to_owned() };
        match handle.call(command).await.unwrap() {
            Response::Entry(Some(entry)) => entry.value(),
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test]
    async fn secrets_are_sealed_and_one_written_plainly_before_is_read() {
        let tasks = Tasks::new();
        let mem = MemStore::auto();
        let recovered = mem.recover();
        let handle = driver::start(core::Config::hub("hub", "test", [1; 16], 7), mem, recovered, &tasks);
        let store = Store::new(handle.clone(), "k8s".into(), SealKey::new([1; 32]));
        let secret = json!({"metadata": {"name": "s"}, "data": {"p": "aHVudGVyMg=="}});
        let old = Write {
            key: KEY.to_owned(),
            change: StateChange::Put(secret.to_string().into()),
            expect: Expect::Absent,
        };
        let plain = StateOp { space: "k8s".into(), key: old.key, change: old.change, expect: old.expect };
        assert!(matches!(handle.call(Command::StateWrite(vec![plain])).await.unwrap(), Response::Written(_)));
        let mut watch = store.watch(vec![KEY.to_owned()], 1).await.unwrap();
        let read = store.get(KEY).await.unwrap().expect("it is there");
        assert_eq!(json::text(&read.object, "data.p"), "aHVudGVyMg==");

        store.write(vec![Write::update(KEY.to_owned(), &read.object, read.revision).unwrap()]).await.unwrap();
        let map = "core/configmaps/default/m";
        store.write(vec![Write::create(map.to_owned(), &secret).unwrap()]).await.unwrap();
        let has = |bytes: &Bytes| bytes.windows(12).any(|part| part == b"aHVudGVyMg==");
        assert!(!has(&raw(&handle, KEY).await) && has(&raw(&handle, map).await));
        let change = watch.next().await.unwrap();
        for seen in [change.previous.unwrap(), change.new.unwrap(), store.get(KEY).await.unwrap().unwrap()] {
            assert_eq!(json::text(&seen.object, "data.p"), "aHVudGVyMg==");
        }
        watch.close().await;

        assert_eq!(store.unreadable().await.unwrap(), 0);
        let other = Store::new(handle, "k8s".into(), SealKey::new([2; 32]));
        assert_eq!(other.unreadable().await.unwrap(), 1);
        drop((store, other));
        tasks.drain(Duration::from_secs(5)).await;
    }
}
