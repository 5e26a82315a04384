//! One connection of this replica to the tier's NATS servers, and the few requests made over it.
//!
//! What a request says about what happened is exact, because exactly-once effects rest on it:
//! [`NatsError::Conflict`], [`NatsError::Unavailable`] and [`NatsError::Refused`] mean *it did not happen*;
//! [`NatsError::Unknown`] means *perhaps*, and whoever asked reads before it asks again.
//!
//! The library reconnects by itself, to any of the servers. Whoever follows something ([`super::follow`])
//! reads from where it stands after every [`Connection::disturbances`]: a reconnection, or messages that the
//! library dropped because their reader was slow.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use async_nats::{
    Client, ConnectOptions, Event, HeaderMap, StatusCode, header,
    jetstream::{self, context::ContextBuilder},
};
use bytes::Bytes;
use serde::Deserialize;
use tokio::sync::watch;

use super::names::Bucket;

/// A server that does not answer a request within this is not answering.
const REQUEST_MAX: Duration = Duration::from_secs(4);
/// A server that does not answer two pings is left for another.
const PING_EVERY: Duration = Duration::from_secs(2);
const CONNECT_MAX: Duration = Duration::from_secs(3);
const RECONNECT_MAX: Duration = Duration::from_secs(1);
/// Messages that wait for one reader; beyond it some are dropped, which is a disturbance.
const WAITING_MAX: usize = 16 << 10;

/// How to reach the servers.
#[derive(Clone, Default)]
pub struct Access {
    /// `nats://` and `tls://` addresses.
    pub servers: Vec<String>,
    /// Name under which the servers show this connection.
    pub name: String,
    /// User and password of account OCTOBUS.
    pub login: Option<(String, String)>,
    /// CA of the servers, own certificate, own key: PEM files.
    pub tls: Tls,
}

/// PEM files.
#[derive(Debug, Clone, Default)]
pub struct Tls {
    /// CA of the servers; the system's roots otherwise.
    pub ca: Option<std::path::PathBuf>,
    /// Own certificate and its key.
    pub identity: Option<(std::path::PathBuf, std::path::PathBuf)>,
}

impl fmt::Debug for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Access")
            .field("servers", &self.servers)
            .field("tls", &self.tls)
            .finish_non_exhaustive()
    }
}

/// Why a request has no result.
#[derive(Debug, thiserror::Error)]
pub enum NatsError {
    /// The subject's last message is not the expected one. It did not happen.
    #[error("somebody else wrote in between")]
    Conflict,
    /// Nobody serves this stream now: it is electing a leader, or does not exist. It did not happen.
    #[error("no server answers for it now")]
    Unavailable,
    /// The stream does not exist. It did not happen.
    #[error("the stream does not exist")]
    Missing,
    /// The server says no, and would again. It did not happen.
    #[error("NATS refuses: {reason} ({code})")]
    Refused { code: u64, reason: String },
    /// There was no answer. It may have happened.
    #[error("NATS did not answer: {0}")]
    Unknown(String),
}

/// What became of requests, since the process started.
#[derive(Debug, Default)]
pub struct Counters {
    /// Made.
    pub requests: AtomicU64,
    /// Refused, not answered, or in conflict.
    pub failures: AtomicU64,
    /// Connections made, the first one included.
    pub connects: AtomicU64,
    /// Times that messages were dropped because their reader was slow.
    pub slow: AtomicU64,
}

/// Cloning shares the connection.
#[derive(Clone)]
pub struct Connection {
    client: Client,
    jetstream: jetstream::Context,
    shards: u32,
    counters: Arc<Counters>,
    disturbances: watch::Receiver<u64>,
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection").finish_non_exhaustive()
    }
}

/// An entry of a bucket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KvEntry {
    /// `None`: deleted.
    pub value: Option<Bytes>,
    /// Stream sequence: what a compare-and-set expects.
    pub revision: u64,
    /// When it was written, microseconds since 1970, by the server's clock.
    pub time_us: u64,
}

/// A message as a stream keeps it.
pub type Stored = jetstream::message::StreamMessage;

impl Connection {
    /// Connects to any of the servers.
    ///
    /// # Errors
    /// None answers, or they do not let this replica in.
    pub async fn open(access: &Access, shards: u32) -> Result<Self, async_nats::ConnectError> {
        let counters = Arc::<Counters>::default();
        let (disturbed, disturbances) = watch::channel(0);
        let counted = Arc::clone(&counters);
        let options = options(access).event_callback(move |event| {
            match &event {
                Event::Connected => {
                    counted.connects.fetch_add(1, Ordering::Relaxed);
                    tracing::info!("connected to NATS");
                    disturbed.send_modify(|count| *count += 1);
                }
                Event::SlowConsumer(_) => {
                    counted.slow.fetch_add(1, Ordering::Relaxed);
                    tracing::warn!(
                        "messages from NATS were dropped: this replica reads too slowly; it reads again"
                    );
                    disturbed.send_modify(|count| *count += 1);
                }
                other => tracing::warn!(event = %other, "NATS"),
            }
            std::future::ready(())
        });
        let client = options.connect(&access.servers).await?;
        let jetstream = ContextBuilder::new().timeout(REQUEST_MAX).build(client.clone());
        Ok(Self { client, jetstream, shards, counters, disturbances })
    }

