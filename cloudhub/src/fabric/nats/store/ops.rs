//! Operations of [`super::lanes`] on NATS.

use std::{sync::Arc, time::Duration};

use async_nats::{HeaderMap, header};
use broker::{
    clock,
    event::tier::{Adopt, DownLog, come_again},
};
use codec::Record;
use futures_util::future::join_all;

use super::{
    lanes::{Op, Outcome, Standing, Token, What},
    message::{self, Headers, Message, Summary},
    state::Put,
};
use crate::fabric::nats::{
    claims::{Claim, Claimant, Claims, Held},
    connection::{Connection, KV_OPERATION, NatsError, Stored},
    names::{self, Bucket},
    setup,
};

/// A node whose position cannot be read comes again after this long.
const RETRY_MS: u32 = 1_000;
/// Longest subject: with the subject of the answer it has to fit a line of the protocol, 4 096 bytes.
const SUBJECT_MAX: usize = 3_800;
/// What the servers say of a stream that takes no more: its limit is reached, or there is no room.
const FULL: [u64; 3] = [10_077, 10_023, 10_047];

/// Where operations are done. Cloning shares it.
#[derive(Debug, Clone)]
pub(super) struct Site {
    pub(super) connection: Connection,
    pub(super) claims: Claims,
    /// How long a message of a Log stays; zero: for ever.
    pub(super) log_age: Duration,
    /// Epoch of the Log of what goes down: its incarnation now.
    pub(super) down_epoch: u64,
}

impl Site {
    /// Does one operation.
    pub(super) async fn perform(self, op: Op) -> (Token, super::lanes::Asked, Outcome) {
        if !op.delay.is_zero() {
            tokio::time::sleep(op.delay).await;
        }
        let asked = op.what.asked();
        let outcome = self.outcome(&op.token.node, op.what).await;
        (op.token, asked, outcome)
    }

    async fn outcome(&self, node: &Arc<str>, what: What) -> Outcome {
        match what {
            What::Adopt(adopt) => Outcome::Adopted(self.adopt(*adopt).await),
            What::Release { held, summary } => {
                if let Some(put) = summary {
                    // Best effort: it spares the next adoption a look.
                    drop(self.put(put).await);
                }
                self.claims.release(node, Held { session: held }).await;
                Outcome::Nothing
            }
            What::StillOurs { held } => self.still_ours(node, held).await,
            What::Append { stream, append } => {
                let subject = names::log_subject(node, &stream, self.connection.shards());
                let headers = headers(append.headers, Some(append.expected));
                self.append(subject, headers, append.payload).await
            }
            What::Last { stream } => {
                let shards = self.connection.shards();
                let subject = names::log_subject(node, &stream, shards);
                let shard = names::log_stream(names::shard(node, shards));
                found(self.last(&shard, &subject).await)
            }
            What::Put(put) => self.put(put).await,
            What::Get { key } => {
                found(self.connection.last(Bucket::Node.stream(), &Bucket::Node.subject(&key)).await)
            }
            What::Sweep { below, from } => {
                let keys = Bucket::Node.below(&below);
                found(self.connection.next(Bucket::Node.stream(), &keys, from).await)
            }
            What::Letter { stream, record, reason } => {
                self.letter(node, &stream, &record, &reason).await;
                Outcome::Nothing
            }
        }
    }

    async fn append(&self, subject: String, headers: HeaderMap, payload: bytes::Bytes) -> Outcome {
        // What a server never takes would end the connection instead of being refused.
        let head: usize = headers
            .iter()
            .map(|(name, values)| {
                values
                    .iter()
                    .map(|value| AsRef::<str>::as_ref(name).len() + value.as_str().len() + 4)
                    .sum::<usize>()
            })
            .sum();
        if subject.len() > SUBJECT_MAX {
            return Outcome::Refused("its subject is too long".to_owned());
        }
        if payload.len() + head + 64 > self.connection.max_payload() {
            return Outcome::Refused("larger than max_payload".to_owned());
        }
        match self.connection.append(subject, headers, payload).await {
            Ok(sequence) => Outcome::Written(sequence),
            Err(error) => failed(error),
        }
    }

