//! The store of a tier's core: Logs and State of its nodes, durable in JetStream.
//!
//! | file | subject |
//! |---|---|
//! | `message` | what stands in a message |
//! | `log` | writing one Log: batches, each where the one before is the last |
//! | `state` | writing the State of one node, one key after the other |
//! | `lanes` | all nodes of this replica; decides, and does nothing |
//! | `ops` | does what was decided |
//!
//! What a connect costs: a claim, and a read of where the node's spaces, its `down` Log and each Log stand that
//! it still holds records of, all sent at once. What a batch costs: one message. An idle node costs nothing.
//!
//! JetStream acknowledges before it flushes. A tier that lost its tail says so by standing lower when it is next
//! looked at, and nodes send again what they keep for it (`retain_acked`).

mod lanes;
mod log;
mod message;
mod ops;
#[cfg(test)]
mod sim;
mod state;

use std::{
    collections::VecDeque,
    pin::Pin,
    sync::{Arc, Mutex},
    task::{Context, Poll},
};

use broker::{
    clock,
    event::{Group, ReadId, ReadRequest, tier},
    store::{Recovered, Store, StoreEvent},
};
use codec::Record;
use futures_util::{StreamExt, stream::FuturesUnordered};
use tokio::sync::watch;

pub use self::lanes::Counts;
use self::{
    lanes::{Asked, Lanes, Outcome, Token},
    ops::Site,
};
use super::{
    Feed,
    claims::Claims,
    connection::{Connection, NatsError},
};

/// What an operation or a read came to.
enum Done {
    Op(Token, Asked, Outcome),
    /// Its records, and where to read on.
    Read(ReadId, Vec<Record>, u64),
    /// A read that got no answer: again.
    ReadAgain(ReadRequest),
    /// The connection was lost and made again, or messages were.
    Disturbed(watch::Receiver<u64>),
}

type Work = Pin<Box<dyn Future<Output = Done> + Send>>;

/// See the module's documentation. Its futures make progress only while it is polled.
pub struct NatsStore {
    site: Site,
    feed: Feed,
    lanes: Lanes,
    work: FuturesUnordered<Work>,
    events: VecDeque<StoreEvent>,
    told: Told,
}

/// What a store counts, for whoever shows it.
#[derive(Debug, Clone, Default)]
pub struct Told(Arc<Mutex<Counts>>);

impl Told {
    /// Since the store was opened.
    ///
    /// # Panics
    /// Never: nothing panics under its lock.
    #[must_use]
    pub fn counts(&self) -> Counts {
        *self.0.lock().expect("no panic under this lock")
    }
}

impl std::fmt::Debug for NatsStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NatsStore").field("lanes", &self.lanes).finish_non_exhaustive()
    }
}

impl NatsStore {
    /// A store over the streams and buckets that [`super::setup::prepare`] has made, and what its core is to begin
    /// with: nothing.
    ///
    /// # Errors
    /// The streams cannot be looked at.
    pub async fn open(
        connection: Connection,
        claims: Claims,
        feed: Feed,
    ) -> Result<(Self, Recovered), NatsError> {
        let lanes = Lanes::new(connection.max_payload());
        let site = Site::look(connection, claims).await?;
        let disturbances = site.connection.disturbances();
        let store = Self {
            site,
            feed,
            lanes,
            work: FuturesUnordered::new(),
            events: VecDeque::new(),
            told: Told::default(),
        };
        store.hear(disturbances);
        Ok((store, Recovered::default()))
    }

    /// What was written, met and put aside: to be looked at while the store runs.
    #[must_use]
    pub fn told(&self) -> Told {
        self.told.clone()
    }

    fn hear(&self, mut disturbances: watch::Receiver<u64>) {
        self.work.push(Box::pin(async move {
            if disturbances.changed().await.is_err() {
                std::future::pending::<()>().await; // the connection has ended, and this store will
            }
            Done::Disturbed(disturbances)
        }));
    }

    /// Begins what was decided, and tells what came of it.
    fn turn(&mut self) {
        while let Some(op) = self.lanes.take_op() {
            let site = self.site.clone();
            self.work.push(Box::pin(async move {
                let (token, asked, outcome) = site.perform(op).await;
                Done::Op(token, asked, outcome)
            }));
        }
        while let Some(news) = self.lanes.take_news() {
            self.events.push_back(StoreEvent::Tier(news));
        }
        *self.told.0.lock().expect("no panic under this lock") = self.lanes.counts;
    }

    fn read_down(&mut self, request: ReadRequest) {
        let Some(node) = self.lanes.down_of(request.source).map(str::to_owned) else {
            // Logs of nodes are read from JetStream, not through a core.
            let (read, next) = (request.read, request.from);
            return self.events.push_back(StoreEvent::Read { read, records: Vec::new(), next });
        };
        let site = self.site.clone();
        self.work.push(Box::pin(async move {
            match site.down(&node, request.from, request.bytes_max).await {
                Ok((records, next)) => Done::Read(request.read, records, next),
                Err(error) => {
                    tracing::debug!(%node, %error, "what goes down cannot be read now");
                    tokio::time::sleep(std::time::Duration::from_millis(500)).await;
                    Done::ReadAgain(request)
                }
            }
        }));
    }
}

impl Store for NatsStore {
    fn submit(&mut self, group: Group) {
        self.lanes.submit(group);
        self.turn();
    }

    fn read(&mut self, request: ReadRequest) {
        // Not now: what declares its source may be submitted only after it.
        self.work.push(Box::pin(std::future::ready(Done::ReadAgain(request))));
    }

    fn ask(&mut self, ask: tier::Ask) {
        self.lanes.ask(ask);
        self.turn();
    }

    fn poll_event(&mut self, cx: &mut Context<'_>) -> Poll<StoreEvent> {
        self.lanes.now_s = clock::wall_us() / 1_000_000;
        loop {
            if let Some(event) = self.events.pop_front() {
                return Poll::Ready(event);
            }
            if let Poll::Ready(news) = self.feed.poll(cx) {
                match news {
                    tier::News::Fenced { node, .. } => self.lanes.lost(&node),
                    news => {
                        if let tier::News::Arrived { down, .. } = &news {
                            self.site.down_epoch = down.epoch;
                        }
                        self.events.push_back(StoreEvent::Tier(news));
                    }
                }
                self.turn();
                continue;
            }
            match self.work.poll_next_unpin(cx) {
                Poll::Ready(Some(Done::Op(token, asked, outcome))) => {
                    self.lanes.done(&token, asked, outcome);
                    self.turn();
                }
                Poll::Ready(Some(Done::Read(read, records, next))) => {
                    self.events.push_back(StoreEvent::Read { read, records, next });
                }
                Poll::Ready(Some(Done::ReadAgain(request))) => self.read_down(request),
                Poll::Ready(Some(Done::Disturbed(disturbances))) => {
                    self.hear(disturbances);
                    self.lanes.disturbed();
                    self.turn();
                }
                Poll::Ready(None) | Poll::Pending => return Poll::Pending,
            }
        }
    }
}
