//! Rules of a tier's replica: when a node is adopted, what it is told, when it is let go.

use std::time::Duration;

use bytes::Bytes;
use codec::{Class, Flags, Kind, Record, RecordHeader, frame::FrameParts, proto};

use super::{
    Config,
    event::{
        Command, Event, Intent, Publish, Response, Seen, SessionId, Target,
        tier::{AdoptedLog, AdoptedSpace, Adoption, Ask, DownLog, Mirrored, News, come_again},
    },
    test_host::{Host, Pair},
};

const CLIENT: SessionId = SessionId(1);

/// A replica whose mirror of `fleet` is whole and empty, and a node with this many messages.
fn tier(messages: usize) -> Pair {
    let mut pair = Pair::with(Host::new(Config::replica("hub-1", "tier", [9; 16], 12)));
    pair.hub.mirror(1, &[], Some(1));
    pair.node.open(CLIENT.0);
    pair.node.publish(messages);
    pair
}

impl Host {
    fn news(&mut self, news: News) {
        self.apply(Event::Tier(news));
    }

    fn mirror(&mut self, incarnation: u64, entries: &[(&str, u64, Option<Bytes>)], complete: Option<u64>) {
        let records = entries.iter().map(|(key, revision, value)| {
            let kind = if value.is_some() { Kind::PUT } else { Kind::TOMBSTONE };
            let payload = value.clone().unwrap_or_default();
            record(kind, (incarnation, *revision), key, &payload)
        });
        let (space, records) = ("fleet".into(), records.collect());
        self.news(News::Mirrored(Mirrored { space, incarnation, records, complete }));
    }

    fn publish(&mut self, messages: usize) {
        let frame = FrameParts { topic: "a/b", payload: b"m", ..FrameParts::default() }.encode();
        let message = Publish {
            target: Target::Own,
            frame,
            qos: 1,
            packet_id: 0,
            dup: false,
            retain: false,
            reply: None,
        };
        self.apply(Event::Published { session: CLIENT, messages: vec![message; messages] });
        self.persist();
    }

    fn asked(&mut self) -> (SessionId, super::event::tier::Adopt) {
        match self.asks.pop_front() {
            Some(Ask::Adopt(adopt)) => (adopt.session, *adopt),
            other => panic!("an adoption should be asked for, not {other:?}"),
        }
    }

    fn adopt(&mut self, adoption: Adoption) {
        let (session, _) = self.asked();
        self.news(News::Adopted { session, outcome: Ok(Box::new(adoption)) });
    }

    /// Seqs of Log records that were written, and forgets them.
    fn seqs(&mut self) -> Vec<u64> {
        let written = std::mem::take(&mut self.written);
        written
            .iter()
            .filter(|record| record.header.kind == Kind::LOG)
            .map(|record| record.header.seq)
            .collect()
    }

    fn epoch(&self) -> u64 {
        self.core.logs.values().next().expect("a Log").epoch()
    }

    fn unacknowledged(&mut self) -> u64 {
        match self.run(Command::Stats) {
            Response::Stats(stats) => stats.log_unacknowledged,
            other => panic!("stats, not {other:?}"),
        }
    }
}

fn record(kind: Kind, pair: (u64, u64), topic: &str, payload: &[u8]) -> Record {
    let header = RecordHeader {
        kind,
        class: Class::State as u8,
        flags: Flags::default(),
        source: 0,
        epoch: pair.0,
        seq: pair.1,
        aux: 0,
    };
    Record { header, body: FrameParts { topic, payload, ..FrameParts::default() }.encode() }
}

fn log(epoch: u64, mark: u64) -> AdoptedLog {
    AdoptedLog { stream: "default".into(), class: Class::Event, epoch, from: 1, mark, crc: 0 }
}

fn want(keys: &[&str]) -> Option<Bytes> {
    let keys = keys.iter().map(|key| (*key).to_owned()).collect();
    Some(codec::encode(&proto::Want { keys }))
}

