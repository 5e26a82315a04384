use proptest::prelude::*;

use super::*;

fn own(topic: &str) -> Result<Destination, SubjectError> {
    Ok(Destination::Topic { target: Target::Own, topic: topic.into() })
}

fn down(node: &str, topic: &str) -> Result<Destination, SubjectError> {
    Ok(Destination::Topic { target: Target::Node(node.into()), topic: topic.into() })
}

fn filter(text: &str) -> Filter {
    Filter::parse(text).unwrap()
}

#[test]
fn on_a_node_subjects_are_its_own_topics() {
    assert_eq!(destination(Side::Node, "a.b"), own("a/b"));
    assert_eq!(destination(Side::Node, "_INBOX.x.y"), own("_INBOX/x/y"));
    assert_eq!(destination(Side::Node, "a.%.b%2Ec"), own("a//b.c"));
    let interest = interest(Side::Node, "a.*.>").unwrap();
    assert_eq!(interest, Interest { own: Some(filter("a/+/+/#")), up: None });
}

#[test]
fn on_a_hub_down_is_for_publishing_and_up_for_subscribing() {
    assert_eq!(destination(Side::Hub, "octobus.down.edge-1.valves.3"), down("edge-1", "valves/3"));
    assert_eq!(destination(Side::Hub, "octobus.down.plant%2E1.a"), down("plant.1", "a"));
    assert_eq!(destination(Side::Hub, "octobus.up.edge-1.a"), Err(SubjectError::Forbidden));
    assert_eq!(interest(Side::Hub, "octobus.down.edge-1.a"), Err(SubjectError::Forbidden));
    assert_eq!(interest(Side::Hub, "octobus.down.>"), Err(SubjectError::Forbidden));
    let node = OriginFilter::Node("plant.1".into());
    let up = interest(Side::Hub, "octobus.up.plant%2E1.a.*").unwrap();
    assert_eq!(up, Interest { own: None, up: Some((node, filter("a/+"))) });
}

#[test]
fn a_hubs_wildcards_see_every_space_that_they_match() {
    let everything = Some((OriginFilter::AnyNode, filter("+/#")));
    for (pattern, own) in
        [("octobus.up.>", None), ("octobus.>", None), (">", Some("+/#")), ("*.>", Some("+/+/#"))]
    {
        let expected = Interest { own: own.map(filter), up: everything.clone() };
        assert_eq!(interest(Side::Hub, pattern), Ok(expected), "{pattern}");
    }
    let any = interest(Side::Hub, "octobus.up.*.alarms.>").unwrap();
    assert_eq!(any.up, Some((OriginFilter::AnyNode, filter("alarms/+/#"))));
    let star = interest(Side::Hub, "*.*.n.a").unwrap();
    assert_eq!(star.up, Some((OriginFilter::Node("n".into()), filter("a"))));
    assert_eq!(star.own, Some(filter("+/+/n/a")));
    assert_eq!(interest(Side::Hub, "octobus.up.n").unwrap(), Interest::default());
}

#[test]
fn the_rest_of_octobus_is_nobodys() {
    for subject in ["octobus", "octobus.x", "octobus.downlog.n", "octobus.up.n.a"] {
        assert_eq!(destination(Side::Hub, subject), Err(SubjectError::Forbidden), "{subject}");
        assert_eq!(destination(Side::Node, subject), Err(SubjectError::Forbidden), "{subject}");
        assert_eq!(interest(Side::Node, subject), Err(SubjectError::Forbidden), "{subject}");
        assert_eq!(reply(subject), Err(SubjectError::Forbidden), "{subject}");
    }
    for subject in ["octobus", "octobus.x", "octobus.log.>"] {
        assert_eq!(interest(Side::Hub, subject), Err(SubjectError::Forbidden), "{subject}");
    }
    assert_eq!(destination(Side::Node, "octobus.down.n.a"), Err(SubjectError::Forbidden));
    assert_eq!(destination(Side::Node, "octobusx.a"), own("octobusx/a"));
}

#[test]
fn system_subjects_exist_and_hold_nothing() {
    for side in [Side::Node, Side::Hub] {
        assert_eq!(destination(side, "$JS.API.INFO"), Ok(Destination::System));
        assert_eq!(interest(side, "$SYS.>"), Ok(Interest::default()));
        assert_eq!(interest(side, "$SYS..x"), Err(SubjectError::Invalid));
    }
    assert_eq!(destination(Side::Node, "$hw.x"), own("$hw/x"));
}

