//! One policy at a time.

use std::time::Duration;

use broker::core::{
    Config, Full, Policy,
    event::{Command, Event, PublishRefusal, Response, SessionId},
};
use codec::{Class, FrameView, Kind, Record, proto};

use crate::harness::*;

#[test]
fn a_full_stream_that_rejects_says_so_and_takes_more_once_what_it_holds_has_arrived() {
    let mut node = node_with(Policy { full: Full::Reject, ..Policy::of_class(Class::Telemetry, 300_000) });
    fill(&mut node, "s/x", 400);
    let full = node.log("n1", "s").expect("the stream");
    assert!(full.bytes <= 300_000 && full.first == 1, "nothing was dropped: {full:?}");
    let refused = node.refused.len();
    assert_eq!(refused + node.acked.len(), 400, "every publish was answered");
    assert!(node.refused.iter().all(|reason| *reason == PublishRefusal::Quota), "with the reason");

    let mut hub = Broker::new(Config::hub("h", "t", [9; 16], 2), node.now);
    link(&mut node, &mut hub, SessionId(9));
    node.pass(Duration::from_secs(2));
    fill(&mut node, "s/x", 1);
    assert_eq!(node.refused.len(), refused + 1, "the hub may still lose its tail and ask again");
    node.pass(Duration::from_mins(5));
    fill(&mut node, "s/x", 10);
    assert_eq!(node.refused.len(), refused + 1, "what has arrived gives way");
    let log = node.log("n1", "s").expect("the stream");
    let entries = node.read(&log);
    check_partition(&log, &entries);
    assert_eq!(reasons(&entries), [proto::GapReason::Acknowledged]);
}

#[test]
fn age_counts_only_where_clock_and_record_are_trusted() {
    let policy =
        Policy { age_max: Some(Duration::from_hours(1)), ..Policy::of_class(Class::Telemetry, 1 << 30) };
    let mut node = node_with(policy);
    fill(&mut node, "s/x", 300);
    node.trusted = false;
    node.pass(Duration::from_hours(3));
    fill(&mut node, "s/x", 10);
    node.pass(Duration::from_mins(10));
    assert_eq!(
        node.log("n1", "s").expect("the stream").records,
        310,
        "nothing goes on a clock that may be wrong"
    );

    node.trusted = true;
    fill(&mut node, "s/x", 5);
    node.pass(Duration::from_mins(2));
    let log = node.log("n1", "s").expect("the stream");
    assert_eq!(
        (log.first, log.records),
        (301, 15),
        "what has no trusted time stays while what is behind it is young"
    );
    let entries = node.read(&log);
    check_accounting(&log, &entries);
    assert_eq!(reasons(&entries), [proto::GapReason::Expired]);
    node.pass(Duration::from_mins(70));
    node.pass(Duration::from_mins(70));
    assert_eq!(node.log("n1", "s").expect("the stream").records, 0, "and goes with it");
}

#[test]
fn a_count_is_kept_exactly() {
    let policy = Policy { count_max: Some(100), ..Policy::of_class(Class::Telemetry, 1 << 30) };
    let mut node = node_with(policy);
    for _ in 0..50 {
        fill(&mut node, "s/x", 7);
        let log = node.log("n1", "s").expect("the stream");
        assert!(log.records <= 100 && (log.next <= 100 || log.records >= 94), "{log:?}");
        let entries = node.read(&log);
        assert_eq!(check_partition(&log, &entries) + log.records, log.next - 1);
        check_accounting(&log, &entries);
    }
    node.crash();
    fill(&mut node, "s/x", 1);
    assert!(node.log("n1", "s").expect("the stream").records >= 94, "a restart costs no records");
}

#[test]
fn acknowledged_records_go_after_their_time_unless_a_durable_session_has_not_read_them() {
    let policy =
        Policy { retain_acked: Some(Duration::from_mins(10)), ..Policy::of_class(Class::Telemetry, 1 << 30) };
    let mut node = node_with(policy);
    let mut hub = Broker::new(Config::hub("h", "t", [9; 16], 2), node.now);
    link(&mut node, &mut hub, SessionId(9));
    fill(&mut node, "s/x", 300);
    exchange(&mut node, &mut hub);
    node.pass(Duration::from_secs(2));
    node.pass(Duration::from_mins(9));
    assert_eq!(node.log("n1", "s").expect("the stream").first, 1, "not yet");
    node.pass(Duration::from_mins(2));
    let log = node.log("n1", "s").expect("the stream");
    assert!(log.first > 200 && log.bytes <= 70_000, "all but the last stretch: {log:?}");

    // From here on a session that is away has not read it.
    let away = node.open_mqtt("away", true);
    node.event(Event::SessionClosed { session: away, clean: true });
    let unread = node.log("n1", "s").expect("the stream").next;
    fill(&mut node, "s/x", 300);
    exchange(&mut node, &mut hub);
    node.pass(Duration::from_mins(30));
    node.pass(Duration::from_mins(30));
    let log = node.log("n1", "s").expect("the stream");
    assert!(log.first <= unread && log.records >= 300, "{log:?}, unread from {unread}");
}

#[test]
fn a_thinned_stream_tells_the_same_from_memory_and_from_the_store() {
    let window = Duration::from_secs(60);
    let mut node =
        node_with(Policy { full: Full::Thin { window }, ..Policy::of_class(Class::Telemetry, 600_000) });
    fill(&mut node, "s/x", 700);
    let log = node.log("n1", "s").expect("the stream");
    let entries = node.read(&log);
    assert_eq!(reasons(&entries), [proto::GapReason::Thinned]);
    let first = entries.first().expect("an entry");
    assert_eq!((first.header.kind, first.header.seq), (Kind::LOG, 1), "the first record of the first window");
    let mut hub = Broker::new(Config::hub("h", "t", [9; 16], 2), node.now);
    link(&mut node, &mut hub, SessionId(9));
    assert_same(&mut node, &mut hub, "s");
}