#[test]
fn a_node_is_welcome_only_once_it_is_adopted_and_is_asked_for_by_name() {
    let mut pair = tier(3);
    pair.link_up();
    pair.quiet();
    assert!(pair.hub.core.link_of("n1").is_none(), "it was welcome before the tier said whose it is");
    let (session, adopt) = pair.hub.asked();
    assert_eq!((&*adopt.node, adopt.generation, adopt.instance), ("n1", 1, [1; 16]));
    assert_eq!(
        adopt.logs.iter().map(|log| (&*log.stream, log.first, log.next)).collect::<Vec<_>>(),
        [("default", 1, 4)]
    );
    pair.hub.news(News::Adopted { session, outcome: Ok(Box::default()) });
    pair.quiet();
    assert!(pair.hub.core.link_of("n1").is_some());
    assert_eq!(pair.hub.seqs(), [1, 2, 3]);
    assert_eq!(pair.node.unacknowledged(), 0);
}

#[test]
fn an_adopted_node_goes_on_where_the_tier_stands() {
    let mut pair = tier(5);
    let epoch = pair.node.epoch();
    pair.link_up();
    pair.quiet();
    pair.hub.adopt(Adoption { logs: vec![log(epoch, 2)], ..Adoption::default() });
    pair.quiet();
    assert_eq!(pair.hub.seqs(), [3, 4, 5]);
}

#[test]
fn a_tier_that_lost_its_tail_gets_it_again_under_the_same_epoch() {
    let mut pair = tier(5);
    pair.link_up();
    pair.quiet();
    pair.hub.adopt(Adoption::default());
    pair.quiet();
    assert_eq!((pair.hub.seqs(), pair.node.unacknowledged()), (vec![1, 2, 3, 4, 5], 0));
    let epoch = pair.node.epoch();
    pair.link_up();
    pair.quiet();
    pair.hub.asks.retain(|ask| matches!(ask, Ask::Adopt(_)));
    pair.hub.adopt(Adoption { logs: vec![log(epoch, 2)], ..Adoption::default() });
    pair.quiet();
    assert_eq!(pair.hub.seqs(), [3, 4, 5]);
    assert_eq!(pair.node.epoch(), epoch);
}

#[test]
fn a_space_goes_on_where_the_tier_stands_though_no_entry_is_held() {
    let mut pair = tier(0);
    pair.link_up();
    pair.quiet();
    pair.hub.adopt(Adoption::default());
    pair.node.retain("a", "1");
    pair.node.retain("b", "1");
    pair.quiet();
    let at = |host: &Host| {
        host.core
            .spaces
            .iter()
            .find(|space| &*space.name == "retained")
            .map(|space| (space.at, space.lineage.run()))
    };
    let ((incarnation, revision), run) = at(&pair.node).expect("it has one");
    assert_eq!(at(&pair.hub), Some(((incarnation, revision), run)));
    let held = pair.hub.core.spaces.iter().map(|space| space.size().2).sum::<usize>();
    assert_eq!(held, 0, "a replica holds what is durable elsewhere");

    pair.link_up();
    pair.node.retain("b", "2");
    pair.quiet();
    pair.hub.asks.retain(|ask| matches!(ask, Ask::Adopt(_)));
    pair.hub.written.clear();
    let space = AdoptedSpace { space: "retained".into(), incarnation, revision, run, listed: incarnation };
    pair.hub.adopt(Adoption { spaces: vec![space], ..Adoption::default() });
    pair.quiet();
    let puts: Vec<u64> = pair
        .hub
        .written
        .iter()
        .filter(|record| record.header.kind == Kind::PUT)
        .map(|record| record.header.seq)
        .collect();
    assert_eq!(puts, [revision + 1]);
    let puts = pair.hub.written.iter().find(|record| record.header.kind == Kind::PUT);
    let source = puts.expect("just seen").header.source;
    let of_space = pair.hub.written.iter().filter(|record| record.header.source == source);
    let barriers = of_space.filter(|record| record.header.kind == Kind::BARRIER).count();
    assert_eq!(barriers, 0, "a barrier of an incarnation that is known is nothing to sweep for");
}

impl Host {
    fn retain(&mut self, topic: &str, payload: &str) {
        let frame = FrameParts { topic, payload: payload.as_bytes(), ..FrameParts::default() }.encode();
        let message = Publish {
            target: Target::Own,
            frame,
            qos: 0,
            packet_id: 0,
            dup: false,
            retain: true,
            reply: None,
        };
        self.apply(Event::Published { session: CLIENT, messages: vec![message] });
        self.persist();
    }
}

