//! `GET /v1/ping`: measures a link from end to end, over a Stream that the peer echoes.

use std::{io, time::Duration};

use axum::{
    Json,
    extract::{Query, State},
    http::StatusCode,
};
use broker::link::stream::{self, ByteStream, OpenError};
use codec::proto::StreamOpen;
use serde::Deserialize;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    time::{Instant, timeout},
};

use super::{Admin, Refusal};
use crate::api::PingRow;

/// Bytes of one round trip: a small control message.
const ROUND_BYTES: usize = 64;
const COUNT_MAX: u32 = 1_000;
const BYTES_MAX: u64 = 64 << 20;
/// Longest that all of it may take; the command line waits 30 s.
const ALL_WITHIN: Duration = Duration::from_secs(28);
const CHUNK: usize = 16 << 10;

#[derive(Debug, Deserialize)]
pub(super) struct PingQuery {
    #[serde(default)]
    node: String,
    #[serde(default = "five")]
    count: u32,
    #[serde(default)]
    bytes: u64,
}

const fn five() -> u32 {
    5
}

pub(super) async fn ping(
    State(admin): State<Admin>,
    Query(query): Query<PingQuery>,
) -> Result<Json<PingRow>, Refusal> {
    if query.count > COUNT_MAX || query.bytes > BYTES_MAX {
        return Err(Refusal::bad("at most 1000 round trips and 64 MiB"));
    }
    let open = StreamOpen { kind: stream::ECHO.to_owned(), ..StreamOpen::default() };
    let measuring = async {
        let (peer, mut echo) = opened(&admin, &query.node, &open).await?;
        let mut round_trips_us = Vec::new();
        for _ in 0..query.count {
            round_trips_us.push(round_trip(&mut echo).await.map_err(broken)?);
        }
        let echo_us =
            if query.bytes > 0 { Some(through(echo, query.bytes).await.map_err(broken)?) } else { None };
        Ok(PingRow { peer, round_trips_us, bytes: query.bytes, echo_us })
    };
    let measured = timeout(ALL_WITHIN, Box::pin(measuring)).await;
    measured
        .unwrap_or_else(|_elapsed| Err(Refusal::new(StatusCode::GATEWAY_TIMEOUT, "not echoed in time")))
        .map(Json)
}

/// An echo, and who answers.
async fn opened(admin: &Admin, node: &str, open: &StreamOpen) -> Result<(String, ByteStream), Refusal> {
    if let (Some(tier), false) = (&admin.tier, node.is_empty()) {
        return match tier.open_stream(node, open).await {
            Ok(stream) => Ok((node.to_owned(), stream)),
            Err(OpenError::NoLink(_)) => Err(Refusal::not_found(format!("{node} is not linked"))),
            Err(error) => Err(not_opened(error)),
        };
    }
    let links = &admin.links;
    let link = if node.is_empty() { links.newest() } else { links.find(node) };
    let link = link.ok_or_else(|| match node {
        "" if admin.is_hub() => Refusal::not_found("no node is linked"),
        "" => Refusal::not_found("no hub is linked"),
        node => Refusal::not_found(format!("{node} is not linked to this process")),
    })?;
    Ok((link.peer().name.to_string(), link.open_stream(open).await.map_err(not_opened)?))
}

fn not_opened(error: OpenError) -> Refusal {
    Refusal::new(StatusCode::BAD_GATEWAY, error.to_string())
}

fn broken(error: io::Error) -> Refusal {
    Refusal::new(StatusCode::BAD_GATEWAY, format!("the stream ended: {error}"))
}

/// Microseconds.
async fn round_trip(echo: &mut ByteStream) -> io::Result<u64> {
    let began = Instant::now();
    echo.write_all(&[0; ROUND_BYTES]).await?;
    echo.read_exact(&mut [0; ROUND_BYTES]).await?;
    Ok(micros(began))
}

/// Microseconds until the last of these bytes is back.
async fn through(echo: ByteStream, bytes: u64) -> io::Result<u64> {
    let began = Instant::now();
    let (mut reader, mut writer) = echo.into_split();
    let writing = async {
        let mut left = bytes;
        while left > 0 {
            let part = left.min(CHUNK as u64);
            writer.write_all(&[0x5a; CHUNK][..usize::try_from(part).expect("at most a chunk")]).await?;
            left -= part;
        }
        writer.shutdown().await
    };
    let reading = async {
        let mut back = 0;
        let mut buffer = vec![0; CHUNK];
        loop {
            match reader.read(&mut buffer).await? {
                0 if back == bytes => return Ok(()),
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                n => back += n as u64,
            }
        }
    };
    tokio::try_join!(writing, reading)?;
    Ok(micros(began))
}

fn micros(began: Instant) -> u64 {
    u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX)
}
