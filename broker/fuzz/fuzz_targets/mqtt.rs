//! Bytes of a client, in both protocol versions: no panic, whatever they are.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| broker::front::mqtt::fuzz::decode(input));
