//! The decoder as fuzzing and mutation tests see it: bytes in, no panic out.

use std::sync::Arc;

use super::{
    connect::Connect,
    counters::Counters,
    gate::{self, Gate},
    publish::Entered,
    session::{Limits, Session},
    wire::Version,
    writer::Writer,
};
use crate::{
    core::event::{Output, Reply, SessionId},
    front::auth::Permissions,
};

/// Feeds bytes to the decoder of a connection in either version, and to that of CONNECT.
pub fn decode(input: &[u8]) {
    if let Ok(Gate::Packet(packet)) = gate::check(input, None, super::connect::CONNECT_BYTES_MAX) {
        let _refused = Connect::parse(packet.body);
    }
    for version in [Version::V4, Version::V5] {
        decode_as(version, input);
    }
}

fn decode_as(version: Version, mut input: &[u8]) {
    let limits = Limits {
        expiry_max_s: u32::MAX,
        lowered_expiry_s: None,
        packet_max: 1 << 20,
        client_packet_max: 1 << 20,
        receive_max: 16,
        topic_alias_max: 4,
        lasting: false,
    };
    let permissions = Arc::new(Permissions::all());
    let counters = Arc::new(Counters::default());
    let mut session = Session::new(SessionId(1), version, limits, permissions, counters, None);
    let mut out = Writer::default();
    let opened = Output::Reply(Reply::Opened { session_present: false });
    session.send(opened, 0, &mut out).expect("opening does not close");
    while let Ok(received) = session.receive(input, Entered { time_us: 1, trusted: false }, &mut out) {
        for event in session.take_events() {
            drop(event);
        }
        if received.consumed == 0 {
            break;
        }
        input = &input[received.consumed..];
    }
}