    /// The client, for subscriptions and Live messages.
    pub const fn client(&self) -> &Client {
        &self.client
    }

    /// JetStream, for consumers and streams.
    pub const fn jetstream(&self) -> &jetstream::Context {
        &self.jetstream
    }

    /// Into how many streams Logs are sharded.
    pub const fn shards(&self) -> u32 {
        self.shards
    }

    /// Largest message that the servers take, headers included, bytes.
    pub fn max_payload(&self) -> usize {
        self.client.max_payload()
    }

    /// What became of requests.
    pub const fn counters(&self) -> &Arc<Counters> {
        &self.counters
    }

    /// Changes whenever something that was sent to this replica may not have come.
    pub fn disturbances(&self) -> watch::Receiver<u64> {
        self.disturbances.clone()
    }

    /// Appends a message to the stream that is bound to its subject; its sequence number.
    ///
    /// Dropping the future leaves it open whether it happened. Several at a time are pipelined, in the order
    /// in which they are first polled.
    ///
    /// # Errors
    /// See [`NatsError`].
    pub async fn append(
        &self,
        subject: String,
        headers: HeaderMap,
        payload: Bytes,
    ) -> Result<u64, NatsError> {
        self.counters.requests.fetch_add(1, Ordering::Relaxed);
        let appended = self.append_uncounted(subject, headers, payload).await;
        if appended.is_err() {
            self.counters.failures.fetch_add(1, Ordering::Relaxed);
        }
        appended
    }

    async fn append_uncounted(
        &self,
        subject: String,
        headers: HeaderMap,
        payload: Bytes,
    ) -> Result<u64, NatsError> {
        let request = async_nats::Request::new().payload(payload).headers(headers).timeout(Some(REQUEST_MAX));
        let answer = self.client.send_request(subject, request).await;
        let answer = match answer {
            Ok(message) if message.status == Some(StatusCode::NO_RESPONDERS) => {
                return Err(NatsError::Unavailable);
            }
            Ok(message) => message,
            Err(error) => return Err(of_request(&error)),
        };
        #[derive(Deserialize)]
        struct Ack {
            #[serde(default)]
            seq: u64,
            error: Option<ApiError>,
        }
        match serde_json::from_slice::<Ack>(&answer.payload) {
            Ok(Ack { error: Some(error), .. }) => Err(error.into()),
            Ok(Ack { seq, .. }) if seq > 0 => Ok(seq),
            _ => Err(NatsError::Unknown("an answer that is no acknowledgement".to_owned())),
        }
    }

    /// Writes a key of a bucket, or deletes it; its new revision.
    ///
    /// `expect` is the revision that its last entry, deleted or not, must have; 0: it never had one.
    ///
    /// # Errors
    /// See [`NatsError`].
    pub async fn put(
        &self,
        bucket: Bucket,
        key: &str,
        value: Option<Bytes>,
        expect: Option<u64>,
    ) -> Result<u64, NatsError> {
        let mut headers = HeaderMap::new();
        if let Some(revision) = expect {
            headers.insert(header::NATS_EXPECTED_LAST_SUBJECT_SEQUENCE, revision.to_string());
        }
        if value.is_none() {
            headers.insert(KV_OPERATION, "DEL");
        }
        self.append(bucket.subject(key), headers, value.unwrap_or_default()).await
    }

    /// Reads a key of a bucket from the server that leads it.
    ///
    /// # Errors
    /// See [`NatsError`].
    pub async fn get(&self, bucket: Bucket, key: &str) -> Result<Option<KvEntry>, NatsError> {
        let stored = self.last(bucket.stream(), &bucket.subject(key)).await?;
        Ok(stored.map(|stored| KvEntry {
            value: (!is_deleted(Some(&stored.headers))).then_some(stored.payload),
            revision: stored.sequence,
            time_us: micros(stored.time),
        }))
    }

    /// Reads the last message of a subject from the server that leads the stream.
    ///
    /// # Errors
    /// See [`NatsError`].
    pub async fn last(&self, stream: &str, subject: &str) -> Result<Option<Stored>, NatsError> {
        self.read(stream, serde_json::json!({ "last_by_subj": subject })).await
    }

    /// Reads the first message of a subject that has at least this sequence number.
    ///
    /// # Errors
    /// See [`NatsError`].
    pub async fn next(&self, stream: &str, subject: &str, from: u64) -> Result<Option<Stored>, NatsError> {
        self.read(stream, serde_json::json!({ "seq": from.max(1), "next_by_subj": subject })).await
    }

    async fn read(&self, stream: &str, request: serde_json::Value) -> Result<Option<Stored>, NatsError> {
        #[derive(Deserialize)]
        struct Got {
            message: Option<jetstream::stream::RawMessage>,
            error: Option<ApiError>,
        }
        let got: Got = self.ask(&format!("STREAM.MSG.GET.{stream}"), &request).await?;
        match got {
            Got { message: Some(message), .. } => match Stored::try_from(message) {
                Ok(stored) => Ok(Some(stored)),
                Err(error) => Err(NatsError::Unknown(error.to_string())),
            },
            Got { error: Some(error), .. } if error.err_code == NO_MESSAGE => Ok(None),
            Got { error: Some(error), .. } => self.fail(error.into()),
            Got { .. } => self.fail(NatsError::Unknown("an empty answer".to_owned())),
        }
    }

