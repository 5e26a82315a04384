//! State over the admin socket: reading, writing, watching, and what an operator of a hub says of `fleet`.

use std::{
    collections::VecDeque,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use axum::{
    Json,
    extract::{Query, State},
    http::StatusCode,
    response::Response,
};
use broker::{
    event::{self, Command, Expect, Intent, Output, Seen, StateChange, StateEntry, StateEvent, StateOp},
    limits,
};
use bytes::Bytes;
use codec::proto;
use serde::Deserialize;

use super::{
    Admin, Refusal,
    client_session::ClientSession,
    stream::{self, Gone, Lines},
    unexpected,
};
use crate::api::{self, Answer, Asked, StateRow, WatchRow, WriteOp, Written};

/// Entries of one question to the broker.
const PAGE: usize = 64;
/// Another writer of a node's want gets in between so many times at most.
const WANT_TRIES: usize = 16;
const FLEET: &str = "fleet";

#[derive(Debug, Deserialize)]
pub(super) struct ListQuery {
    #[serde(default)]
    origin: String,
    space: String,
    #[serde(default)]
    prefix: String,
    at: Option<u64>,
}

/// Every entry, at one revision if the space keeps a change window and one was asked for.
pub(super) async fn list(
    State(admin): State<Admin>,
    Query(query): Query<ListQuery>,
) -> Result<Response, Refusal> {
    let ask = move |after: Option<String>| Command::StateList {
        origin: Arc::from(&*query.origin),
        space: Arc::from(&*query.space),
        prefix: query.prefix.clone(),
        after,
        limit: PAGE,
        at: query.at,
    };
    let Admin { broker, tasks, .. } = admin;
    let mut page = match broker.call(ask(None)).await? {
        event::Response::Entries { entries, more, .. } => (entries, more),
        other => return Err(refused(other)),
    };
    Ok(stream::ndjson(&tasks, "admin state", |mut lines| async move {
        loop {
            let (entries, more) = &page;
            for entry in entries {
                lines.line(&StateRow::from(entry)).await?;
            }
            let after = entries.last().map(|entry| entry.key.clone());
            if !more {
                return lines.flush().await;
            }
            match broker.call(ask(after)).await {
                Ok(event::Response::Entries { entries, more, .. }) => page = (entries, more),
                Ok(event::Response::TooOld { .. }) => {
                    lines
                        .line(&api::Problem { error: "the list is too old: begin again".to_owned() })
                        .await?;
                    return lines.flush().await;
                }
                _ => return lines.flush().await,
            }
        }
    }))
}

#[derive(Debug, Deserialize)]
pub(super) struct EntryQuery {
    #[serde(default)]
    origin: String,
    space: String,
    key: String,
    revision: Option<u64>,
    #[serde(default)]
    create: bool,
}

impl EntryQuery {
    fn expect(&self) -> Result<Expect, Refusal> {
        match (self.revision, self.create) {
            (Some(_), true) => Err(Refusal::bad("revision and create: give one of them")),
            (Some(revision), false) => Ok(Expect::Revision(revision)),
            (None, true) => Ok(Expect::Absent),
            (None, false) => Ok(Expect::Any),
        }
    }
}

/// One entry.
pub(super) async fn get(
    State(admin): State<Admin>,
    Query(query): Query<EntryQuery>,
) -> Result<Json<StateRow>, Refusal> {
    match entry(&admin, &query.origin, &query.space, &query.key).await? {
        Some(entry) => Ok(Json(StateRow::from(&entry))),
        None => Err(Refusal::not_found(format!("space {} has no key {}", query.space, query.key))),
    }
}

async fn entry(admin: &Admin, origin: &str, space: &str, key: &str) -> Result<Option<StateEntry>, Refusal> {
    let command = Command::StateGet { origin: origin.into(), space: space.into(), key: key.to_owned() };
    match admin.broker.call(command).await? {
        event::Response::Entry(entry) => Ok(entry),
        other => Err(unexpected(other)),
    }
}

/// Sets a key of a space that this process owns; the body is the value.
pub(super) async fn put(
    State(admin): State<Admin>,
    Query(query): Query<EntryQuery>,
    value: Bytes,
) -> Result<Json<Written>, Refusal> {
    let expect = query.expect()?;
    let op = StateOp { space: query.space.into(), key: query.key, change: StateChange::Put(value), expect };
    write_ops(&admin, vec![op]).await
}

/// Deletes a key of a space that this process owns.
pub(super) async fn delete(
    State(admin): State<Admin>,
    Query(query): Query<EntryQuery>,
) -> Result<Json<Written>, Refusal> {
    let expect = query.expect()?;
    let op = StateOp { space: query.space.into(), key: query.key, change: StateChange::Delete, expect };
    write_ops(&admin, vec![op]).await
}

/// Several keys, all or none.
pub(super) async fn write(
    State(admin): State<Admin>,
    Json(ops): Json<Vec<WriteOp>>,
) -> Result<Json<Written>, Refusal> {
    let ops: Result<Vec<StateOp>, Refusal> = ops.into_iter().map(op_of).collect();
    write_ops(&admin, ops?).await
}

fn op_of(op: WriteOp) -> Result<StateOp, Refusal> {
    let change = match (op.value, op.delete) {
        (Some(_), true) => return Err(Refusal::bad("value and delete: give one of them")),
        (Some(text), false) => {
            let value = api::payload(&text).map_err(|error| Refusal::bad(format!("value: {error}")))?;
            StateChange::Put(value.into())
        }
        (None, true) => StateChange::Delete,
        (None, false) => StateChange::Check,
    };
    let expect = match (op.revision, op.absent) {
        (Some(_), true) => return Err(Refusal::bad("revision and absent: give one of them")),
        (Some(revision), false) => Expect::Revision(revision),
        (None, true) => Expect::Absent,
        (None, false) => Expect::Any,
    };
    Ok(StateOp { space: op.space.into(), key: op.key, change, expect })
}

async fn write_ops(admin: &Admin, ops: Vec<StateOp>) -> Result<Json<Written>, Refusal> {
    for op in &ops {
        match &*op.space {
            "sys" => return Err(Refusal::bad("space sys is written by the hub alone")),
            "retained" => {
                return Err(Refusal::bad("space retained is written by publishing: octobus pub --retain"));
            }
            _ => {}
        }
    }
    let keys: Vec<String> = ops.iter().map(|op| op.key.clone()).collect();
    match admin.write(Command::StateWrite(ops)).await? {
        event::Response::Written(revisions) => Ok(Json(Written { revisions })),
        event::Response::Conflict { index, found } => {
            let found = if found == 0 { "is absent".to_owned() } else { format!("has revision {found}") };
            let error = format!("key {} {found}: nothing was written", keys[index]);
            Err(Refusal::new(StatusCode::CONFLICT, error))
        }
        other => Err(refused(other)),
    }
}

fn refused(response: event::Response) -> Refusal {
    match response {
        event::Response::TooOld { oldest } => {
            Refusal::new(StatusCode::GONE, format!("too old: the oldest known revision is {oldest}"))
        }
        other => unexpected(other),
    }
}

#[derive(Debug, Deserialize)]
pub(super) struct WatchQuery {
    #[serde(default)]
    origin: String,
    space: String,
    /// Prefixes, separated by zeros, which no key has.
    #[serde(default)]
    prefix: String,
    from: Option<u64>,
    #[serde(default)]
    previous: bool,
}

/// What is there and what changes, until the reader hangs up.
pub(super) async fn watch(
    State(admin): State<Admin>,
    Query(query): Query<WatchQuery>,
) -> Result<Response, Refusal> {
    let broker = admin.broker;
    let (ready, began) = tokio::sync::oneshot::channel();
    let answer = stream::ndjson(&admin.tasks, "admin watch", |mut lines| async move {
        let Ok(mut session) = ClientSession::open(&broker).await else { return Ok(()) };
        let command = Command::StateWatch {
            session: session.id(),
            origin: query.origin.into(),
            space: query.space.into(),
            prefixes: query.prefix.split('\0').map(str::to_owned).collect(),
            from: query.from,
            with_previous: query.previous,
        };
        let answer = broker.call(command).await;
        let goes_on = matches!(answer, Ok(event::Response::Done));
        // Not sent: the client hung up, which `lines` will show.
        let _hung_up = ready.send(answer);
        let ended = if goes_on { copy(&mut session, &mut lines).await } else { Ok(()) };
        session.close().await;
        ended
    });
    let stops = |_stopped| Refusal::new(StatusCode::SERVICE_UNAVAILABLE, "the broker stops");
    match began.await.map_err(stops)?? {
        event::Response::Done => Ok(answer),
        other => Err(refused(other)),
    }
}

async fn copy(session: &mut ClientSession, lines: &mut Lines) -> Result<(), Gone> {
    let mut outputs = VecDeque::new();
    loop {
        tokio::select! {
            biased;
            () = lines.gone() => return Err(Gone),
            () = session.recv(&mut outputs) => {}
        }
        let mut cost = 0;
        for output in outputs.drain(..) {
            cost += output.cost();
            match output {
                Output::State(event) => {
                    lines.line(&WatchRow::from(&event)).await?;
                    if let StateEvent::TooOld { .. } = event {
                        return lines.flush().await;
                    }
                }
                Output::Close(_) => return lines.flush().await,
                _ => {}
            }
        }
        lines.flush().await?;
        if session.done(cost).await.is_err() {
            return Ok(());
        }
    }
}

fn at_a_hub(admin: &Admin) -> Result<(), Refusal> {
    if admin.is_hub() { Ok(()) } else { Err(Refusal::bad("only a hub owns space fleet: ask there")) }
}

/// The hub has listed its source completely.
pub(super) async fn barrier(State(admin): State<Admin>) -> Result<Json<Written>, Refusal> {
    at_a_hub(&admin)?;
    match admin.write(Command::StateBarrier { space: FLEET.into() }).await? {
        event::Response::Written(revisions) => Ok(Json(Written { revisions })),
        other => Err(unexpected(other)),
    }
}

#[derive(Debug, Deserialize)]
pub(super) struct NodeQuery {
    node: String,
}

/// The removal of most of a node's workloads, as it is demanded now, is meant.
pub(super) async fn accept_removal(
    State(admin): State<Admin>,
    Query(query): Query<NodeQuery>,
) -> Result<Json<Written>, Refusal> {
    at_a_hub(&admin)?;
    known(&admin, &query.node).await?;
    let op = StateOp {
        space: FLEET.into(),
        key: format!("accept/{}", query.node),
        change: StateChange::Put(Bytes::new()),
        expect: Expect::Any,
    };
    write_ops(&admin, vec![op]).await
}

async fn known(admin: &Admin, node: &str) -> Result<(), Refusal> {
    match entry(admin, "", "sys", &format!("identity/{node}")).await? {
        Some(_) => Ok(()),
        None => Err(Refusal::not_found(format!("no node {node} is enrolled here"))),
    }
}

/// What to do with a node's want.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum WantAction {
    Set,
    Add,
    Remove,
}