    async fn put(&self, put: Put) -> Outcome {
        let mut map = headers(put.headers, put.expected);
        if put.deleted {
            map.insert(KV_OPERATION, "DEL");
        }
        self.append(Bucket::Node.subject(&put.key), map, put.payload).await
    }

    async fn still_ours(&self, node: &str, held: u64) -> Outcome {
        let entry = match self.connection.get(Bucket::Sys, &format!("claims/{node}")).await {
            Ok(entry) => entry,
            Err(error) => return failed(error),
        };
        let claim = entry.and_then(|entry| serde_json::from_slice::<Claim>(&entry.value?).ok());
        Outcome::Ours(claim.is_some_and(|claim| claim.session == held && !claim.away))
    }

    /// The last message of a Log. A server of 2.9 whose last message of a subject was deleted by hand says that
    /// there is none, to whoever reads and to whoever expects a sequence, while older ones are there: they are
    /// looked through, and what follows them has to expect nothing.
    async fn last(&self, stream: &str, subject: &str) -> Result<Option<Stored>, NatsError> {
        let last = self.connection.last(stream, subject).await?;
        if last.is_some() {
            return Ok(last);
        }
        let (mut found, mut next) = (None, 1);
        while let Some(stored) = self.connection.next(stream, subject, next).await? {
            next = stored.sequence + 1;
            found = Some(stored);
        }
        Ok(found.map(|stored| Stored { sequence: 0, ..stored }))
    }

    /// The claim and every read go out together.
    async fn adopt(&self, adopt: Adopt) -> Result<Box<Standing>, codec::proto::Refusal> {
        let shards = self.connection.shards();
        let shard = names::log_stream(names::shard(&adopt.node, shards));
        let end_of = async |stream: &str| {
            let subject = names::log_subject(&adopt.node, stream, shards);
            let last = self.last(&shard, &subject).await?;
            Ok::<_, NatsError>(last.map(of_stored).as_ref().and_then(message::end_of))
        };
        let claimant = Claimant {
            node: &adopt.node,
            instance: &adopt.instance,
            generation: adopt.generation,
            stamp: adopt.stamp,
        };
        let all_keys = Bucket::Node.below(&adopt.node);
        let downlog = names::downlog_subject(&adopt.node);
        // What the node holds nothing of any more is not asked for again, wherever the stream stands.
        let (read, freed): (Vec<_>, Vec<_>) = adopt.logs.iter().partition(|log| log.next > log.first);
        let (held, summary, down, ends) = tokio::join!(
            self.claims.claim(claimant),
            self.connection.last(Bucket::Node.stream(), &all_keys),
            self.connection.last(names::DOWNLOG, &downlog),
            join_all(read.iter().map(|log| end_of(&log.stream))),
        );
        let held = held?;
        let standing = async {
            let summary = summary?.map(of_stored);
            let noted = summary.as_ref().map(Summary::of).unwrap_or_default();
            let mut logs = Vec::with_capacity(adopt.logs.len());
            for (log, end) in read.iter().zip(ends) {
                logs.push((Arc::clone(&log.stream), log.first, end?));
            }
            for log in freed {
                let known = noted.logs.contains_key(&log.stream);
                let end = if known { None } else { end_of(&log.stream).await? };
                logs.push((Arc::clone(&log.stream), log.first, end));
            }
            let down = down?.map(|last| DownLog { epoch: self.down_epoch, last: last.sequence });
            Ok::<_, NatsError>(Standing {
                held: held.session,
                summary,
                logs,
                down,
                log_age: self.log_age,
                now_s: clock::wall_us() / 1_000_000,
            })
        };
        match standing.await {
            Ok(standing) => Ok(Box::new(standing)),
            Err(error) => {
                tracing::warn!(node = %adopt.node, %error, "cannot read where a node stands");
                self.claims.release(&adopt.node, held).await;
                Err(come_again("the tier's NATS servers do not say where this node stands", RETRY_MS))
            }
        }
    }

