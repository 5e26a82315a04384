//! The one task that owns a core: select, apply, perform.
//!
//! Every arm of the select is cancel safe (`recv`, `poll_event`, `sleep_until`) and only yields an event;
//! nothing is awaited while one is handled. Backpressure: while too many bytes wait for the store, no more
//! input is taken, and the byte permits of the senders carry that to the sockets.

use std::{collections::BTreeMap, future::poll_fn, sync::Arc, time::Duration};

use codec::Record;
use tokio::{
    sync::{mpsc, oneshot},
    time::{Instant, sleep_until},
};

use crate::{
    Tasks, clock,
    core::{
        Config, Core, Latencies,
        event::{Action, CommandId, Event, Group, Lsn, Now, Origin, Response, SessionId, tier::News},
    },
    handle::{Filling, Handle, Input, Outboxes},
    limits,
    store::{Recovered, Store, StoreEvent},
};

/// A refused group is tried again after this long.
const RETRY: Duration = Duration::from_secs(1);

/// Starts a broker over an opened store.
///
/// The driver runs until every [`Handle`] is dropped, or until `tasks` stop and a
/// [`Command::Drain`](crate::event::Command::Drain) is done; the store is dropped, and so closed, with it.
#[must_use]
pub fn start<S: Store>(config: Config, store: S, recovered: Recovered, tasks: &Tasks) -> Handle {
    let (handle, inputs, outboxes) = Handle::new();
    let mut driver = Driver {
        started: Instant::now(),
        wall_us: 0,
        core: None,
        store,
        outboxes,
        actions: Vec::new(),
        room: if config.shared { limits::LINKS_WINDOW_BYTES } else { limits::UNPERSISTED_BYTES_MAX },
        unpersisted: Unpersisted::default(),
        retry_at: None,
        flush: Latencies::default(),
        replies: BTreeMap::new(),
        next_command: 1,
    };
    let now = driver.now();
    let core = Core::restore(config, recovered, now, &mut driver.actions);
    driver.core = Some(core);
    let stop = tasks.stopped();
    tasks.spawn("driver", async move {
        driver.perform();
        driver.run(inputs, stop).await;
    });
    handle
}

struct Driver<S> {
    started: Instant,
    /// The latest wall time: it never runs backwards within a process.
    wall_us: u64,
    core: Option<Core>,
    store: S,
    outboxes: Arc<Outboxes>,
    actions: Vec<Action>,
    /// Groups handed to the store and not yet durable, by lane, to hand over again if it refuses.
    unpersisted: Unpersisted,
    /// Bytes of them above which no more input is taken. In a tier one full stream holds up its nodes, as far as
    /// they may have bytes on the way, and nobody else.
    room: usize,
    retry_at: Option<Instant>,
    flush: Latencies,
    replies: BTreeMap<CommandId, oneshot::Sender<Response>>,
    next_command: CommandId,
}

/// A group that the store has.
struct Handed {
    group: Group,
    bytes: usize,
    at: Instant,
}

/// Groups that the store has, by lane and lsn.
#[derive(Default)]
struct Unpersisted {
    groups: BTreeMap<(Origin, Lsn), Handed>,
    bytes: usize,
}

impl Unpersisted {
    fn push(&mut self, handed: Handed) {
        self.bytes += handed.bytes;
        self.groups.insert((Arc::clone(&handed.group.lane), handed.group.lsn), handed);
    }

    /// Takes out the groups of a lane up to `lsn`.
    fn take(&mut self, lane: &Origin, lsn: Lsn) -> Vec<Handed> {
        let upto = (Arc::clone(lane), 0)..=(Arc::clone(lane), lsn);
        let keys: Vec<(Origin, Lsn)> = self.groups.range(upto).map(|(key, _)| key.clone()).collect();
        let taken: Vec<Handed> = keys.iter().filter_map(|key| self.groups.remove(key)).collect();
        self.bytes -= taken.iter().map(|handed| handed.bytes).sum::<usize>();
        taken
    }

    /// Groups of a node, or of all, will not be durable by this process.
    fn abandon(&mut self, node: &Origin) {
        if node.is_empty() {
            *self = Self::default();
        } else {
            self.take(node, Lsn::MAX);
        }
    }
}

/// What a turn of the loop begins with.
enum Woken {
    Stored(StoreEvent),
    Input(Option<Input>),
    Time,
    Retry,
}

impl<S: Store> Driver<S> {
    async fn run(mut self, mut inputs: mpsc::Receiver<Input>, stop: tokio_util::sync::CancellationToken) {
        loop {
            let deadline = self.core().deadline();
            let has_room = self.unpersisted.bytes < self.room;
            // Completions before data: they free what data waits for. Time last: it is never urgent.
            let woken = tokio::select! {
                biased;
                event = poll_fn(|cx| self.store.poll_event(cx)) => Woken::Stored(event),
                () = until(self.retry_at) => Woken::Retry,
                input = inputs.recv(), if has_room => Woken::Input(input),
                () = until(deadline.map(|at| self.started + at)) => Woken::Time,
                () = stop.cancelled(), if self.core().is_drained() => return,
            };
            match woken {
                Woken::Stored(event) => self.on_stored(event),
                Woken::Input(Some(input)) => self.on_inputs(input, &mut inputs),
                Woken::Input(None) => return,
                Woken::Time => self.apply(Event::TimerFired),
                Woken::Retry => self.retry(),
            }
            self.perform();
        }
    }

