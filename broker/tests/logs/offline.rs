//! Ten days without a link.

use std::time::Duration;

use broker::core::{
    Config, Full, Policy,
    event::{Publish, SessionId},
};
use codec::{Class, Kind};

use crate::harness::*;

/// Offline for ten days at 100 messages a second against 64 MiB, all of it divided by `scale`; then the link
/// comes up.
fn ten_days_offline(scale: u64) {
    const MIB: u64 = 1 << 20;
    let window = Duration::from_secs(1);
    let telemetry =
        Policy { full: Full::Thin { window }, ..Policy::of_class(Class::Telemetry, 56 * MIB / scale) };
    let alarms = Policy::of_class(Class::Alarm, 8 * MIB / scale);
    let streams =
        vec![stream("telemetry", Class::Telemetry, telemetry), stream("alarms", Class::Alarm, alarms)];
    let mut node = Broker::new(node(streams), Duration::ZERO);
    let (seconds, sample) = (864_000 / scale, (64 / scale).max(1));
    let (mut published, mut raised) = (0u64, 0u64);
    let mut forecasts: Vec<(u64, u64)> = Vec::new();
    let mut full_at = None;
    for second in 0..seconds {
        node.now += Duration::from_secs(1);
        let mut messages: Vec<Publish> = (0..100)
            .map(|n| node.message("telemetry/boiler", format!("{:>60}", published + n).as_bytes(), 1))
            .collect();
        published += 100;
        if second % 60 == 7 {
            messages.push(node.message("alarms/boiler", format!("{raised:>60}").as_bytes(), 2));
            raised += 1;
        }
        node.publish(messages);
        node.settle();
        if full_at.is_none() && second % sample == 0 && second > 5 {
            match node.log("n1", "telemetry").expect("it is there").seconds_to_full {
                Some(0) => full_at = Some(second),
                Some(left) => forecasts.push((second, left)),
                None => panic!("it fills"),
            }
        }
    }
    assert_eq!((node.refused.len(), node.acked.len() as u64), (0, published + raised), "all were promised");

    let full_at = full_at.expect("ten days fill it");
    assert!(forecasts.len() > 10, "{forecasts:?}");
    for (at, left) in forecasts {
        let actual = full_at - at;
        assert!(
            actual.abs_diff(left) <= actual / 10 + sample,
            "at {at} s: {left} s forecast, {actual} s in truth"
        );
    }

    let alarms = node.log("n1", "alarms").expect("alarms");
    let entries = node.read(&alarms);
    assert_eq!(entries.len() as u64, raised, "all alarms are complete");
    assert_eq!(check_partition(&alarms, &entries), 0);

    let telemetry = node.log("n1", "telemetry").expect("telemetry");
    assert!(telemetry.bytes <= 56 * MIB / scale, "within the quota");
    assert_eq!(
        (telemetry.begin, telemetry.first, telemetry.next),
        (1, 1, published + 1),
        "nothing was dropped whole"
    );
    let entries = node.read(&telemetry);
    let in_gaps = check_partition(&telemetry, &entries);
    check_accounting(&telemetry, &entries);
    assert_eq!(in_gaps + telemetry.records, published, "gaps describe exactly what was thinned");
    for record in entries.iter().filter(|entry| entry.header.kind == Kind::LOG) {
        assert_eq!(payload(record), format!("{:>60}", record.header.seq - 1).as_bytes(), "order is kept");
    }

    node.crash();
    let recovered = node.log("n1", "telemetry").expect("telemetry");
    assert_eq!(
        (recovered.bytes, recovered.records),
        (telemetry.bytes, telemetry.records),
        "across a restart"
    );

    let mut hub = Broker::new(Config::hub("h", "t", [9; 16], 2), node.now);
    link(&mut node, &mut hub, SessionId(9));
    assert_same(&mut node, &mut hub, "telemetry");
    assert_same(&mut node, &mut hub, "alarms");
}

#[test]
fn ten_days_offline_keep_all_alarms_and_describe_what_was_thinned() {
    ten_days_offline(100);
}

#[test]
#[ignore = "nightly: 86 million messages take minutes"]
fn nightly_ten_days_offline_at_full_size() {
    ten_days_offline(1);
}