    /// Keeps what no message of its kind can hold, as far as one holds it.
    async fn letter(&self, node: &str, stream: &str, record: &Record, reason: &str) {
        tracing::warn!(%node, %stream, seq = record.header.seq, reason, "a record cannot be kept by NATS");
        let mut headers = HeaderMap::new();
        headers.insert("Octobus-Stream", escaped(stream).as_str());
        headers.insert("Octobus-Epoch", format!("{:016x}", record.header.epoch).as_str());
        headers.insert("Octobus-Seq", record.header.seq.to_string().as_str());
        headers.insert("Octobus-Reason", escaped(reason).as_str());
        let kept = record.body.slice(..record.body.len().min(names::LETTER_BYTES));
        if let Err(error) = self.connection.append(names::letter_subject(node), headers, kept).await {
            tracing::error!(%node, %stream, %error, "nor as a dead letter");
        }
    }

    /// What was sent to a node, from a sequence on, and where to read on.
    pub(super) async fn down(
        &self,
        node: &str,
        from: u64,
        bytes_max: usize,
    ) -> Result<(Vec<Record>, u64), NatsError> {
        let subject = names::downlog_subject(node);
        let (mut records, mut bytes, mut next) = (Vec::new(), 0, from);
        while bytes < bytes_max {
            let Some(stored) = self.connection.next(names::DOWNLOG, &subject, next).await? else { break };
            next = stored.sequence + 1;
            let record = down_record(self.down_epoch, &stored);
            bytes += record.wire_len();
            records.push(record);
        }
        Ok((records, next))
    }

    /// As the streams are now.
    pub(super) async fn look(connection: Connection, claims: Claims) -> Result<Self, NatsError> {
        let log = connection.info(&names::log_stream(0)).await?;
        let down = connection.info(names::DOWNLOG).await?;
        let down_epoch = setup::incarnation(&down);
        Ok(Self { connection, claims, log_age: log.config.max_age, down_epoch })
    }
}

/// A message of what goes down, as a record of its Log.
fn down_record(epoch: u64, stored: &Stored) -> Record {
    let header = codec::RecordHeader {
        kind: codec::Kind::LOG,
        class: codec::Class::Event as u8,
        flags: codec::Flags::QOS1,
        source: 0,
        epoch,
        seq: stored.sequence,
        aux: 0,
    };
    Record { header, body: stored.payload.clone() }
}

fn escaped(text: &str) -> String {
    let mut out = String::new();
    codec::name::escape_token(text, &mut out);
    out
}

fn headers(ours: Headers, expected: Option<u64>) -> HeaderMap {
    let mut map = HeaderMap::new();
    for (name, value) in ours {
        map.append(name, value);
    }
    if let Some(expected) = expected {
        map.insert(header::NATS_EXPECTED_LAST_SUBJECT_SEQUENCE, expected.to_string());
    }
    map
}

fn failed(error: NatsError) -> Outcome {
    match error {
        NatsError::Conflict => Outcome::Conflict,
        NatsError::Unavailable | NatsError::Missing => Outcome::Unavailable,
        NatsError::Refused { code, .. } if FULL.contains(&code) => Outcome::Full,
        NatsError::Refused { reason, .. } => Outcome::Refused(reason),
        NatsError::Unknown(_) => Outcome::Unknown,
    }
}

fn found(read: Result<Option<Stored>, NatsError>) -> Outcome {
    match read {
        Ok(None) => Outcome::Found(None, None),
        Ok(Some(stored)) => {
            let key = Bucket::Node.key(&stored.subject).ok();
            Outcome::Found(Some(of_stored(stored)), key)
        }
        // Whatever it is, a read says nothing then.
        Err(_) => Outcome::Unavailable,
    }
}

fn of_stored(stored: Stored) -> Message {
    let mut headers = Vec::new();
    for (name, values) in stored.headers.iter() {
        headers.extend(values.iter().map(|value| (name.to_string(), value.to_string())));
    }
    Message { sequence: stored.sequence, headers, payload: stored.payload }
}
