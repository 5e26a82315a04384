//! The one way to start a task: it has a name, is counted, and is drained when the process stops.

use std::{future::Future, io, time::Duration};

use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// A group of tasks that stop together. Cloning shares the group.
#[derive(Debug, Clone, Default)]
pub struct Tasks {
    tracker: TaskTracker,
    stop: CancellationToken,
}

/// How a drain ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Drained {
    /// Every task ended by itself.
    Clean,
    /// This many tasks were still running at the deadline.
    Forced(usize),
}

impl Tasks {
    /// A new group.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Fires when the group is asked to stop. Every long-lived task selects on it first.
    #[must_use]
    pub fn stopped(&self) -> CancellationToken {
        self.stop.clone()
    }

    /// Starts a task. A panic in it is logged and takes down nothing else.
    #[allow(clippy::disallowed_methods)] // this is the function that the ban points to
    pub fn spawn<F>(&self, name: &'static str, future: F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        drop(tokio::spawn(self.tracker.track_future(async move {
            let _watch = Watch(name);
            future.await;
        })));
    }

    /// Runs what `make` gives on a thread of its own, with a runtime of its own: what it spawns runs there too.
    ///
    /// # Errors
    /// The system gives no thread or no runtime.
    pub fn spawn_thread<F>(
        &self,
        name: &'static str,
        make: impl FnOnce() -> F + Send + 'static,
    ) -> io::Result<()>
    where
        F: Future<Output = ()>,
    {
        let token = self.tracker.token();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || {
            let _watch = Watch(name);
            runtime.block_on(async { make().await });
            drop(token);
        });
        thread.map(drop)
    }

    /// Asks every task to stop and waits for them until the deadline.
    pub async fn drain(&self, deadline: Duration) -> Drained {
        self.stop.cancel();
        self.tracker.close();
        match tokio::time::timeout(deadline, self.tracker.wait()).await {
            Ok(()) => Drained::Clean,
            Err(_elapsed) => Drained::Forced(self.tracker.len()),
        }
    }
}

/// Goes with its task, and says so if that panicked.
struct Watch(&'static str);

impl Drop for Watch {
    fn drop(&mut self) {
        if std::thread::panicking() {
            tracing::error!(task = self.0, "task panicked");
        }
    }
}
