//! What is to be done towards the API server: each thing once, however often it became due, few at a time.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use futures_util::{FutureExt as _, StreamExt as _, future::BoxFuture, stream::FuturesUnordered};
use tokio::time::{Instant, sleep_until};

/// At a time: enough to use a budget of hundreds per second at some 10 ms each.
const AT_ONCE: usize = 16;
const RETRY_MIN: Duration = Duration::from_millis(500);
const RETRY_MAX: Duration = Duration::from_secs(60);

/// What can be due. The order is that in which things are done that are due together.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Task {
    /// The Node object of a node.
    Node(Arc<str>),
    /// Fetch what pods name.
    Fetch(Arc<str>),
    /// Fetch the pods of a node.
    Pods(Arc<str>),
    /// Request a token.
    Token(Arc<str>),
    /// Write what a node says of a pod.
    Status(Arc<str>),
    /// Delete a pod that its node is done with.
    Delete(Arc<str>),
    /// A pod stays where it is while its node is away.
    Tolerate(Arc<str>),
    /// A pod is made anew elsewhere, because its node is away.
    Evict(Arc<str>),
    /// Renew the Lease of a node.
    Lease(Arc<str>),
    /// The mirror of a static pod.
    Static(Arc<str>),
    /// An event, by what makes two the same.
    Event(u64),
}

/// Things to do, and things that are being done.
pub(super) struct Work<D> {
    due: BTreeMap<Task, Instant>,
    /// The same by time.
    order: BTreeSet<(Instant, Task)>,
    /// What is being done; with when it is due once more.
    busy: BTreeMap<Task, Option<Instant>>,
    failures: BTreeMap<Task, u32>,
    running: FuturesUnordered<BoxFuture<'static, (Task, D)>>,
}

impl<D> std::fmt::Debug for Work<D> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Work").field("due", &self.due).field("busy", &self.busy).finish_non_exhaustive()
    }
}

/// What comes next.
#[derive(Debug)]
pub(super) enum Next<D> {
    /// This is to be done now: [`Work::start`] it.
    Due(Task),
    /// This has been done.
    Done(Task, D),
}

impl<D: Send + 'static> Work<D> {
    pub(super) fn new() -> Self {
        Self {
            due: BTreeMap::new(),
            order: BTreeSet::new(),
            busy: BTreeMap::new(),
            failures: BTreeMap::new(),
            running: FuturesUnordered::new(),
        }
    }

    /// Something is to be done, now; once more if it is being done already.
    pub(super) fn put(&mut self, task: Task) {
        self.put_at(task, Instant::now());
    }

    /// The same at a time, unless it is due sooner.
    pub(super) fn put_at(&mut self, task: Task, at: Instant) {
        if let Some(again) = self.busy.get_mut(&task) {
            *again = Some(again.map_or(at, |sooner| sooner.min(at)));
            return;
        }
        if let Some(held) = self.due.get(&task).copied() {
            if held <= at {
                return;
            }
            self.order.remove(&(held, task.clone()));
        }
        self.order.insert((at, task.clone()));
        self.due.insert(task, at);
    }

    /// It need not be done any more.
    pub(super) fn drop_due(&mut self, task: &Task) {
        if let Some(at) = self.due.remove(task) {
            self.order.remove(&(at, task.clone()));
        }
        if let Some(again) = self.busy.get_mut(task) {
            *again = None;
        }
        self.failures.remove(task);
    }

    /// Whether it is to be done or is being done.
    pub(super) fn is_open(&self, task: &Task) -> bool {
        self.due.contains_key(task) || self.busy.contains_key(task)
    }

    /// Starts something that [`next`](Self::next) said was due.
    pub(super) fn start(&mut self, task: Task, doing: impl Future<Output = D> + Send + 'static) {
        self.busy.insert(task.clone(), None);
        self.running.push(doing.map(move |done| (task, done)).boxed());
    }

    /// It was done.
    pub(super) fn succeeded(&mut self, task: &Task) {
        self.failures.remove(task);
    }

    /// It is to be tried again, later each time.
    pub(super) fn failed(&mut self, task: Task) {
        let failures = self.failures.entry(task.clone()).or_default();
        let wait = RETRY_MIN.saturating_mul(1 << (*failures).min(16)).min(RETRY_MAX);
        *failures += 1;
        self.put_at(task, Instant::now() + wait);
    }

    /// What comes next. Cancel safe: what is due stays due until it is returned.
    pub(super) async fn next(&mut self) -> Next<D> {
        loop {
            let first = self.order.first().filter(|_| self.running.len() < AT_ONCE).cloned();
            let due = first.as_ref().map(|(at, _)| *at);
            if let Some((_, task)) = first.filter(|(at, _)| *at <= Instant::now()) {
                self.order.pop_first();
                self.due.remove(&task);
                return Next::Due(task);
            }
            let sleep = async {
                match due {
                    Some(at) => sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                Some((task, done)) = self.running.next() => {
                    if let Some(Some(again)) = self.busy.remove(&task) {
                        self.put_at(task.clone(), again);
                    }
                    return Next::Done(task, done);
                }
                () = sleep => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(name: &str) -> Task {
        Task::Status(name.into())
    }

    #[tokio::test(start_paused = true)]
    async fn what_became_due_while_it_was_being_done_is_done_once_more_afterwards() {
        let mut work = Work::new();
        for _ in 0..5 {
            work.put(status("a"));
        }
        let Next::Due(task) = work.next().await else { panic!("it is due") };
        work.start(task, async { tokio::time::sleep(Duration::from_secs(1)).await });
        work.put(status("a"));
        work.put(status("a"));
        assert!(matches!(work.next().await, Next::Done(..)));
        assert!(matches!(work.next().await, Next::Due(_)));
        assert!(work.due.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn what_fails_is_tried_again_later_each_time() {
        let mut work = Work::<()>::new();
        let begun = Instant::now();
        let mut waits = Vec::new();
        for _ in 0..4 {
            work.failed(status("a"));
            assert!(matches!(work.next().await, Next::Due(_)));
            waits.push(begun.elapsed().as_millis());
        }
        assert_eq!(waits, [500, 1_500, 3_500, 7_500]);
    }
}