#[test]
fn a_node_is_let_go_once_nothing_of_it_waits_and_leaves_nothing_behind() {
    let mut pair = tier(3);
    pair.link_up();
    pair.quiet();
    pair.hub.adopt(Adoption { down: Some(DownLog { epoch: 7, last: 4 }), ..Adoption::default() });
    pair.hub.persist();
    // Records arrive, and the store has not written them when the link ends.
    for _ in 0..20 {
        pair.carry(1);
    }
    pair.link_down();
    assert!(pair.hub.asks.is_empty(), "let go while records of it wait: {:?}", pair.hub.asks);
    pair.hub.persist();
    assert!(matches!(&pair.hub.asks.pop_front(), Some(Ask::Release { node }) if &**node == "n1"));
    let core = &pair.hub.core;
    assert!(core.logs.is_empty() && core.histories.is_empty() && core.log_names.is_empty());
    assert_eq!(core.space_names.keys().filter(|(origin, _)| &**origin == "n1").count(), 0);
    assert!(core.claims.is_empty() && core.adopted.is_empty());
    let places = core.spaces.len();
    pair.link_up();
    pair.quiet();
    pair.hub.adopt(Adoption::default());
    pair.quiet();
    assert_eq!(pair.hub.core.spaces.len(), places, "places of spaces are not used again");
}

#[test]
fn a_refusal_of_the_tier_reaches_the_node() {
    let mut pair = tier(1);
    pair.link_up();
    pair.quiet();
    let (session, _) = pair.hub.asked();
    pair.hub.news(News::Adopted { session, outcome: Err(come_again("another replica holds it", 300)) });
    pair.quiet();
    let conditions = pair.node.conditions();
    assert!(conditions.iter().any(|held| held.message.contains("another replica")), "{conditions:?}");
}

#[test]
fn what_a_fenced_replica_had_not_written_is_never_acknowledged() {
    let mut pair = tier(0);
    pair.link_up();
    pair.quiet();
    pair.hub.adopt(Adoption::default());
    pair.quiet();
    pair.node.publish(3);
    pair.carry(usize::MAX);
    pair.hub.news(News::Fenced { node: "n1".into(), refusal: come_again("another replica took it", 100) });
    pair.hub.persist(); // an answer that comes late
    pair.quiet();
    assert_eq!(pair.node.unacknowledged(), 3);
    pair.link_up();
    pair.quiet();
    pair.hub.asks.retain(|ask| matches!(ask, Ask::Adopt(_)));
    pair.hub.adopt(Adoption::default());
    pair.quiet();
    assert_eq!(pair.node.unacknowledged(), 0);
}

#[test]
fn an_adoption_that_comes_after_its_link_ended_is_nobodys() {
    let mut pair = tier(1);
    pair.link_up();
    pair.quiet();
    let (session, _) = pair.hub.asked();
    pair.link_down();
    assert!(matches!(pair.hub.asks.pop_front(), Some(Ask::Release { .. })));
    pair.hub.news(News::Adopted {
        session,
        outcome: Ok(Box::new(Adoption { logs: vec![log(5, 5)], ..Adoption::default() })),
    });
    assert!(pair.hub.core.logs.is_empty());
}

#[test]
fn the_newest_hello_of_a_node_is_the_one_that_is_adopted() {
    let mut pair = tier(2);
    pair.link_up();
    pair.quiet();
    let (older, _) = pair.hub.asked();
    pair.link_up();
    pair.quiet();
    pair.hub.asks.retain(|ask| matches!(ask, Ask::Adopt(_)));
    pair.hub.news(News::Adopted {
        session: older,
        outcome: Ok(Box::new(Adoption { logs: vec![log(5, 5)], ..Adoption::default() })),
    });
    pair.hub.adopt(Adoption::default());
    pair.quiet();
    assert_eq!(pair.hub.seqs(), [1, 2]);
}

