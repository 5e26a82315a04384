//! How fronts, links, modules and administration talk to a running broker.

use std::{
    collections::{HashMap, VecDeque},
    future::poll_fn,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicU64, Ordering},
    },
    task::{Poll, Waker},
};

use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};

use crate::{
    core::event::{Command, Event, Output, Response, SessionId},
    limits,
};

/// The broker has stopped, or refuses to take more.
#[derive(Debug, thiserror::Error)]
#[error("the broker has stopped")]
pub struct Stopped;

/// A cloneable way to a running broker.
#[derive(Debug, Clone)]
pub struct Handle {
    shared: Arc<Shared>,
    /// Which of the brokers behind one driver; see [`fleet`](crate::fleet). 0 where there is one.
    member: u32,
}

#[derive(Debug)]
struct Shared {
    inputs: mpsc::Sender<Input>,
    budget: Arc<Semaphore>,
    next_session: AtomicU64,
    outboxes: Arc<Outboxes>,
}

/// The senders' side of every session's outbox, shared with the driver.
pub(crate) type Outboxes = Mutex<HashMap<SessionId, Arc<OutboxShared>, foldhash::fast::RandomState>>;

/// What the driver receives.
#[derive(Debug)]
pub(crate) enum Input {
    /// The permit is given back when the event has been applied.
    Event {
        member: u32,
        event: Event,
        _permit: Option<OwnedSemaphorePermit>,
    },
    Command {
        member: u32,
        command: Command,
        reply: oneshot::Sender<Response>,
    },
}

impl Handle {
    pub(crate) fn new() -> (Self, mpsc::Receiver<Input>, Arc<Outboxes>) {
        let (inputs, receiver) = mpsc::channel(limits::INPUTS_MAX);
        let outboxes = Arc::new(Outboxes::default());
        let shared = Shared {
            inputs,
            budget: Arc::new(Semaphore::new(limits::INPUT_BYTES_MAX / limits::PERMIT_BYTES)),
            next_session: AtomicU64::new(1),
            outboxes: Arc::clone(&outboxes),
        };
        (Self { shared: Arc::new(shared), member: 0 }, receiver, outboxes)
    }

    /// The same driver's way to another of its brokers.
    pub(crate) fn of_member(&self, member: u32) -> Self {
        Self { shared: Arc::clone(&self.shared), member }
    }

    /// A number and an outbox for a new session. Tell the broker with [`Event::SessionOpened`] or
    /// [`Event::LinkOpened`]; dropping the outbox forgets the queue but not the session.
    #[must_use]
    pub fn open_session(&self) -> (SessionId, Outbox) {
        let session = SessionId(self.shared.next_session.fetch_add(1, Ordering::Relaxed));
        let shared = Arc::new(OutboxShared::default());
        self.shared.outboxes.lock().expect("no panic under this lock").insert(session, Arc::clone(&shared));
        (session, Outbox { session, shared, outboxes: Arc::clone(&self.shared.outboxes) })
    }

    /// Waits for room for `bytes` (the event's payload), then hands the event over.
    ///
    /// Only readers of sockets wait here: their number is bounded and the socket carries the
    /// backpressure to the peer. Cancel safe: either the event was handed over or nothing happened.
    ///
    /// # Errors
    /// The broker has stopped.
    pub async fn send(&self, event: Event, bytes: usize) -> Result<(), Stopped> {
        let permits = bytes.min(limits::INPUT_BYTES_MAX / 2).div_ceil(limits::PERMIT_BYTES);
        let permit = if permits == 0 {
            None
        } else {
            let permits = u32::try_from(permits).expect("bounded by INPUT_BYTES_MAX");
            let budget = Arc::clone(&self.shared.budget);
            Some(budget.acquire_many_owned(permits).await.map_err(|_closed| Stopped)?)
        };
        let input = Input::Event { member: self.member, event, _permit: permit };
        self.shared.inputs.send(input).await.map_err(|_closed| Stopped)
    }

    /// Runs a command and waits for its answer. Dropping the future leaves the command running.
    ///
    /// # Errors
    /// The broker has stopped.
    pub async fn call(&self, command: Command) -> Result<Response, Stopped> {
        let (reply, answer) = oneshot::channel();
        let input = Input::Command { member: self.member, command, reply };
        self.shared.inputs.send(input).await.map_err(|_closed| Stopped)?;
        answer.await.map_err(|_closed| Stopped)
    }
}

/// What the broker has for one session. The core bounds it in bytes: it stops filling a queue whose
/// bytes were not reported as [`Event::Sent`].
#[derive(Debug)]
pub struct Outbox {
    session: SessionId,
    shared: Arc<OutboxShared>,
    outboxes: Arc<Outboxes>,
}

#[derive(Debug, Default)]
pub(crate) struct OutboxShared(Mutex<Outputs>);

#[derive(Debug, Default)]
struct Outputs {
    queue: VecDeque<Output>,
    /// Waits for an empty queue to have something.
    receiver: Option<Waker>,
}

impl OutboxShared {
    /// Opens the queue for several outputs in a row. The receiver is told when this is dropped.
    pub(crate) fn fill(&self) -> Filling<'_> {
        Filling(Some(self.lock()))
    }

    fn lock(&self) -> MutexGuard<'_, Outputs> {
        self.0.lock().expect("no panic under this lock")
    }

    #[cfg(test)]
    pub(crate) fn push(&self, output: Output) {
        self.fill().push(output);
    }
}

/// An outbox that the driver is filling.
#[derive(Debug)]
pub(crate) struct Filling<'a>(Option<MutexGuard<'a, Outputs>>);

impl Filling<'_> {
    pub(crate) fn push(&mut self, output: Output) {
        self.0.as_mut().expect("held until dropped").queue.push_back(output);
    }
}

impl Drop for Filling<'_> {
    fn drop(&mut self) {
        let receiver = self.0.take().and_then(|mut outputs| match outputs.queue.is_empty() {
            true => None,
            false => outputs.receiver.take(),
        });
        if let Some(receiver) = receiver {
            receiver.wake();
        }
    }
}

impl Outbox {
    /// Whose it is.
    #[must_use]
    pub fn session(&self) -> SessionId {
        self.session
    }

    /// Waits until there is something, then moves all of it into `into`. Cancel safe.
    pub async fn recv(&mut self, into: &mut VecDeque<Output>) {
        poll_fn(|cx| {
            let mut outputs = self.shared.lock();
            if outputs.give(into) {
                return Poll::Ready(());
            }
            if !outputs.receiver.as_ref().is_some_and(|receiver| receiver.will_wake(cx.waker())) {
                outputs.receiver = Some(cx.waker().clone());
            }
            Poll::Pending
        })
        .await;
    }

    /// Moves what there is into `into`; false if there was nothing.
    pub fn try_recv(&mut self, into: &mut VecDeque<Output>) -> bool {
        self.shared.lock().give(into)
    }
}

impl Outputs {
    fn give(&mut self, into: &mut VecDeque<Output>) -> bool {
        if self.queue.is_empty() {
            return false;
        }
        if into.is_empty() {
            std::mem::swap(&mut self.queue, into);
        } else {
            into.append(&mut self.queue);
        }
        true
    }
}

impl Drop for Outbox {
    fn drop(&mut self) {
        self.outboxes.lock().expect("no panic under this lock").remove(&self.session);
    }
}
