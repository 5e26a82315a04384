//! Messages of a WebSocket's peer, whatever they are, through the multiplexer and its lanes: no panic, no
//! growth.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| broker::link::fuzz_fragments(input));
