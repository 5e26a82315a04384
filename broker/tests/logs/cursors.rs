//! Where a session stands in a Log.

use std::time::Duration;

use broker::{
    core::{
        Policy,
        event::{ClientAck, Event},
    },
    limits,
};
use codec::Class;

use crate::harness::*;

#[test]
fn a_session_at_the_bound_of_its_acknowledgements_goes_on_after_a_restart() {
    const MANY: u16 = limits::CURSOR_ACKED_MAX as u16 + 500;
    let mut node = node_with(Policy::of_class(Class::Telemetry, 1 << 30));
    let session = node.open_mqtt("c", true);
    for _ in 0..MANY {
        let message = node.message("s/x", b"x", 1);
        node.publish(vec![message]);
    }
    node.settle();
    // Everything but the oldest is acknowledged, as far as deliveries go on.
    let mut done = 1;
    while done < node.delivered.len() {
        let acks = node.delivered[done..].iter().map(|(_, id)| ClientAck::Ack(*id)).collect();
        done = node.delivered.len();
        node.event(Event::Acked { session, acks });
        node.settle();
    }
    assert!(done <= limits::CURSOR_ACKED_MAX, "{done}: what is acknowledged apart is bounded");
    node.pass(Duration::from_secs(2));
    node.crash();

    let session = node.open_mqtt("c", false);
    node.settle();
    let mut seen: Vec<u64> = Vec::new();
    while let Some((seq, id)) = node.delivered.pop() {
        seen.push(seq);
        node.event(Event::Acked { session, acks: vec![ClientAck::Ack(id)] });
        node.settle();
    }
    let rest = u64::from(MANY) - done as u64 + 1;
    assert_eq!(
        seen.len() as u64,
        rest,
        "the oldest once more, then only what was not acknowledged: {seen:?}"
    );
    assert_eq!(seen[0], 1);
}
