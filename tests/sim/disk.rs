//! A simulated disk, and what a driver does with it: groups in order, and again after a refusal.

use std::{
    collections::VecDeque,
    task::{Context, Poll, Waker},
    time::Duration,
};

use broker::{
    core::event::{Group, ReadRequest},
    store::{Recovered, Store, StoreEvent, mem::MemStore},
};
use octobus_tests::script::Health;

use crate::shadow::Shadow;

/// A refused group is handed over again after this long.
const RETRY: Duration = Duration::from_secs(1);

/// A store, what it was given, and the oracle's memory of it.
#[derive(Debug, Default)]
pub(crate) struct Disk {
    store: MemStore,
    handed: VecDeque<Group>,
    retry_at: Option<Duration>,
    stuck: bool,
    low: bool,
    pub(crate) shadow: Shadow,
}

/// A copy of a disk.
#[derive(Debug)]
pub(crate) struct Copy {
    store: MemStore,
    shadow: Shadow,
}

impl Disk {
    pub(crate) fn recover(&self) -> Recovered {
        self.store.recover()
    }

    pub(crate) fn persist(&mut self, group: Group) {
        // While a retry is pending the store gets nothing out of order.
        if self.retry_at.is_none() {
            self.store.submit(group.clone());
        }
        self.handed.push_back(group);
    }

    pub(crate) fn read(&mut self, request: ReadRequest) {
        self.store.read(request);
    }

    /// Makes some of what waits durable, if the disk works.
    pub(crate) fn sync(&mut self, now: Duration, groups: usize) {
        if self.stuck {
            return;
        }
        if self.retry_at.is_some_and(|at| at <= now) {
            self.retry_at = None;
            for group in &self.handed {
                self.store.submit(group.clone());
            }
        }
        self.store.flush_some(groups);
    }

    /// The next completion, as a driver tells it.
    pub(crate) fn poll(&mut self, now: Duration) -> Option<StoreEvent> {
        let mut cx = Context::from_waker(Waker::noop());
        let Poll::Ready(event) = self.store.poll_event(&mut cx) else { return None };
        match &event {
            StoreEvent::Persisted(lsn) => {
                while self.handed.front().is_some_and(|group| group.lsn <= *lsn) {
                    let group = self.handed.pop_front().expect("looked at the front");
                    self.shadow.apply(&group);
                }
            }
            StoreEvent::Refused { .. } => self.retry_at = Some(now + RETRY),
            _ => {}
        }
        Some(event)
    }

    pub(crate) fn set(&mut self, health: Health) {
        self.stuck = health == Health::Stuck;
        let low = health == Health::Low;
        if std::mem::replace(&mut self.low, low) != low {
            self.store.set_low(low.then_some("no room for another segment"));
        }
        self.store.refuse((health == Health::Full).then_some("No space left on device"));
    }

    pub(crate) fn unsynced(&self) -> usize {
        self.handed.len()
    }

    /// The power is cut: what was not durable is gone.
    pub(crate) fn crash(&mut self) -> Recovered {
        let (store, recovered) = std::mem::take(&mut self.store).crash();
        self.store = store;
        self.handed.clear();
        self.retry_at = None;
        self.stuck = false;
        self.low = false;
        recovered
    }

    pub(crate) fn copy(&self) -> Copy {
        let mut shadow = self.shadow.clone();
        shadow.news.clear();
        Copy { store: self.store.copy(), shadow }
    }
}

impl From<&Copy> for Disk {
    fn from(copy: &Copy) -> Self {
        Self { store: copy.store.copy(), shadow: copy.shadow.clone(), ..Self::default() }
    }
}