#[derive(Debug, Deserialize)]
pub(super) struct WantQuery {
    node: String,
    action: WantAction,
}

/// Changes the list of keys that a node must have; answers with the new list.
pub(super) async fn want(
    State(admin): State<Admin>,
    Query(query): Query<WantQuery>,
    body: Bytes,
) -> Result<Json<Vec<String>>, Refusal> {
    at_a_hub(&admin)?;
    let keys: Vec<String> =
        serde_json::from_slice(&body).map_err(|error| Refusal::bad(format!("a list of keys: {error}")))?;
    known(&admin, &query.node).await?;
    for _ in 0..WANT_TRIES {
        let (held, expect) = wanted(&admin, &query.node).await?;
        let mut new = if query.action == WantAction::Set { Vec::new() } else { held };
        if query.action == WantAction::Remove {
            new.retain(|key| !keys.contains(key));
        } else {
            new.extend(keys.iter().cloned());
        }
        new.sort_unstable();
        new.dedup();
        let op = StateOp {
            space: FLEET.into(),
            key: format!("want/{}", query.node),
            change: StateChange::Put(codec::encode(&proto::Want { keys: new.clone() })),
            expect,
        };
        match admin.write(Command::StateWrite(vec![op])).await? {
            event::Response::Written(_) => return Ok(Json(new)),
            event::Response::Conflict { .. } => {} // somebody else was faster: once more
            other => return Err(refused(other)),
        }
    }
    Err(Refusal::new(StatusCode::CONFLICT, "somebody else keeps changing this want: try again"))
}

