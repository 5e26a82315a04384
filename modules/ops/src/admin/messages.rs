//! Publishing and subscribing over the admin socket: for people and scripts, not for traffic.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use axum::{
    Json,
    extract::{Query, State},
    http::StatusCode,
    response::Response,
};
use broker::{
    Handle, clock,
    event::{
        self, Delivery, Event, OriginFilter, Output, Publish, Reply, RetainedOnSubscribe, Subscription,
        Target,
    },
};
use bytes::Bytes;
use codec::{Filter, FrameParts, FrameView, topic::validate_topic};
use serde::Deserialize;
use tokio::sync::oneshot;

use super::{
    Admin, Refusal,
    client_session::ClientSession,
    stream::{self, Gone, Lines},
    unexpected,
};
use crate::api::{MessageRow, rfc3339};

/// A publish that is not durable by then is answered as such.
const DURABLE_WITHIN: Duration = Duration::from_secs(10);

#[derive(Debug, Deserialize)]
pub(super) struct PublishQuery {
    topic: String,
    node: Option<String>,
    #[serde(default = "default_qos")]
    qos: u8,
    #[serde(default)]
    retain: bool,
}

const fn default_qos() -> u8 {
    1
}

/// Answers once the message is durable (QoS 1) or handed over (QoS 0).
pub(super) async fn publish(
    State(admin): State<Admin>,
    Query(query): Query<PublishQuery>,
    payload: Bytes,
) -> Result<Json<serde_json::Value>, Refusal> {
    validate_topic(&query.topic).map_err(|error| Refusal::bad(format!("topic: {error}")))?;
    if query.qos > 1 {
        return Err(Refusal::bad("qos: write 0 or 1"));
    }
    let target = match query.node {
        Some(node) if admin.is_hub() => Target::Node(Arc::from(node)),
        Some(_) => return Err(Refusal::bad("node: only a hub sends to nodes; leave it out here")),
        None => Target::Own,
    };
    let time_us = clock::wall_us();
    let parts = FrameParts { topic: &query.topic, time_us, payload: &payload, ..FrameParts::default() };
    let frame = parts.encode();
    // In a task of its own: a client that hangs up drops this future, but what was begun must be ended.
    let (answer, answered) = oneshot::channel();
    if let (Some(tier), Target::Node(node), 1..) = (admin.tier, &target, query.qos) {
        let node = Arc::clone(node);
        admin.tasks.spawn("admin publish", async move {
            let appended = match tier.append_down(&node, frame).await {
                Ok(event::Response::Done) => Ok(()),
                Ok(other) => Err(unexpected(other)),
                Err(stopped) => Err(stopped.into()),
            };
            // Not sent: the client hung up.
            drop(answer.send(appended));
        });
        let late = |_elapsed| Err(late());
        tokio::time::timeout(DURABLE_WITHIN, async { answered.await.map_err(|_dropped| stops())? })
            .await
            .unwrap_or_else(late)?;
        return Ok(Json(serde_json::json!({})));
    }
    let message = Publish {
        target,
        frame,
        qos: query.qos,
        packet_id: u16::from(query.qos > 0),
        dup: false,
        retain: query.retain,
        reply: None,
    };
    let broker = admin.broker;
    admin.tasks.spawn("admin publish", async move {
        // Not sent: the client hung up.
        drop(answer.send(publish_in_session(&broker, message).await));
    });
    answered.await.map_err(|_dropped| stops())??;
    Ok(Json(serde_json::json!({})))
}

async fn publish_in_session(broker: &Handle, message: Publish) -> Result<(), Refusal> {
    let mut session = ClientSession::open(broker).await?;
    let (qos, bytes) = (message.qos, message.frame.len());
    let published = Event::Published { session: session.id(), messages: vec![message] };
    session.send(published, bytes).await?;
    let outcome = if qos == 0 { Ok(()) } else { acknowledged(&mut session).await };
    session.close().await;
    outcome
}

fn stops() -> Refusal {
    Refusal::new(StatusCode::SERVICE_UNAVAILABLE, "the broker stops")
}

fn late() -> Refusal {
    let error = format!("not durable within {DURABLE_WITHIN:?}: it may become so later");
    Refusal::new(StatusCode::GATEWAY_TIMEOUT, error)
}

async fn acknowledged(session: &mut ClientSession) -> Result<(), Refusal> {
    let answer = async {
        let mut outputs = VecDeque::new();
        loop {
            session.recv(&mut outputs).await;
            for output in outputs.drain(..) {
                match output {
                    Output::Reply(Reply::PubAck(_)) => return Ok(()),
                    Output::Reply(Reply::Refused { reason, .. }) => {
                        return Err(Refusal::new(StatusCode::CONFLICT, reason.to_string()));
                    }
                    Output::Close(_) => {
                        return Err(stops());
                    }
                    _ => {}
                }
            }
        }
    };
    tokio::time::timeout(DURABLE_WITHIN, answer).await.unwrap_or_else(|_elapsed| Err(late()))
}

#[derive(Debug, Deserialize)]
pub(super) struct SubscribeQuery {
    filter: String,
    node: Option<String>,
}

/// Live messages, and first the retained ones that match, until the reader hangs up.
pub(super) async fn subscribe(
    State(admin): State<Admin>,
    Query(query): Query<SubscribeQuery>,
) -> Result<Response, Refusal> {
    let filter = Filter::parse(&query.filter).map_err(|error| Refusal::bad(format!("filter: {error}")))?;
    let origin = match query.node.as_deref() {
        Some("*") => OriginFilter::AnyNode,
        Some("") => OriginFilter::Own,
        Some(node) if admin.is_hub() => OriginFilter::Node(Arc::from(node)),
        Some(_) => return Err(Refusal::bad("node: only a hub hears other nodes; leave it out here")),
        None if admin.is_hub() => OriginFilter::AnyNode,
        None => OriginFilter::Own,
    };
    let subscription = Subscription {
        id: 1,
        origin,
        filter,
        qos: 0,
        group: None,
        no_local: false,
        retain_as_published: false,
        retained: RetainedOnSubscribe::Send,
        wildcard_matches_dollar: false,
        identifier: 0,
    };
    // The session is the task's from its beginning: whenever the client hangs up, the task closes it.
    let (ready, subscribed) = oneshot::channel();
    let broker = admin.broker;
    let answer = stream::ndjson(&admin.tasks, "admin subscribe", |mut lines| async move {
        let Ok(mut session) = ClientSession::open(&broker).await else { return Ok(()) };
        let event = Event::Subscribed { session: session.id(), token: 1, subscriptions: vec![subscription] };
        if session.send(event, 0).await.is_err() {
            return Ok(());
        }
        // Not sent: the client hung up, which `lines` will show.
        let _hung_up = ready.send(());
        let ended = copy(&mut session, &mut lines).await;
        session.close().await;
        ended
    });
    subscribed.await.map_err(|_stopped| stops())?;
    Ok(answer)
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
                Output::Deliver(delivery) => write(&delivery, lines).await?,
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

async fn write(delivery: &Delivery, lines: &mut Lines) -> Result<(), Gone> {
    let Ok(frame) = FrameView::parse(&delivery.frame) else {
        return Ok(()); // the core checked it: unreachable, and nothing to show
    };
    let row = MessageRow {
        node: delivery.origin.to_string(),
        topic: frame.topic().to_owned(),
        time: rfc3339(frame.time_us()),
        payload: crate::api::base64(frame.payload()),
        retained: delivery.retain,
    };
    lines.line(&row).await
}
