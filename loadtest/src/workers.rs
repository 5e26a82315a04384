//! The processes of the fleet, as the director sees them.

use std::{process::Stdio, time::Duration};

use tokio::{
    io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader},
    process::{Child, ChildStdin, Command},
    sync::mpsc,
    task::JoinSet,
    time::{Instant, timeout, timeout_at},
};

use crate::wire::{Counts, News, Numbers, Order, Plan};

/// A worker that does not answer for this long is lost.
const ANSWER: Duration = Duration::from_secs(60);
/// How long workers have to end in an orderly way.
const STOP: Duration = Duration::from_secs(30);
/// News of all workers that wait for the director.
const NEWS_WAITING: usize = 1024;

/// Why the fleet cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// No process.
    #[error("cannot start a worker: {0}")]
    Spawn(std::io::Error),
    /// It says why.
    #[error("a worker gave up: {0}")]
    Failed(String),
    /// It ended or is stuck.
    #[error("worker {0} has ended or does not answer")]
    Lost(usize),
}

/// All workers. Dropping them kills them.
#[derive(Debug)]
pub struct Workers {
    workers: Vec<Worker>,
    news: mpsc::Receiver<(usize, Option<News>)>,
    /// Readers of the workers' output.
    _readers: JoinSet<()>,
}

#[derive(Debug)]
struct Worker {
    child: Child,
    input: ChildStdin,
    counts: Counts,
    /// Resident memory before its first node.
    rss: u64,
    answer: Option<Numbers>,
}

impl Workers {
    /// Starts a process for each plan and waits until all are ready.
    ///
    /// # Errors
    /// See [`WorkerError`].
    pub async fn start(plans: Vec<Plan>) -> Result<Self, WorkerError> {
        let (sender, news) = mpsc::channel(NEWS_WAITING);
        let mut readers = JoinSet::new();
        let mut workers = Vec::new();
        for (number, plan) in plans.into_iter().enumerate() {
            let own = std::env::current_exe().map_err(WorkerError::Spawn)?;
            let mut child = Command::new(own)
                .arg("--worker")
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .kill_on_drop(true)
                .spawn()
                .map_err(WorkerError::Spawn)?;
            let (input, output) = (child.stdin.take(), child.stdout.take());
            let (Some(input), Some(output)) = (input, output) else { return Err(WorkerError::Lost(number)) };
            let sender = sender.clone();
            readers.spawn(async move {
                let mut lines = BufReader::new(output).lines();
                loop {
                    let line = lines.next_line().await.ok().flatten();
                    let news = line.and_then(|line| serde_json::from_str(&line).ok());
                    let ended = news.is_none();
                    if sender.send((number, news)).await.is_err() || ended {
                        return;
                    }
                }
            });
            let mut worker = Worker { child, input, counts: Counts::default(), rss: 0, answer: None };
            worker.order(&Order::Plan(Box::new(plan))).await.map_err(|_broken| WorkerError::Lost(number))?;
            workers.push(worker);
        }
        let mut all = Self { workers, news, _readers: readers };
        all.until(Instant::now() + ANSWER, |workers| workers.iter().all(|worker| worker.rss > 0)).await?;
        Ok(all)
    }

    /// Tells all of them.
    ///
    /// # Errors
    /// One of them is gone.
    pub async fn order(&mut self, order: &Order) -> Result<(), WorkerError> {
        for (number, worker) in self.workers.iter_mut().enumerate() {
            worker.order(order).await.map_err(|_broken| WorkerError::Lost(number))?;
        }
        Ok(())
    }

    /// Listens until this time. Cancel safe.
    ///
    /// # Errors
    /// One of them is gone.
    pub async fn listen(&mut self, until: Instant) -> Result<(), WorkerError> {
        loop {
            match timeout_at(until, self.news.recv()).await {
                Ok(Some((number, news))) => self.on_news(number, news)?,
                Ok(None) => return Err(WorkerError::Lost(0)),
                Err(_elapsed) => return Ok(()),
            }
        }
    }

    /// What each has measured.
    ///
    /// # Errors
    /// One of them is gone.
    pub async fn numbers(&mut self) -> Result<Vec<Numbers>, WorkerError> {
        self.order(&Order::Tell).await?;
        self.until(Instant::now() + ANSWER, |workers| workers.iter().all(|worker| worker.answer.is_some()))
            .await?;
        Ok(self.workers.iter_mut().filter_map(|worker| worker.answer.take()).collect())
    }

    /// Where all nodes stand.
    #[must_use]
    pub fn counts(&self) -> Counts {
        let mut all = Counts::default();
        self.workers.iter().for_each(|worker| all.add(&worker.counts));
        all
    }

    /// Resident memory before the first node, of all.
    #[must_use]
    pub fn empty_rss(&self) -> u64 {
        self.workers.iter().map(|worker| worker.rss).sum()
    }

    /// Their processes.
    #[must_use]
    pub fn pids(&self) -> Vec<u32> {
        self.workers.iter().filter_map(|worker| worker.child.id()).collect()
    }

    /// Ends all links in an orderly way, then the processes.
    pub async fn stop(mut self) {
        // One that is gone needs no telling.
        drop(self.order(&Order::Stop).await);
        for worker in &mut self.workers {
            drop(timeout(STOP, worker.child.wait()).await);
        }
    }

    async fn until(
        &mut self,
        deadline: Instant,
        done: impl Fn(&[Worker]) -> bool,
    ) -> Result<(), WorkerError> {
        while !done(&self.workers) {
            match timeout_at(deadline, self.news.recv()).await {
                Ok(Some((number, news))) => self.on_news(number, news)?,
                Ok(None) | Err(_) => return Err(WorkerError::Lost(0)),
            }
        }
        Ok(())
    }

    fn on_news(&mut self, number: usize, news: Option<News>) -> Result<(), WorkerError> {
        let worker = &mut self.workers[number];
        match news.ok_or(WorkerError::Lost(number))? {
            News::Ready { rss } => worker.rss = rss,
            News::Tick(counts) => worker.counts = counts,
            News::Numbers(numbers) => {
                worker.counts = numbers.counts;
                worker.answer = Some(*numbers);
            }
            News::Failed { error } => return Err(WorkerError::Failed(error)),
        }
        Ok(())
    }
}

impl Worker {
    async fn order(&mut self, order: &Order) -> std::io::Result<()> {
        let mut line = serde_json::to_vec(order)?;
        line.push(b'\n');
        self.input.write_all(&line).await?;
        self.input.flush().await
    }
}
