//! Following a bucket or stream: everything that stands in it, then everything that comes, in its order.
//!
//! One ordered consumer of the server's. What it may have missed (a reconnection, dropped messages, a server
//! that died with it) is read again from the last sequence number; nothing is told twice, and of a bucket's
//! key at least its newest entry is always told. Every [`LOOK_EVERY`] the stream itself is looked at: whether it
//! is still there, is still the same, and still holds what was read. What is found is told, not repaired:
//! [`Followed::Gone`], [`Followed::Began`], [`Followed::WentBack`].

use std::{fmt, time::Duration};

use async_nats::jetstream::{
    self,
    consumer::{DeliverPolicy, ReplayPolicy, push},
};
use bytes::Bytes;
use futures_util::{FutureExt as _, StreamExt as _};
use tokio::{
    sync::watch,
    time::{Instant, sleep, sleep_until},
};

use super::{
    connection::{self, Connection, NatsError},
    setup,
};

/// How often the stream itself is looked at.
pub const LOOK_EVERY: Duration = Duration::from_secs(2);
const RETRY: Duration = Duration::from_millis(300);
/// Bytes of one [`Followed::Entries`].
const BATCH_BYTES: usize = 256 << 10;
const BATCH_ENTRIES: usize = 512;

/// One message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its subject.
    pub subject: String,
    /// `None`: the key was deleted.
    pub value: Option<Bytes>,
    /// Stream sequence.
    pub revision: u64,
    /// When it was written, microseconds since 1970, by the server's clock.
    pub time_us: u64,
}

/// What following shows.
#[derive(Debug)]
pub enum Followed {
    /// A life of the stream begins to be told, from its first entry on: at the start, and when it was made anew.
    Began { incarnation: u64 },
    /// Entries in order; everything up to `upto` has been told.
    Entries { entries: Vec<Entry>, upto: u64 },
    /// Everything that stood there when this was last looked at has been told.
    CaughtUp { upto: u64 },
    /// The stream was deleted. Told once; following goes on when it is there again.
    Gone,
    /// The stream ends before what was read of it: its server lost acknowledged writes.
    WentBack { read: u64, holds: u64 },
}

/// Where following begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// With the first entry.
    Everything,
    /// With what comes from now on.
    Now,
}

/// See the module's documentation.
pub struct Follow {
    connection: Connection,
    stream: String,
    start: Start,
    disturbances: watch::Receiver<u64>,
    consumer: Option<push::Ordered>,
    incarnation: Option<u64>,
    /// Everything up to here has been told, as far as the consumer's server knows: it may be behind the stream's
    /// leader, and have more of it later.
    upto: u64,
    /// The newest entry that was told: what is read anew begins behind it.
    told: u64,
    /// What was last seen to be there, and whether it was told that it has been reached.
    target: u64,
    reached: bool,
    /// Something came since the stream was last looked at.
    moved: bool,
    gone: bool,
    look_at: Instant,
}

impl fmt::Debug for Follow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Follow")
            .field("stream", &self.stream)
            .field("upto", &self.upto)
            .finish_non_exhaustive()
    }
}

impl Follow {
    /// Follows a stream by its name.
    pub fn new(connection: Connection, stream: String, start: Start) -> Self {
        let disturbances = connection.disturbances();
        Self {
            connection,
            stream,
            start,
            disturbances,
            consumer: None,
            incarnation: None,
            upto: 0,
            told: 0,
            target: 0,
            reached: false,
            moved: false,
            gone: false,
            look_at: Instant::now(),
        }
    }

    /// What comes next. Not cancel safe: dropping the future may lose what it was about to show.
    pub async fn next(&mut self) -> Followed {
        loop {
            if self.consumer.is_none()
                && let Some(shown) = self.connect().await
            {
                return shown;
            }
            if !self.reached && self.upto >= self.target {
                self.reached = true;
                return Followed::CaughtUp { upto: self.upto };
            }
            let Some(consumer) = &mut self.consumer else {
                sleep(RETRY).await;
                continue;
            };
            tokio::select! {
                biased;
                _changed = self.disturbances.changed() => self.consumer = None,
                message = consumer.next() => match message {
                    Some(Ok(message)) => {
                        if let Some(shown) = self.gather(&message) {
                            return shown;
                        }
                    }
                    Some(Err(error)) => {
                        tracing::debug!(stream = %self.stream, %error, "following is begun again");
                        self.consumer = None;
                    }
                    None => self.consumer = None,
                },
                () = sleep_until(self.look_at) => {
                    if let Some(shown) = self.look().await {
                        return shown;
                    }
                }
            }
        }
    }