#[test]
fn what_is_no_spelling_of_a_topic_is_invalid() {
    for subject in ["", ".", "a.", ".a", "a..b", "a.*", ">", "a.+", "a.#", "a%2eb", "a%41", "a.b\u{7f}"] {
        assert_eq!(destination(Side::Node, subject), Err(SubjectError::Invalid), "{subject}");
    }
    for pattern in ["", "a.", "a..b", ">.a", "a.>.b", "a%2eb", "a.+"] {
        assert_eq!(interest(Side::Hub, pattern), Err(SubjectError::Invalid), "{pattern}");
    }
    for subject in [
        "octobus.down.n",
        "octobus.down.*.a",
        "octobus.down.Bad_Name.a",
        "octobus.down.n.",
        "octobus.down..a",
    ] {
        assert_eq!(destination(Side::Hub, subject), Err(SubjectError::Invalid), "{subject}");
    }
    for pattern in ["octobus.up.n.a..b", "octobus.up.Bad_Name.a", "octobus.up.>.a", "octobus..>"] {
        assert!(interest(Side::Hub, pattern).is_err(), "{pattern}");
    }
}

#[test]
fn permissions_call_a_nodes_topic_by_node_and_topic() {
    let destination = destination(Side::Hub, "octobus.down.edge-1.valves.3").unwrap();
    assert_eq!(destination.permission().as_deref(), Some("node/edge-1/valves/3"));
    let names: Vec<_> = interest(Side::Hub, "octobus.up.*.a").unwrap().permissions().collect();
    assert_eq!(names, [filter("node/+/a")]);
    let names: Vec<_> = interest(Side::Hub, ">").unwrap().permissions().collect();
    assert_eq!(names, [filter("+/#"), filter("node/+/+/#")]);
}

#[test]
fn a_pattern_too_long_for_a_permission_needs_a_broader_one() {
    let deep = vec!["x"; topic::TOPIC_LEVELS_MAX].join(".");
    let names: Vec<_> = interest(Side::Hub, &format!("octobus.up.n.{deep}")).unwrap().permissions().collect();
    assert_eq!(names, [filter("node/n/#")]);
}

fn any_topic() -> impl Strategy<Value = String> {
    let level = prop_oneof![Just(String::new()), "[a-z%.*> ~é\u{1}]{1,12}".prop_map(|level| level)];
    prop::collection::vec(level, 1..=topic::TOPIC_LEVELS_MAX)
        .prop_map(|levels| levels.join("/"))
        .prop_filter("a topic", |text| topic::validate_topic(text).is_ok())
}

proptest! {
    #[test]
    fn every_topic_has_one_subject_and_comes_back(text in any_topic()) {
        let mut subject = String::new();
        name::topic_to_subject(&text, &mut subject);
        prop_assert_eq!(destination(Side::Node, &subject), own(&text));
        prop_assert_eq!(destination(Side::Hub, &format!("octobus.down.n.{subject}")), down("n", &text));
        let interest = interest(Side::Hub, &format!("octobus.up.n.{subject}")).unwrap();
        let (_, filter) = interest.up.unwrap();
        prop_assert!(filter.matches(&text, true));
    }

    #[test]
    fn no_text_is_misunderstood_with_a_panic(text in "[a-z.*>%$ 0-9A-F]{0,40}|\\PC{0,40}") {
        for side in [Side::Node, Side::Hub] {
            for prefix in ["", "octobus.", "octobus.up.", "octobus.down.n.", "$JS."] {
                let subject = format!("{prefix}{text}");
                let names = interest(side, &subject).map_or(0, |interest| interest.permissions().count());
                prop_assert!(names <= 2);
                let own = destination(side, &subject).is_ok_and(|to| matches!(&to, Destination::Topic { target: Target::Own, .. }));
                prop_assert_eq!(own, reply(&subject).is_ok(), "a reply goes where a publish may go");
            }
        }
    }
}

#[test]
fn the_longest_topics_fit_a_control_line() {
    let longest = "%".repeat(topic::TOPIC_BYTES_MAX);
    let node = "a".repeat(60) + "." + &"b".repeat(60) + "." + &"c".repeat(60) + "." + &"d".repeat(60);
    let mut subject = String::new();
    name::node_subject(name::DOWN_PREFIX, &node, &longest, &mut subject);
    assert!(subject.len() < 3_700);
    assert_eq!(destination(Side::Hub, &subject), down(&node, &longest));
    let empty = "/".repeat(topic::TOPIC_LEVELS_MAX - 1);
    let mut subject = String::new();
    name::topic_to_subject(&empty, &mut subject);
    assert_eq!(destination(Side::Node, &subject), own(&empty));
}