#[test]
fn what_the_hub_has_is_not_lost_to_a_gap_that_grew_over_it() {
    let window = Duration::from_secs(600);
    let mut node =
        node_with(Policy { full: Full::Thin { window }, ..Policy::of_class(Class::Telemetry, 600_000) });
    let mut hub = Broker::new(Config::hub("h", "t", [9; 16], 2), node.now);
    fill(&mut node, "s/x", 100);
    link(&mut node, &mut hub, SessionId(9));
    unlink(&mut node, &mut hub, SessionId(9));
    fill(&mut node, "s/x", 900);
    let log = node.log("n1", "s").expect("the stream");
    let entries = node.read(&log);
    assert!(
        entries.iter().any(|entry| range(entry).0 <= 100 && range(entry).1 > 100),
        "a gap reaches over its mark"
    );
    link(&mut node, &mut hub, SessionId(10));
    let log = hub.log("n1", "s").expect("the stream");
    let entries = hub.read(&log);
    check_partition(&log, &entries);
    let whole = entries.iter().take_while(|entry| entry.header.kind == Kind::LOG).count();
    assert!(whole >= 100, "the hub keeps what it acknowledged, not {whole}");
}

#[test]
fn a_time_is_found_in_a_long_log_with_gaps() {
    let window = Duration::from_secs(5);
    let mut node =
        node_with(Policy { full: Full::Thin { window }, ..Policy::of_class(Class::Telemetry, 600_000) });
    fill(&mut node, "s/x", 2000);
    let log = node.log("n1", "s").expect("the stream");
    let entries = node.read(&log);
    let time = |entry: &Record| FrameView::parse(&entry.body).expect("a frame").time_us();
    for second in [0, 1, 2, 77, 500, 1234, 1999, 2000, 2001] {
        let time_us = EPOCH_US + second * 1_000_000;
        let (origin, stream) = ("n1".into(), "s".into());
        let Response::Place(seq) = node.ask(Command::LogSeek { origin, stream, epoch: None, time_us }) else {
            panic!("a place")
        };
        let older = entries.iter().filter(|entry| entry.header.kind == Kind::LOG && time(entry) < time_us);
        let expected = older.last().map_or(1, |entry| entry.header.seq + 1);
        assert_eq!(seq, expected, "at {second} s");
    }
}

#[test]
fn a_record_that_no_broker_can_take_goes_to_dead_letter_and_blocks_nothing() {
    let mut node = node_with(Policy::of_class(Class::Telemetry, 1 << 30));
    fill(&mut node, "s/x", 3);
    let bad = node.message("s/with a \0 in it", b"bad", 1);
    node.publish(vec![bad]);
    fill(&mut node, "s/x", 3);
    // Its filter does not match such a topic: it may stand in another stream, with a good one behind it.
    fill(&mut node, "other", 1);
    let mut hub = Broker::new(Config::hub("h", "t", [9; 16], 2), node.now);
    link(&mut node, &mut hub, SessionId(9));
    let mut arrived = 0;
    for stream in ["s", "default"] {
        let (Some(here), Some(there)) = (node.log("n1", stream), hub.log("n1", stream)) else { continue };
        assert_eq!(here.next, there.next, "the mark moved over it");
        let entries = hub.read(&there);
        check_partition(&there, &entries);
        arrived += there.records;
        for gap in reasons(&entries) {
            assert_eq!(gap, proto::GapReason::Refused);
        }
    }
    assert_eq!(arrived, 7, "everything else is there");
    let letters = hub.log("", "dead-letter").expect("the stream");
    let entries = hub.read(&letters);
    let view = FrameView::parse(&entries[0].body).expect("a frame");
    assert_eq!(view.header("Octobus-Origin"), Some(&b"n1"[..]));
    assert_eq!(view.header("Octobus-Seq"), Some(&b"4"[..]));
    assert_eq!(view.header("Octobus-Reason"), Some(&b"not a topic"[..]));
    let held = FrameView::parse(view.payload()).expect("the frame as it came");
    assert_eq!((entries.len(), held.payload()), (1, &b"bad"[..]));
}

#[test]
fn a_stream_that_begins_anew_again_and_again_keeps_to_its_quota_at_the_hub() {
    let mut node = node_with(Policy::of_class(Class::Telemetry, 1 << 30));
    let mut config = Config::hub("h", "t", [9; 16], 2);
    config.default_stream.policy.bytes_max = 400_000;
    let mut hub = Broker::new(config, node.now);
    for round in 0..8u64 {
        fill(&mut node, "s/x", 200);
        link(&mut node, &mut hub, SessionId(20 + round));
        unlink(&mut node, &mut hub, SessionId(20 + round));
        node.config.mint = true;
        node.crash();
    }
    let Response::Logs(logs) = hub.ask(Command::LogList { origin: Some("n1".into()) }) else {
        panic!("Logs")
    };
    assert_eq!(logs.len(), 8, "each is a history of its own");
    let held: u64 = logs.iter().map(|log| log.bytes).sum();
    assert!(held <= 600_000, "{held} bytes of a quota of 400 000");
    let newest = logs.last().expect("the last");
    assert_eq!(newest.records, 200, "the current one is whole");
}