    /// Takes this message and what waits behind it.
    fn gather(&mut self, first: &jetstream::Message) -> Option<Followed> {
        let mut entries = Vec::new();
        let mut bytes = self.take(first, &mut entries);
        while bytes < BATCH_BYTES && entries.len() < BATCH_ENTRIES {
            let Some(Some(next)) = self.consumer.as_mut().and_then(|consumer| consumer.next().now_or_never())
            else {
                break;
            };
            match next {
                Ok(message) => bytes += self.take(&message, &mut entries),
                Err(_error) => {
                    self.consumer = None;
                    break;
                }
            }
        }
        (!entries.is_empty()).then(|| Followed::Entries { entries, upto: self.upto })
    }

    fn take(&mut self, message: &jetstream::Message, entries: &mut Vec<Entry>) -> usize {
        let Ok(info) = message.info() else { return 0 };
        let (revision, time_us) = (info.stream_sequence, connection::micros(info.published));
        // A consumer that the library made anew may begin earlier.
        if revision <= self.told {
            return 0;
        }
        (self.moved, self.told) = (true, revision);
        // With nothing behind it, it stands for all that was there when the stream was last looked at.
        let upto = if info.pending == 0 { revision.max(self.target) } else { revision };
        self.upto = self.upto.max(upto);
        let deleted = connection::is_deleted(message.headers.as_ref());
        let subject = message.subject.to_string();
        let cost = 64 + subject.len() + message.payload.len();
        let value = (!deleted).then(|| message.payload.clone());
        entries.push(Entry { subject, value, revision, time_us });
        cost
    }

    /// Looks at the stream and makes a consumer.
    async fn connect(&mut self) -> Option<Followed> {
        self.disturbances.mark_unchanged();
        let shown = self.look().await;
        if shown.is_some() || self.incarnation.is_none() || self.gone {
            return shown;
        }
        let config = push::OrderedConfig {
            deliver_subject: self.connection.client().new_inbox(),
            deliver_policy: DeliverPolicy::ByStartSequence { start_sequence: self.told + 1 },
            replay_policy: ReplayPolicy::Instant,
            ..push::OrderedConfig::default()
        };
        let made = self.connection.jetstream().create_consumer_on_stream(config, &self.stream).await;
        let made: Result<jetstream::consumer::Consumer<push::OrderedConfig>, _> = made;
        let pending = made.as_ref().map_or(u64::MAX, |consumer| consumer.cached_info().num_pending);
        match made {
            Ok(consumer) => match consumer.messages().await {
                Ok(messages) => {
                    if pending == 0 {
                        self.upto = self.upto.max(self.target);
                    }
                    self.consumer = Some(messages);
                }
                Err(error) => tracing::warn!(stream = %self.stream, %error, "cannot be followed now"),
            },
            Err(error) => tracing::warn!(stream = %self.stream, %error, "cannot be followed now"),
        }
        None
    }

    async fn look(&mut self) -> Option<Followed> {
        self.look_at = Instant::now() + LOOK_EVERY;
        let info = match self.connection.info(&self.stream).await {
            Ok(info) => info,
            Err(NatsError::Missing) => {
                self.consumer = None;
                return (!std::mem::replace(&mut self.gone, true)).then_some(Followed::Gone);
            }
            Err(error) => {
                tracing::debug!(stream = %self.stream, %error, "cannot be looked at now");
                return None;
            }
        };
        self.gone = false;
        let incarnation = setup::incarnation(&info);
        let holds = info.state.last_sequence;
        if self.incarnation != Some(incarnation) {
            let first = self.incarnation.replace(incarnation).is_none();
            self.consumer = None;
            self.upto = if first && self.start == Start::Now { holds } else { 0 };
            self.told = self.upto;
            self.target = holds;
            self.reached = false;
            return Some(Followed::Began { incarnation });
        }
        if holds < self.upto {
            let read = std::mem::replace(&mut self.upto, holds);
            self.told = self.told.min(holds);
            self.consumer = None;
            return Some(Followed::WentBack { read, holds });
        }
        // What was there the last time has not come, nor anything else: the consumer died with its server.
        if self.upto < self.target && !std::mem::take(&mut self.moved) {
            self.consumer = None;
        }
        self.target = self.target.max(holds);
        None
    }
}