#[test]
fn a_node_gets_its_part_of_the_mirror_and_nothing_goes_with_a_bucket() {
    let mut pair = tier(0);
    pair.hub.mirror(
        1,
        &[
            ("want/n1", 2, want(&["obj/a"])),
            ("obj/a", 3, Some("1".into())),
            ("obj/b", 4, Some("1".into())),
            ("barrier", 5, Some("".into())),
        ],
        Some(5),
    );
    pair.link_up();
    pair.quiet();
    pair.hub.adopt(Adoption::default());
    pair.quiet();
    assert_eq!(pair.node.keys("", "fleet", "obj/"), ["obj/a"]);
    pair.hub.mirror(
        1,
        &[("obj/b", 6, None), ("obj/c", 7, Some("1".into())), ("want/n1", 8, want(&["obj/a", "obj/c"]))],
        Some(8),
    );
    pair.quiet();
    assert_eq!(pair.node.keys("", "fleet", "obj/"), ["obj/a", "obj/c"]);
    // The bucket was deleted and made again: what is not there yet is not gone.
    pair.hub.mirror(2, &[], Some(1));
    pair.hub.mirror(2, &[("want/n1", 2, want(&["obj/a", "obj/c"])), ("obj/c", 3, Some("2".into()))], Some(3));
    pair.quiet();
    assert_eq!(pair.node.keys("", "fleet", "obj/"), ["obj/a", "obj/c"]);
    pair.hub.mirror(2, &[("obj/a", 4, Some("2".into())), ("barrier", 5, Some("".into()))], Some(5));
    pair.quiet();
    assert_eq!(pair.node.keys("", "fleet", "obj/"), ["obj/a", "obj/c"]);
    pair.hub.mirror(2, &[("obj/a", 6, None)], Some(6));
    pair.quiet();
    assert_eq!(pair.node.keys("", "fleet", "obj/"), ["obj/c"]);
}

#[test]
fn what_was_purged_before_a_replica_began_is_told_by_name() {
    let mut pair = tier(0);
    pair.hub.mirror(
        1,
        &[("want/n1", 2, want(&["obj/a"])), ("obj/a", 3, Some("1".into())), ("barrier", 4, Some("".into()))],
        Some(4),
    );
    pair.link_up();
    pair.quiet();
    pair.hub.adopt(Adoption::default());
    pair.quiet();
    assert_eq!(pair.node.keys("", "fleet", "obj/"), ["obj/a"]);
    // Another replica, which never saw the tombstone of revision 5.
    let node = std::mem::replace(&mut pair.node, Host::hub(None));
    let mut pair = Pair::with(Host::new(Config::replica("hub-2", "tier", [8; 16], 13)));
    pair.node = node;
    pair.hub.mirror(1, &[("want/n1", 2, want(&["obj/a"])), ("barrier", 4, Some("".into()))], Some(6));
    pair.link_up();
    pair.quiet();
    pair.hub.adopt(Adoption::default());
    pair.quiet();
    assert_eq!(pair.node.keys("", "fleet", "obj/"), [""; 0]);
}

#[test]
fn a_node_waits_for_a_mirror_that_is_behind_it_but_not_for_ever() {
    let mut pair = tier(0);
    pair.hub.mirror(1, &[("barrier", 9, Some("".into()))], Some(9));
    pair.link_up();
    pair.quiet();
    pair.hub.adopt(Adoption::default());
    pair.quiet();
    let node = std::mem::replace(&mut pair.node, Host::hub(None));
    let mut pair = Pair::with(Host::new(Config::replica("hub-2", "tier", [8; 16], 13)));
    pair.node = node;
    pair.hub.mirror(1, &[], Some(8));
    pair.link_up();
    pair.quiet();
    pair.hub.adopt(Adoption::default());
    pair.quiet();
    assert!(pair.hub.core.link_of("n1").is_none());
    pair.hub.mirror(1, &[], Some(9));
    pair.quiet();
    assert!(pair.hub.core.link_of("n1").is_some());

    let node = std::mem::replace(&mut pair.node, Host::hub(None));
    let mut pair = Pair::with(Host::new(Config::replica("hub-3", "tier", [7; 16], 14)));
    pair.node = node;
    pair.hub.mirror(1, &[], Some(8));
    pair.link_up();
    pair.quiet();
    pair.hub.adopt(Adoption::default());
    pair.hub.mono += Duration::from_secs(6);
    pair.quiet();
    let conditions = pair.node.conditions();
    assert!(conditions.iter().any(|held| held.message.contains("behind")), "{conditions:?}");
}

