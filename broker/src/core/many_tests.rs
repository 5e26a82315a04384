//! What a hub holds and does for each of very many nodes.

use bytes::Bytes;

use super::{
    event::{Expect, Response},
    link::Link,
    log::Log,
    space::Space,
    test_host::{Pair, op},
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
