//! Many brokers of nodes under one driver: how a load test runs thousands of agents in a process.
//!
//! A member is the agent's own [`Core`] over a store in memory. What it does not have is a driver, an inbox and
//! a timer of its own: one task owns all members, and a [`Handle`] says whose an event is. So a member that
//! idles costs its core and nothing else.
//!
//! # Invariants
//! - A member's core sees what it would see under [`driver::start`](crate::driver::start): one event at a
//!   time, time that goes forward, its groups durable in order. Nothing is ever lost or slow here, so a group
//!   is durable within the turn that wrote it.
//! - A member is made by its first event, and by nothing else.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BinaryHeap},
    fmt,
    sync::Arc,
    task::{Context, Poll, Waker},
    time::Duration,
};

use codec::Record;
use tokio::{
    sync::{mpsc, oneshot},
    time::{Instant, sleep_until},
};

use crate::{
    Tasks, clock,
    core::{
        Config, Core,
        event::{Action, CommandId, Event, Now, Response},
    },
    handle::{Handle, Input, Outboxes},
    limits,
    store::{Recovered, Store, StoreEvent, mem::MemStore},
};

/// The way to the members of a running fleet. Cloning shares it.
#[derive(Debug, Clone)]
pub struct Fleet {
    handle: Handle,
    members: u32,
}

/// Starts a driver of at most `members` brokers; `config` says what each of them is, when it is made. `observe`
/// sees every record that becomes durable at a member: it costs nothing where a session of each would.
///
/// It runs until every [`Handle`] is dropped, or until `tasks` stop.
pub fn start(
    members: u32,
    config: impl Fn(u32) -> Config + Send + 'static,
    observe: impl Fn(u32, &Record) + Send + 'static,
    tasks: &Tasks,
) -> Fleet {
    let (handle, inputs, outboxes) = Handle::new();
    let driver = Driver {
        started: Instant::now(),
        wall_us: 0,
        config,
        observe,
        members: (0..members).map(|_member| None).collect(),
        timers: BinaryHeap::new(),
        outboxes,
        actions: Vec::new(),
        replies: BTreeMap::new(),
        next_command: 1,
    };
    let stop = tasks.stopped();
    tasks.spawn("fleet driver", driver.run(inputs, stop));
    Fleet { handle, members }
}

impl Fleet {
    /// The broker of this number, counted from 0.
    ///
    /// # Panics
    /// If the fleet has fewer.
    #[must_use]
    pub fn member(&self, number: u32) -> Handle {
        assert!(number < self.members, "there are {} members", self.members);
        self.handle.of_member(number)
    }
}

/// A broker that has begun.
struct Member {
    core: Core,
    store: MemStore,
    /// When the heap wakes it at the latest.
    armed: Option<Duration>,
}

struct Driver<C, O> {
    started: Instant,
    /// The latest wall time: it never runs backwards within a process.
    wall_us: u64,
    config: C,
    observe: O,
    members: Vec<Option<Box<Member>>>,
    /// When who may have something due. What is no longer true is skipped when it comes up.
    timers: BinaryHeap<Reverse<(Duration, u32)>>,
    outboxes: Arc<Outboxes>,
    actions: Vec<Action>,
    replies: BTreeMap<CommandId, oneshot::Sender<Response>>,
    next_command: CommandId,
}

