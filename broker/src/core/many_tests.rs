//! What a hub holds and does for each of very many nodes.

use std::time::Duration;

use bytes::Bytes;

use super::{
    event::{Command, Event, Expect, LinkOpen, Peer, Response, Role, SessionId},
    link::Link,
    log::Log,
    space::Space,
    test_host::{Host, Pair, op},
};

/// Of each space of the node, at its hub.
fn spaces<T>(pair: &Pair, what: impl Fn(&Space) -> T) -> Vec<T> {
    let core = &pair.hub.core;
    core.spaces_of(&"n1".into()).map(|index| what(&core.spaces[index])).collect()
}

/// A hub has one of these, or several, for each of 100 000 nodes: a field here is 100 000 fields.
#[test]
fn what_a_hub_has_for_each_node_stays_small() {
    for (what, size, most) in
        [("link", size_of::<Link>(), 680), ("space", size_of::<Space>(), 320), ("log", size_of::<Log>(), 720)]
    {
        assert!(size <= most, "a {what} has {size} bytes, more than {most}");
    }
}

#[test]
fn a_space_that_a_node_never_wrote_to_costs_its_hub_nothing_and_is_complete_once_it_did() {
    let mut pair = Pair::new();
    pair.link_up();
    pair.quiet();
    assert_eq!(
        spaces(&pair, |space| space.name.to_string()),
        Vec::<String>::new(),
        "nothing was said of any"
    );

    let written =
        pair.node.write(vec![op("twin", "plant/press", Some(Bytes::from_static(b"{}")), Expect::Any)]);
    assert!(matches!(written, Response::Written(_)));
    pair.quiet();
    assert_eq!(spaces(&pair, |space| space.name.to_string()), ["twin"]);
    assert_eq!(pair.hub.keys("n1", "twin", ""), ["plant/press"]);
    let complete = spaces(&pair, |space| space.is_complete(""));
    assert_eq!(complete, [true], "its barrier followed what was written");
}

#[test]
fn a_hub_that_restarts_without_a_node_knows_its_spaces_and_positions_again() {
    let mut pair = Pair::new();
    for key in ["a", "b", "c"] {
        pair.node.write(vec![op("status", key, Some(Bytes::from_static(b"1")), Expect::Any)]);
    }
    pair.link_up();
    pair.quiet();
    pair.link_down();
    let before = spaces(&pair, |space| space.at);
    pair.hub.restart();
    let after = spaces(&pair, |space| space.at);
    assert_eq!(before, after);
    pair.hub.persist();
    let groups = pair.hub.store.recover().last_lsn;
    pair.link_up();
    pair.quiet();
    assert_eq!(
        pair.hub.store.recover().last_lsn,
        groups,
        "a link that comes back with nothing new writes nothing"
    );
}

/// Links of nodes that are up as far as a hub can tell without them.
fn with_links(links: u64) -> Host {
    let mut hub = Host::hub(None);
    for nth in 1..=links {
        let peer = Peer { name: format!("n{nth}").as_str().into(), role: Role::Node, generation: 1 };
        hub.apply(Event::LinkOpened(LinkOpen { session: SessionId(nth), peer, dialler: false }));
    }
    hub.owed.clear();
    hub
}

/// The outputs of a link, so far.
fn told(hub: &Host, links: u64) -> Vec<u64> {
    (1..=links).filter(|nth| hub.owed.contains_key(&SessionId(*nth))).collect()
}

const WITHIN: Duration = Duration::from_secs(2);

#[test]
fn a_drain_tells_links_in_waves_and_is_answered_when_the_last_has_gone() {
    const LINKS: u64 = 2_000;
    let mut hub = with_links(LINKS);
    assert!(hub.ask(Command::Drain { within: WITHIN }).is_none(), "nobody has gone yet");
    let first = told(&hub, LINKS).len();
    assert!((64..=200).contains(&first), "{first} in the first wave of a second's");
    assert!(!hub.core.is_drained());
    let mut waves = 1;
    while told(&hub, LINKS).len() < LINKS as usize {
        hub.mono += Duration::from_millis(50);
        hub.tick();
        waves += 1;
        assert!(hub.mono <= WITHIN / 2 + Duration::from_millis(50), "all are told in half of the time");
    }
    assert!(waves >= 10, "{waves} waves");
    for nth in 1..=LINKS {
        assert!(hub.responses.is_empty());
        hub.apply(Event::LinkClosed { session: SessionId(nth) });
    }
    hub.persist();
    let answer = hub.responses.remove(&hub.commands);
    assert!(matches!(answer, Some(Response::Drained { clean: LINKS, forced: 0 })), "{answer:?}");
    assert!(hub.core.is_drained());
}

#[test]
fn links_that_do_not_go_are_closed_and_counted_when_the_time_is_over() {
    let mut hub = with_links(3);
    assert!(hub.ask(Command::Drain { within: WITHIN }).is_none());
    hub.apply(Event::LinkClosed { session: SessionId(2) });
    hub.mono += WITHIN;
    hub.tick();
    hub.persist();
    let answer = hub.responses.remove(&hub.commands);
    assert!(matches!(answer, Some(Response::Drained { clean: 1, forced: 2 })), "{answer:?}");
    assert!(hub.core.is_drained());
    let stats = match hub.ask(Command::Stats) {
        Some(Response::Stats(stats)) => stats,
        other => panic!("statistics, not {other:?}"),
    };
    assert_eq!((stats.drained_clean, stats.drained_forced), (1, 2));
}

#[test]
fn a_node_is_told_to_go_behind_the_acknowledgement_of_what_it_brought() {
    let mut pair = Pair::new();
    pair.link_up();
    pair.quiet();
    pair.node.write(vec![op("status", "key", Some(Bytes::from_static(b"1")), Expect::Any)]);
    pair.carry(usize::MAX);
    // The hub has it in memory, and is asked to end before it is on its disk.
    assert!(pair.hub.ask(Command::Drain { within: WITHIN }).is_none());
    assert_eq!(pair.hub.told_to_go(), 0, "not before what came is durable");
    pair.hub.persist();
    assert_eq!(pair.hub.told_to_go(), 1);
    assert_eq!(pair.hub.last_controls(), ["ack", "drain"]);
}