    fn core(&self) -> &Core {
        self.core.as_ref().expect("set before the first turn")
    }

    fn now(&mut self) -> Now {
        self.wall_us = self.wall_us.max(clock::wall_us());
        Now {
            mono: self.started.elapsed(),
            wall_us: self.wall_us,
            trusted: self.wall_us >= clock::TRUSTED_FROM_US,
        }
    }

    fn apply(&mut self, event: Event) {
        let now = self.now();
        self.core.as_mut().expect("set before the first turn").apply(now, event, &mut self.actions);
    }

    /// Applies what has come in, as far as one turn goes.
    fn on_inputs(&mut self, first: Input, inputs: &mut mpsc::Receiver<Input>) {
        let mut next = Some(first);
        let mut applied = 0;
        while let Some(input) = next {
            match input {
                Input::Event { event, _permit, member: _ } => self.apply(event),
                Input::Command { command, reply, member: _ } => {
                    let id = self.next_command;
                    self.next_command += 1;
                    self.replies.insert(id, reply);
                    self.apply(Event::Commanded { command, id });
                }
            }
            applied += 1;
            next = if applied < limits::TURN_MAX { inputs.try_recv().ok() } else { None };
        }
    }

    fn on_stored(&mut self, event: StoreEvent) {
        match event {
            StoreEvent::Persisted(lsn) => {
                self.forget(&Origin::default(), lsn);
                self.apply(Event::Persisted(lsn));
            }
            StoreEvent::Read { read, records, next } => self.apply(Event::ReadDone { read, records, next }),
            StoreEvent::Low { reason } => {
                tracing::warn!(reason, "the store is low on space; new data is refused");
                self.apply(Event::StoreLow { reason });
            }
            StoreEvent::Ample => self.apply(Event::StoreAmple),
            StoreEvent::Damaged(damage) => self.apply(Event::StoreDamaged(damage)),
            StoreEvent::Tier(news) => {
                if let News::Written { node, lsn } = &news {
                    self.forget(node, *lsn);
                }
                if let News::Fenced { node, .. } = &news {
                    self.unpersisted.abandon(node);
                }
                self.apply(Event::Tier(news));
            }
            StoreEvent::Refused { lsn, reason } => {
                if self.retry_at.is_none() {
                    tracing::error!(lsn, reason, "the store refused a write; it is tried again");
                    self.retry_at = Some(Instant::now() + RETRY);
                    self.apply(Event::StoreRefused { lsn, reason });
                }
            }
        }
    }

    /// Groups of a lane up to `lsn` are durable.
    fn forget(&mut self, lane: &Origin, lsn: Lsn) {
        let now = Instant::now();
        for handed in self.unpersisted.take(lane, lsn) {
            self.flush.observe(now - handed.at);
        }
    }

    /// Hands the refused group and everything after it over again.
    fn retry(&mut self) {
        self.retry_at = None;
        for handed in self.unpersisted.groups.values() {
            self.store.submit(handed.group.clone());
        }
    }

    fn perform(&mut self) {
        if self.actions.is_empty() {
            return;
        }
        let at = Instant::now();
        let outboxes = Arc::clone(&self.outboxes);
        let outboxes = outboxes.lock().expect("no panic under this lock");
        // Outputs in a row for one session take its lock once.
        let mut filling: Option<(SessionId, Filling<'_>)> = None;
        for action in self.actions.drain(..) {
            match action {
                Action::Persist(group) => {
                    let bytes = group.records.iter().map(Record::wire_len).sum();
                    // While a retry is pending the store gets nothing out of order.
                    if self.retry_at.is_none() {
                        self.store.submit(group.clone());
                    }
                    self.unpersisted.push(Handed { group, bytes, at });
                }
                Action::Output { session, output } => {
                    if filling.as_ref().is_none_or(|(open, _)| *open != session) {
                        // The one before is closed before the next is opened: one lock at a time.
                        drop(filling.take());
                        filling = outboxes.get(&session).map(|outbox| (session, outbox.fill()));
                    }
                    if let Some((_, outbox)) = &mut filling {
                        outbox.push(output);
                    }
                }
                Action::Read(request) => self.store.read(request),
                Action::Tier(ask) => {
                    // Whatever an earlier adoption left is dropped with it.
                    self.unpersisted.take(ask.node(), Lsn::MAX);
                    self.store.ask(ask);
                }
                Action::Respond { id, mut response } => {
                    if let Response::Stats(stats) = &mut response {
                        stats.flush = self.flush.clone();
                    }
                    if let Some(reply) = self.replies.remove(&id) {
                        // Nobody waits any more: the command was run all the same.
                        drop(reply.send(response));
                    }
                }
            }
        }
    }
}

async fn until(at: Option<Instant>) {
    match at {
        Some(at) => sleep_until(at).await,
        None => std::future::pending().await,
    }
}