    /// What a stream is and holds.
    ///
    /// # Errors
    /// See [`NatsError`].
    pub async fn info(&self, stream: &str) -> Result<jetstream::stream::Info, NatsError> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Answer {
            Error { error: ApiError },
            Info(Box<jetstream::stream::Info>),
        }
        match self.ask(&format!("STREAM.INFO.{stream}"), &serde_json::json!({})).await? {
            Answer::Info(info) => Ok(*info),
            Answer::Error { error } => self.fail(error.into()),
        }
    }

    /// Asks the JetStream API, without its prefix; the answer may be an error of it.
    ///
    /// # Errors
    /// There is no answer, or none that can be read.
    pub async fn ask<A: serde::de::DeserializeOwned>(
        &self,
        subject: &str,
        request: &serde_json::Value,
    ) -> Result<A, NatsError> {
        self.counters.requests.fetch_add(1, Ordering::Relaxed);
        let payload = Bytes::from(request.to_string());
        let request = async_nats::Request::new().payload(payload).timeout(Some(REQUEST_MAX));
        let answer = self.client.send_request(format!("$JS.API.{subject}"), request).await;
        let message = match answer {
            Ok(message) => message,
            Err(error) => return self.fail(of_request(&error)),
        };
        serde_json::from_slice(&message.payload)
            .or_else(|error| self.fail(NatsError::Unknown(format!("not an answer to {subject}: {error}"))))
    }

    fn fail<T>(&self, error: NatsError) -> Result<T, NatsError> {
        self.counters.failures.fetch_add(1, Ordering::Relaxed);
        Err(error)
    }
}

/// Header that marks the deletion of a key.
pub const KV_OPERATION: &str = "KV-Operation";

/// Whether a bucket's message says that its key is gone.
pub fn is_deleted(headers: Option<&HeaderMap>) -> bool {
    let operation = headers.and_then(|headers| headers.get(KV_OPERATION));
    operation.is_some_and(|operation| matches!(operation.as_str(), "DEL" | "PURGE"))
}

/// Microseconds since 1970.
pub fn micros(time: time::OffsetDateTime) -> u64 {
    u64::try_from(time.unix_timestamp_nanos() / 1_000).unwrap_or(0)
}

/// An error of the JetStream API.
#[derive(Debug, Deserialize)]
pub struct ApiError {
    #[serde(default)]
    pub err_code: u64,
    #[serde(default)]
    pub description: String,
}

const NO_MESSAGE: u64 = 10037;
const WRONG_LAST_SEQUENCE: u64 = 10071;
const STREAM_NOT_FOUND: u64 = 10059;
/// No leader, no peers, no quorum, not active: later it is different.
const FOR_NOW: [u64; 7] = [10004, 10005, 10006, 10007, 10008, 10009, 10041];

impl From<ApiError> for NatsError {
    fn from(error: ApiError) -> Self {
        match error.err_code {
            WRONG_LAST_SEQUENCE => Self::Conflict,
            STREAM_NOT_FOUND => Self::Missing,
            code if FOR_NOW.contains(&code) => Self::Unavailable,
            code => Self::Refused { code, reason: error.description },
        }
    }
}

fn of_request(error: &async_nats::RequestError) -> NatsError {
    match error.kind() {
        async_nats::RequestErrorKind::NoResponders => NatsError::Unavailable,
        async_nats::RequestErrorKind::MaxPayloadExceeded => {
            NatsError::Refused { code: 0, reason: "larger than max_payload".to_owned() }
        }
        async_nats::RequestErrorKind::InvalidSubject => {
            NatsError::Refused { code: 0, reason: "not a subject".to_owned() }
        }
        async_nats::RequestErrorKind::TimedOut => NatsError::Unknown("no answer in time".to_owned()),
        _ => NatsError::Unknown(error.to_string()),
    }
}

fn options(access: &Access) -> ConnectOptions {
    let mut options = ConnectOptions::new()
        .name(&access.name)
        .connection_timeout(CONNECT_MAX)
        .ping_interval(PING_EVERY)
        .request_timeout(Some(REQUEST_MAX))
        .subscription_capacity(WAITING_MAX)
        .reconnect_delay_callback(|attempts| {
            RECONNECT_MAX.min(Duration::from_millis(50) * u32::try_from(attempts).unwrap_or(u32::MAX).min(64))
        });
    if let Some((user, password)) = &access.login {
        options = options.user_and_password(user.clone(), password.clone());
    }
    if let Some(ca) = &access.tls.ca {
        options = options.add_root_certificates(ca.clone()).require_tls(true);
    }
    if let Some((certificate, key)) = &access.tls.identity {
        options = options.add_client_certificate(certificate.clone(), key.clone()).require_tls(true);
    }
    options
}
