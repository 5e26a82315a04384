//! Bytes of a NATS client, whatever they are, through parser and session: no panic, no growth.
#![no_main]

use broker::front::nats::{self, Side};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (bool, u8, &[u8])| {
    let (hub, piece, bytes) = input;
    nats::fuzz(if hub { Side::Hub } else { Side::Node }, bytes, usize::from(piece));
});
