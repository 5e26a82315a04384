//! Any history of appends, restarts and links under any policy.

use std::{collections::BTreeMap, time::Duration};

use broker::core::{Config, Full, Policy, event::SessionId};
use bytes::Bytes;
use codec::{Class, Kind};
use proptest::prelude::*;

use crate::harness::*;

#[derive(Debug, Clone)]
enum Step {
    /// Messages of this many bytes, this far apart.
    Publish {
        alarm: bool,
        count: u16,
        bytes: u16,
        apart_ms: u32,
    },
    Pass {
        seconds: u32,
    },
    /// What was not flushed is lost; `flushed` groups of it are not.
    Crash {
        flushed: u8,
    },
    Trust(bool),
    Link {
        up: bool,
    },
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => (prop::bool::weighted(0.2), 1..200u16, 1..3000u16, 0..2000u32)
            .prop_map(|(alarm, count, bytes, apart_ms)| Step::Publish { alarm, count, bytes, apart_ms }),
        2 => (1..2000u32).prop_map(|seconds| Step::Pass { seconds }),
        2 => (0..4u8).prop_map(|flushed| Step::Crash { flushed }),
        1 => any::<bool>().prop_map(Step::Trust),
        2 => any::<bool>().prop_map(|up| Step::Link { up }),
    ]
}

fn policy() -> impl Strategy<Value = Policy> {
    let full = prop_oneof![
        Just(Full::DropOldest),
        Just(Full::Reject),
        (100..20_000u64).prop_map(|ms| Full::Thin { window: Duration::from_millis(ms) })
    ];
    let seconds = |max: u64| prop::option::weighted(0.3, (60..max).prop_map(Duration::from_secs));
    (full, 150_000..900_000u64, prop::option::weighted(0.3, 20..600u64), seconds(3000), seconds(600))
        .prop_map(|(full, bytes_max, count_max, age_max, retain_acked)| Policy {
            count_max,
            age_max,
            retain_acked,
            ..Policy { full, ..Policy::of_class(Class::Telemetry, bytes_max) }
        })
}

/// What the property checks against.
#[derive(Default)]
struct Model {
    /// By stream: the payload that stands at a seq, for ever.
    places: BTreeMap<(String, u64), Bytes>,
    /// Acknowledged alarms in order.
    alarms: Vec<Bytes>,
    number: u64,
}

impl Model {
    fn check(&mut self, node: &mut Broker, policy: &Policy) {
        for name in ["telemetry", "alarms"] {
            let Some(log) = node.log("n1", name) else { continue };
            let entries = node.read(&log);
            check_partition(&log, &entries);
            check_accounting(&log, &entries);
            let mut alarms = self.alarms.iter();
            for record in entries.iter().filter(|entry| entry.header.kind == Kind::LOG) {
                let found = payload(record);
                let place = (name.to_owned(), record.header.seq);
                let held = self.places.entry(place).or_insert_with(|| found.clone());
                assert_eq!(*held, found, "a place holds one thing for ever");
                if name == "alarms" {
                    assert_eq!(alarms.next(), Some(&found), "alarms are complete and in order");
                }
            }
            if name == "alarms" {
                assert_eq!(alarms.next(), None, "no alarm is lost");
            } else {
                let largest = 3100;
                assert!(
                    log.bytes <= policy.bytes_max.max(2 * (64 << 10)) + largest,
                    "within the quota: {log:?}"
                );
                let count_max = policy.count_max.unwrap_or(u64::MAX);
                assert!(log.records <= count_max, "{} of {count_max} records", log.records);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, max_shrink_iters: 200, ..ProptestConfig::default() })]

    #[test]
    fn gaps_and_records_tell_every_seq_once_whatever_policy_removes(
        policy in policy(), steps in prop::collection::vec(step(), 1..30)
    ) {
        let alarms = Policy::of_class(Class::Alarm, 64 << 20);
        let streams = vec![
            stream("telemetry", Class::Telemetry, policy.clone()),
            stream("alarms", Class::Alarm, alarms),
        ];
        let mut node = Broker::new(node(streams), Duration::ZERO);
        let mut hub = Broker::new(Config::hub("h", "t", [9; 16], 2), Duration::ZERO);
        let (mut model, mut sessions, mut linked) = (Model::default(), 10, None);
        for step in steps {
            match step {
                Step::Publish { alarm, count, bytes, apart_ms } => {
                    let topic = if alarm { "alarms/x" } else { "telemetry/x" };
                    for at in 0..count {
                        node.now += Duration::from_millis(apart_ms.into());
                        model.number += 1;
                        let text = format!("{:>width$}", model.number, width = usize::from(bytes));
                        node.acked.clear();
                        let message = node.message(topic, text.as_bytes(), 1);
                        node.publish(vec![message]);
                        if at % 8 == 0 || alarm {
                            node.settle();
                        }
                        if alarm && !node.acked.is_empty() {
                            model.alarms.push(text.into());
                        }
                    }
                    node.settle();
                }
                Step::Pass { seconds } => node.pass(Duration::from_secs(seconds.into())),
                Step::Crash { flushed } => {
                    if let Some(session) = linked.take() {
                        unlink(&mut node, &mut hub, session);
                    }
                    let messages = (0..20).map(|_| node.message("telemetry/x", &[b'x'; 2000], 1)).collect();
                    node.publish(messages);
                    node.store.flush_some(flushed.into());
                    node.crash();
                    node.settle();
                }
                Step::Trust(trusted) => node.trusted = trusted,
                Step::Link { up } => {
                    if let Some(session) = linked.take() {
                        exchange(&mut node, &mut hub);
                        unlink(&mut node, &mut hub, session);
                    }
                    if up {
                        sessions += 1;
                        hub.now = hub.now.max(node.now);
                        link(&mut node, &mut hub, SessionId(sessions));
                        linked = Some(SessionId(sessions));
                    }
                }
            }
            if linked.is_some() {
                exchange(&mut node, &mut hub);
            }
            model.check(&mut node, &policy);
        }
        if linked.is_none() {
            link(&mut node, &mut hub, SessionId(5));
        }
        exchange(&mut node, &mut hub);
        // The hub holds all that the node still has, exactly once and in place; of what the node freed or thinned
        // later, it may hold more.
        for name in ["telemetry", "alarms"] {
            let (Some(here), Some(there)) = (node.log("n1", name), hub.log("n1", name)) else { continue };
            prop_assert_eq!(here.next, there.next);
            let found = hub.read(&there);
            check_partition(&there, &found);
            check_accounting(&there, &found);
            for record in found.iter().filter(|entry| entry.header.kind == Kind::LOG) {
                if let Some(held) = model.places.get(&(name.to_owned(), record.header.seq)) {
                    prop_assert_eq!(&payload(record), held);
                }
            }
            let there: BTreeMap<u64, Bytes> =
                found.iter().filter(|entry| entry.header.kind == Kind::LOG).map(|entry| (entry.header.seq, payload(entry))).collect();
            for record in node.read(&here).iter().filter(|entry| entry.header.kind == Kind::LOG) {
                prop_assert_eq!(there.get(&record.header.seq), Some(&payload(record)));
            }
        }
    }
}