/// The list of keys that a node must have.
pub(super) async fn wants(
    State(admin): State<Admin>,
    Query(query): Query<NodeQuery>,
) -> Result<Json<Vec<String>>, Refusal> {
    Ok(Json(wanted(&admin, &query.node).await?.0))
}

async fn wanted(admin: &Admin, node: &str) -> Result<(Vec<String>, Expect), Refusal> {
    let Some(entry) = entry(admin, "", FLEET, &format!("want/{node}")).await? else {
        return Ok((Vec::new(), Expect::Absent));
    };
    let want: proto::Want = codec::decode(entry.value())
        .map_err(|error| Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, format!("want/{node}: {error}")))?;
    Ok((want.keys, Expect::Revision(entry.revision)))
}

#[derive(Debug, Deserialize)]
pub(super) struct IntentQuery {
    space: String,
    key: String,
    /// At a hub: the node whose space it is.
    #[serde(default)]
    node: String,
    #[serde(default)]
    delete: bool,
    /// Whatever is there.
    #[serde(default)]
    force: bool,
}

/// Asks the owner of a space for a change of what is seen of it here; durable when this answers.
pub(super) async fn intend(
    State(admin): State<Admin>,
    Query(query): Query<IntentQuery>,
    value: Bytes,
) -> Result<Json<Asked>, Refusal> {
    // Never used before: the clock goes forward, and within a microsecond the number does.
    static ASKED: AtomicU64 = AtomicU64::new(0);
    let id = format!("{:x}-{:x}", broker::clock::wall_us(), ASKED.fetch_add(1, Ordering::Relaxed));
    let seen = match entry(&admin, &query.node, &query.space, &query.key).await? {
        _ if query.force => Seen::Any,
        Some(entry) => Seen::At { incarnation: entry.incarnation, revision: entry.revision },
        None => Seen::Absent,
    };
    let value = (!query.delete).then_some(value);
    let intent = Intent { id: id.clone(), space: query.space.into(), key: query.key, value, seen };
    match admin.broker.call(Command::Intend { owner: query.node.into(), intent }).await? {
        event::Response::Done => Ok(Json(Asked { id })),
        other => Err(unexpected(other)),
    }
}

