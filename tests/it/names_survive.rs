//! Pins that a name comes through unchanged: topics at every limit, from MQTT to a NATS subject and back,
//! with the escape rules written a second time here; and a real nats-server takes the same subjects.

use std::{fmt::Write as _, time::Duration};

use octobus_tests::{
    mqtt, nats,
    octobus::{Octobus, Role, folder},
    process::Process,
    stock::{Place, nats_server, python},
};

const SOON: Duration = Duration::from_secs(20);

#[test]
fn topics_at_the_limits_make_the_round_trip() {
    let folder = folder();
    let dev = Octobus::new(Role::Dev, &folder.path().join("data")).start();
    let mut device = mqtt::Client::connect(dev.endpoint("mqtt"), &mqtt::Options::new("device")).unwrap();
    let mut listener = mqtt::Client::connect(dev.endpoint("mqtt"), &mqtt::Options::new("listener")).unwrap();
    listener.subscribe("#", 1).unwrap();
    let mut hub = nats::Client::connect(dev.endpoint("nats")).unwrap();
    hub.subscribe("octobus.up.edge-1.>").unwrap();

    for (n, topic) in topics().iter().enumerate() {
        let shown = &topic[..topic.floor_char_boundary(60)];
        let (up, down) = (format!("up {n}"), format!("down {n}"));
        device
            .publish_acked(topic, up.as_bytes(), false)
            .unwrap_or_else(|e| panic!("{shown:?} refused: {e}"));
        let arrived = hub.next(SOON).unwrap_or_else(|error| panic!("{shown:?} at the hub: {error}"));
        assert_eq!(arrived.subject, format!("octobus.up.edge-1.{}", subject(topic)), "{shown:?}");
        assert_eq!(arrived.payload, up.as_bytes());

        let back = arrived.subject.replacen("octobus.up.", "octobus.down.", 1);
        hub.publish(&back, down.as_bytes()).unwrap();
        hub.flush().unwrap_or_else(|error| panic!("{shown:?} refused on the way down: {error}"));
        let wanted = [up, down];
        for payload in &wanted {
            match listener.next_publish(SOON).unwrap_or_else(|e| panic!("{shown:?} {payload}: {e}")) {
                mqtt::Packet::Publish { topic: got, payload: bytes, .. } => {
                    assert_eq!((got.as_str(), bytes.as_slice()), (topic.as_str(), payload.as_bytes()));
                }
                other => panic!("{other:?}"),
            }
        }
    }
}

#[test]
fn topics_beyond_the_limits_are_refused_and_reach_nobody() {
    let folder = folder();
    let dev = Octobus::new(Role::Dev, &folder.path().join("data")).start();
    let mut hub = nats::Client::connect(dev.endpoint("nats")).unwrap();
    hub.subscribe("octobus.up.>").unwrap();
    let beyond = [
        "x".repeat(1025),
        vec!["x"; 33].join("/"),
        "a/\0/b".to_owned(),
        "a/+/b".to_owned(),
        "a/#".to_owned(),
    ];
    for topic in &beyond {
        let mut device = mqtt::Client::connect(dev.endpoint("mqtt"), &mqtt::Options::new("device")).unwrap();
        device.write(&mqtt::publish(topic, b"x", 0, 0, false, false)).unwrap();
        assert!(device.is_closed_within(SOON), "a topic of {} bytes was taken", topic.len());
    }
    let mut device = mqtt::Client::connect(dev.endpoint("mqtt"), &mqtt::Options::new("device")).unwrap();
    device.publish_acked("good", b"x", false).unwrap();
    assert_eq!(hub.next(SOON).unwrap().subject, "octobus.up.edge-1.good");
}

#[test]
fn a_real_nats_server_takes_the_same_subjects() {
    let (_server, address) = nats_server();
    let subjects: Vec<String> =
        topics().iter().map(|topic| format!("octobus.up.edge-1.{}", subject(topic))).collect();
    let mut command = python(Place::Here, "nats_echo_subjects.py");
    command.arg(format!("nats://{address}"));
    let mut echo =
        Process::spawn_with_input("nats_echo_subjects.py", &mut command, subjects.join("\n").as_bytes());
    assert!(echo.wait(Duration::from_secs(60)).success(), "{}", echo.output());
    assert_eq!(echo.stdout(), subjects);
}

fn topics() -> Vec<String> {
    let longest_level = "x".repeat(1024);
    let most_escaped = "%".repeat(1024);
    let most_levels = vec!["abc"; 32].join("/");
    let longest_and_most = format!("{}/{}", vec!["é"; 31].join("/"), "z".repeat(1024 - 31 * 3));
    let only_empty_levels = "/".repeat(31);
    let mut topics: Vec<String> = [
        "a",
        "a/b/c",
        "/a",
        "a/",
        "/",
        "a//b",
        "//",
        "%",
        "%/%",
        "%25",
        "a%2Fb",
        ".",
        "a.b/c.d",
        "..",
        "a b",
        " ",
        "*",
        "a/*/b",
        ">",
        "a/>",
        "température/küche",
        "温度/部屋",
        "🌡/🔥",
        "~!@&()=;:'\"<,?|\\`^{}[]-_",
        "=",
        "Temp",
        "temp",
        "up",
        "_INBOXES/x",
        "octobuses",
    ]
    .map(str::to_owned)
    .into();
    topics.extend([longest_level, most_escaped, most_levels, longest_and_most, only_empty_levels]);
    topics
}

/// The rule of the formats, once more: every byte that is `%`, `.`, `*`, `>`, up to 0x20 or 0x7f becomes
/// `%XX`; an empty level is a lone `%`.
fn subject(topic: &str) -> String {
    let level = |level: &str| {
        if level.is_empty() {
            return "%".to_owned();
        }
        level.chars().fold(String::new(), |mut token, c| {
            if matches!(c, '%' | '.' | '*' | '>' | '\0'..=' ' | '\x7f') {
                write!(token, "%{:02X}", u32::from(c)).expect("writing to a String cannot fail");
            } else {
                token.push(c);
            }
            token
        })
    };
    topic.split('/').map(level).collect::<Vec<_>>().join(".")
}