impl<C: Fn(u32) -> Config, O: Fn(u32, &Record)> Driver<C, O> {
    async fn run(mut self, mut inputs: mpsc::Receiver<Input>, stop: tokio_util::sync::CancellationToken) {
        loop {
            let due = self.timers.peek().map(|Reverse((at, _))| self.started + *at);
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
                input = inputs.recv() => match input {
                    Some(input) => self.on_inputs(input, &mut inputs),
                    None => return,
                },
                () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => self.fire(),
            }
        }
    }

    fn now(&mut self) -> Now {
        self.wall_us = self.wall_us.max(clock::wall_us());
        Now {
            mono: self.started.elapsed(),
            wall_us: self.wall_us,
            trusted: self.wall_us >= clock::TRUSTED_FROM_US,
        }
    }

    /// Applies what has come in, as far as one turn goes.
    fn on_inputs(&mut self, first: Input, inputs: &mut mpsc::Receiver<Input>) {
        let mut next = Some(first);
        let mut applied = 0;
        while let Some(input) = next {
            match input {
                Input::Event { member, event, _permit } => self.apply(member, event),
                Input::Command { member, command, reply } => {
                    let id = self.next_command;
                    self.next_command += 1;
                    self.replies.insert(id, reply);
                    self.apply(member, Event::Commanded { command, id });
                }
            }
            applied += 1;
            next = if applied < limits::TURN_MAX { inputs.try_recv().ok() } else { None };
        }
    }

    /// Tells the time to whoever asked for it, as far as one turn goes.
    fn fire(&mut self) {
        let now = self.started.elapsed();
        for _ in 0..limits::TURN_MAX {
            match self.timers.peek() {
                Some(Reverse((at, _))) if *at <= now => {}
                Some(_) | None => return,
            }
            let Some(Reverse((at, number))) = self.timers.pop() else { return };
            let Some(member) = self.members[number as usize].as_mut() else { continue };
            // An earlier time was put in front of this one, and has been.
            if member.armed != Some(at) {
                continue;
            }
            member.armed = None;
            self.apply(number, Event::TimerFired);
        }
    }

    fn apply(&mut self, number: u32, event: Event) {
        let now = self.now();
        let mut member = match self.members[number as usize].take() {
            Some(member) => member,
            None => {
                let core = Core::restore((self.config)(number), Recovered::default(), now, &mut self.actions);
                let mut member = Box::new(Member { core, store: MemStore::of_logs(), armed: None });
                self.perform(number, &mut member, now);
                member
            }
        };
        member.core.apply(now, event, &mut self.actions);
        self.perform(number, &mut member, now);
        if let Some(at) = member.core.deadline()
            && member.armed.is_none_or(|armed| at < armed)
        {
            member.armed = Some(at);
            self.timers.push(Reverse((at, number)));
        }
        self.members[number as usize] = Some(member);
    }

    /// Performs what the core wants, and what follows from it, until nothing does.
    fn perform(&mut self, number: u32, member: &mut Member, now: Now) {
        loop {
            for action in std::mem::take(&mut self.actions) {
                match action {
                    Action::Persist(group) => {
                        // Durable within this turn, and nothing is said before.
                        group.records.iter().for_each(|record| (self.observe)(number, record));
                        member.store.submit(group);
                    }
                    Action::Read(request) => member.store.read(request),
                    Action::Output { session, output } => {
                        let outboxes = self.outboxes.lock().expect("no panic under this lock");
                        if let Some(outbox) = outboxes.get(&session) {
                            outbox.fill().push(output);
                        }
                    }
                    Action::Tier(ask) => unreachable!("a node is no replica of a tier: {ask:?}"),
                    Action::Respond { id, response } => {
                        if let Some(reply) = self.replies.remove(&id) {
                            // Nobody waits any more: the command was run all the same.
                            drop(reply.send(response));
                        }
                    }
                }
            }
            let mut context = Context::from_waker(Waker::noop());
            let Poll::Ready(event) = member.store.poll_event(&mut context) else { return };
            let event = match event {
                StoreEvent::Persisted(lsn) => Event::Persisted(lsn),
                StoreEvent::Read { read, records, next } => Event::ReadDone { read, records, next },
                other => unreachable!("a store in memory that nobody disturbs: {other:?}"),
            };
            member.core.apply(now, event, &mut self.actions);
        }
    }
}

impl<C, O> fmt::Debug for Driver<C, O> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Driver").field("members", &self.members.len()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::core::event::{Command, Expect, StateChange, StateOp};

    #[tokio::test]
    async fn members_share_a_driver_and_nothing_else() {
        let tasks = Tasks::new();
        let config = |number: u32| Config::node(&format!("n{number}"), [number as u8; 16], number.into());
        let fleet = start(2, config, |_, _| {}, &tasks);
        let op = StateOp {
            space: "status".into(),
            key: "a".to_owned(),
            change: StateChange::Put(Bytes::from_static(b"1")),
            expect: Expect::Absent,
        };
        let written = fleet.member(0).call(Command::StateWrite(vec![op])).await.unwrap();
        assert!(matches!(written, Response::Written(_)), "{written:?}");
        for (number, expected) in [(0, true), (1, false)] {
            let origin = format!("n{number}").into();
            let get = Command::StateGet { origin, space: "status".into(), key: "a".to_owned() };
            let Response::Entry(entry) = fleet.member(number).call(get).await.unwrap() else { panic!() };
            assert_eq!(entry.is_some(), expected, "member {number}");
        }
    }
}
