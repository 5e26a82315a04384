//! P11: what it costs to route one encoded 256-byte frame, against decoding it as others do.
//!
//! Ours, in three steps: reading the head alone (`FrameView::parse`), and the whole of `Core::apply` for a QoS 0
//! publish with nobody and with one session listening, among 1000 filters that do not match. The peers only
//! decode; they do not route: prost into owned fields (payload and names shared with the buffer where it can),
//! and KubeEdge's encoding, JSON in protobuf, into typed fields and into a tree.

use std::{hint::black_box, time::Duration};

use bytes::Bytes;
use codec::{FrameView, proto};
use octobus_benches::{
    kubeedge,
    measure::{self, Figure, Sample, Side},
    report::{self, say},
    routing::{self, Bare, TOPIC},
};
use prost::Message as _;
use serde_json::{Value, json};

const SIZE: usize = 256;
const FILTERS: u32 = 1000;
const ROUND: Duration = Duration::from_millis(200);
/// Operations between two looks at the clock.
const CHUNK: u64 = 1024;
/// Messages of one event where a front hands over many.
const BURST: u64 = 64;

fn main() -> anyhow::Result<()> {
    let frame = routing::frame_of_size(TOPIC, SIZE);
    let foreign = kubeedge::message();
    let mut nobody = Bare::new(FILTERS, 0);
    let mut one = Bare::new(FILTERS, 1);
    let mut bursts = Bare::new(FILTERS, 1);
    let mut sides = [
        Side::new("header view", repeat(|| FrameView::parse(black_box(&frame)))),
        Side::new("apply, nobody listens", repeat(|| nobody.publish(vec![routing::publish(&frame, 0)]))),
        Side::new("apply, one listens", repeat(|| one.publish(vec![routing::publish(&frame, 0)]))),
        Side::new("apply, one listens, 64 at once", || {
            measure::run_for(ROUND, || {
                (0..CHUNK / BURST)
                    .map(|_| bursts.publish(vec![routing::publish(&frame, 0); BURST as usize]))
                    .sum()
            })
        }),
        Side::new("prost decode", repeat(|| proto::Frame::decode(black_box(frame.clone())))),
        Side::new("JSON in protobuf, typed", repeat(|| typed(black_box(&foreign)))),
        Side::new("JSON in protobuf, tree", repeat(|| tree(black_box(&foreign)))),
    ];
    let names: Vec<&str> = sides.iter().map(|side| side.name).collect();
    let samples = measure::interleave(&mut sides);
    let (ours, peers) = samples.split_at(4);
    let mut cases = Vec::new();
    for (name, ours) in names.iter().zip(ours) {
        let figure = Figure::of(ours.iter().map(Sample::cpu_ns));
        say(format_args!("{name:32} {:8.1} ns [{:.1}-{:.1}]", figure.median, figure.min, figure.max));
        let mut case =
            json!({ "case": name, "ours": figure.json(), "cpu_ns_per_op": measure::round(figure.median) });
        for (peer_name, peer) in names[4..].iter().zip(peers) {
            let figure = Figure::of(peer.iter().map(Sample::cpu_ns));
            case["peer"][peer_name] = figure.json();
            case["ratio"][peer_name] = measure::ratio(ours, peer, Sample::cpu_ns).json();
        }
        cases.push(case);
    }
    for (name, peer) in names[4..].iter().zip(peers) {
        let figure = Figure::of(peer.iter().map(Sample::cpu_ns));
        say(format_args!("{name:32} {:8.1} ns [{:.1}-{:.1}]", figure.median, figure.min, figure.max));
    }
    cases.push(json!({ "sizes": { "frame": frame.len(), "JSON in protobuf": foreign.len() } }));
    report::print("P11", &cases)
}

fn repeat<'a, T>(mut op: impl FnMut() -> T + 'a) -> impl FnMut() -> Sample + 'a {
    move || {
        measure::run_for(ROUND, || {
            for _ in 0..CHUNK {
                black_box(op());
            }
            CHUNK
        })
    }
}

fn typed(raw: &Bytes) -> anyhow::Result<(kubeedge::Message, kubeedge::Update)> {
    let message = kubeedge::Message::decode(raw.clone())?;
    let update = serde_json::from_slice(&message.content)?;
    Ok((message, update))
}

fn tree(raw: &Bytes) -> anyhow::Result<(kubeedge::Message, Value)> {
    let message = kubeedge::Message::decode(raw.clone())?;
    let content = serde_json::from_slice(&message.content)?;
    Ok((message, content))
}