#[derive(Debug, Deserialize)]
pub(super) struct AnswerQuery {
    id: String,
    #[serde(default)]
    node: String,
}

/// What became of an intent; not found while the owner has not answered.
pub(super) async fn answer(
    State(admin): State<Admin>,
    Query(query): Query<AnswerQuery>,
) -> Result<Json<Answer>, Refusal> {
    let found = if admin.is_hub() {
        entry(&admin, &query.node, "status", &format!("intent-result/{}", query.id)).await?
    } else {
        let command = Command::StateList {
            origin: "".into(),
            space: FLEET.into(),
            prefix: "intent-result/".to_owned(),
            after: None,
            limit: limits::INTENT_RESULTS_MAX,
            at: None,
        };
        let event::Response::Entries { entries, .. } = admin.broker.call(command).await? else {
            return Err(Refusal::not_found("no answer yet"));
        };
        // A node holds the answers to its own intents alone.
        entries.into_iter().find(|entry| entry.key.rsplit('/').next() == Some(&query.id))
    };
    let Some(entry) = found else { return Err(Refusal::not_found("no answer yet")) };
    let result: proto::IntentResult = codec::decode(entry.value())
        .map_err(|error| Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()))?;
    let outcome = match result.outcome() {
        proto::IntentOutcome::Applied => "applied",
        proto::IntentOutcome::Conflict => "conflict",
        proto::IntentOutcome::NotAuthorizedIntent => "not-authorized",
        proto::IntentOutcome::ExpiredIntent => "expired",
        proto::IntentOutcome::Malformed => "malformed",
        proto::IntentOutcome::Unspecified => "unspecified",
    };
    Ok(Json(Answer { outcome: outcome.to_owned(), revision: result.revision }))
}