#[test]
fn holes_in_what_goes_down_are_not_gaps() {
    let mut pair = tier(0);
    pair.hub.shelf =
        [3, 4, 9].map(|seq| record(Kind::LOG, (7, seq), "valves/3", format!("{seq}").as_bytes())).into();
    pair.link_up();
    pair.quiet();
    pair.hub.adopt(Adoption { down: Some(DownLog { epoch: 7, last: 9 }), ..Adoption::default() });
    pair.quiet();
    let received = |host: &mut Host| {
        let written = host.core.logs.values().find(|log| log.origin.is_empty());
        written.map(|log| (log.epoch(), log.durable_next, log.kept.records()))
    };
    assert_eq!(received(&mut pair.node), Some((7, 10, 3)));
    pair.hub.shelf.push(record(Kind::LOG, (7, 20), "valves/3", b"20"));
    pair.hub.news(News::Arrived { node: "n1".into(), down: DownLog { epoch: 7, last: 20 } });
    pair.quiet();
    assert_eq!(received(&mut pair.node), Some((7, 21, 4)));
    let gaps = pair.node.core.stats.gaps.get("received").copied();
    assert_eq!(gaps, Some(1), "beside the announcement of the epoch, holes were counted as something lost");

    // By another replica, which knows no more than that there is something, and finds it expired.
    pair.hub.shelf.clear();
    pair.link_up();
    pair.quiet();
    pair.hub.asks.retain(|ask| matches!(ask, Ask::Adopt(_)));
    pair.hub.adopt(Adoption { down: Some(DownLog { epoch: 7, last: 22 }), ..Adoption::default() });
    pair.quiet();
    assert_eq!(received(&mut pair.node), Some((7, 21, 4)));
    assert_eq!(pair.hub.core.stats.drops.values().sum::<u64>(), 1, "what expired is counted");
}

#[test]
fn a_new_stream_of_what_goes_down_is_another_history() {
    let mut pair = tier(0);
    pair.hub.shelf = vec![record(Kind::LOG, (7, 40), "valves/3", b"x")];
    pair.link_up();
    pair.quiet();
    pair.hub.adopt(Adoption { down: Some(DownLog { epoch: 7, last: 40 }), ..Adoption::default() });
    pair.quiet();
    pair.hub.shelf = vec![record(Kind::LOG, (8, 2), "valves/3", b"y")];
    pair.hub.news(News::Arrived { node: "n1".into(), down: DownLog { epoch: 8, last: 2 } });
    pair.quiet();
    let down: Vec<(u64, u64)> = pair
        .node
        .core
        .logs
        .values()
        .filter(|log| log.origin.is_empty())
        .map(|log| (log.epoch(), log.durable_next))
        .collect();
    assert_eq!(down, [(7, 41), (8, 3)]);
}

#[test]
fn an_intent_to_a_tier_is_refused_where_it_is_asked() {
    let mut pair = tier(0);
    pair.link_up();
    pair.quiet();
    pair.hub.adopt(Adoption::default());
    pair.quiet();
    let intent = Intent {
        id: "i1".to_owned(),
        space: "fleet".into(),
        key: "obj/a".to_owned(),
        value: None,
        seen: Seen::Any,
    };
    match pair.node.run(Command::Intend { owner: "".into(), intent }) {
        Response::Refused(why) => assert!(why.contains("octobus put"), "{why}"),
        other => panic!("a refusal, not {other:?}"),
    }
}

#[test]
fn a_relay_forwards_for_nobody_in_a_tier() {
    let mut pair = tier(0);
    let identity = br#"{"generation":1,"key":"k","revoked":[],"forwards":["n2"]}"#;
    let records = vec![
        record(Kind::PUT, (1, 1), "identity/n1", identity),
        record(Kind::PUT, (1, 2), "identity/n2", identity),
    ];
    let sys = Mirrored { space: "sys".into(), incarnation: 1, records, complete: Some(2) };
    pair.hub.news(News::Mirrored(sys));
    pair.link_up();
    pair.quiet();
    pair.hub.adopt(Adoption::default());
    pair.quiet();
    assert!(pair.hub.core.link_of("n1").is_some());
    assert!(pair.node.core.forwarded().is_empty(), "what it would bring has no place in the tier");
}
