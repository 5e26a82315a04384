//! The wire layer as a whole: against mutation, against itself and against `rumqttd` as an independent peer.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use codec::{
    FrameView, Trace,
    frame::{FrameParts, header},
};
use proptest::prelude::*;
use rand::{Rng, SeedableRng, rngs::SmallRng};
use rumqttd::protocol::{self as peer, Packet as PeerPacket, Protocol};

use super::{
    counters::Counters,
    encode,
    gate::{self, Gate, Kind},
    packet,
    publish::{Arena, Entered, Publish},
    session::{Limits, Session},
    wire::Version,
    writer::Writer,
};
use crate::{
    core::event::{ClientAck, Delivery, Event, Output, RetainedOnSubscribe, SessionId},
    front::auth::Permissions,
};

const MAX: usize = 1 << 20;
const ENTERED: Entered = Entered { time_us: 1_000_000, trusted: true };

fn delivery(frame: Bytes, qos: u8, packet_id: u16, flags: (bool, bool)) -> Delivery {
    Delivery {
        frame,
        origin: "".into(),
        sub: 1,
        identifiers: None,
        qos,
        packet_id: if qos == 0 { 0 } else { packet_id },
        dup: flags.0 && qos > 0,
        retain: flags.1,
        position: None,
        reply: None,
        no_responders: false,
    }
}

/// All bytes of a writer.
fn written(mut writer: Writer) -> Vec<u8> {
    let mut out = std::io::Cursor::new(Vec::new());
    let mut context = std::task::Context::from_waker(std::task::Waker::noop());
    while !writer.is_idle() {
        assert!(writer.poll_write(&mut out, &mut context).is_ready());
    }
    out.into_inner()
}

fn encoded(version: Version, delivery: &Delivery) -> Vec<u8> {
    let mut writer = Writer::default();
    let len = encode::publish(&mut writer, version, delivery, ENTERED.time_us, MAX).unwrap();
    let bytes = written(writer);
    assert_eq!(bytes.len(), len);
    bytes
}

fn complete(version: Version, input: &[u8]) -> gate::Packet<'_> {
    match gate::check(input, Some(version), MAX) {
        Ok(Gate::Packet(packet)) if packet.len == input.len() => packet,
        other => panic!("{other:?}"),
    }
}

fn text() -> impl Strategy<Value = String> {
    "[a-zA-Z0-9 \u{e9}\u{4e16}./%-]{1,24}"
}

prop_compose! {
    fn message()(
        topic in "[a-z\u{e9}.%]{0,8}(/[a-zA-Z0-9 ]{0,8}){1,5}",
        payload in prop::collection::vec(any::<u8>(), 0..5000),
        content_type in prop::option::of(text()),
        correlation in prop::option::of(prop::collection::vec(any::<u8>(), 0..40)),
        response in prop::option::of("[a-z]{1,8}(/[a-z]{1,8}){0,3}"),
        format in prop::option::of(prop_oneof![Just(b"0"), Just(b"1")]),
        user in prop::collection::vec((text(), text()), 0..5),
        ttl_s in prop_oneof![Just(0), 1..u32::MAX],
        trace in prop::option::of((1..u128::MAX, 1..u64::MAX, any::<u8>())),
    ) -> (String, Vec<(String, Vec<u8>)>, Vec<u8>, u32, Option<Trace>) {
        let mapped = [
            (header::CONTENT_TYPE, content_type.map(String::into_bytes)),
            (header::MQTT_RESPONSE_TOPIC, response.map(String::into_bytes)),
            (header::MQTT_CORRELATION_DATA, correlation),
            (header::MQTT_PAYLOAD_FORMAT, format.map(|format| format.to_vec())),
        ];
        let mapped = mapped.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?)));
        let headers = mapped.chain(user.into_iter().map(|(name, value)| (name, value.into_bytes()))).collect();
        let trace = trace.map(|(trace_id, parent_id, flags)| Trace {
            trace_id: trace_id.to_be_bytes(),
            parent_id: parent_id.to_be_bytes(),
            flags,
        });
        (topic, headers, payload, ttl_s, trace)
    }
}

proptest! {
    #[test]
    fn a_publish_survives_encoding_and_decoding_in_both_versions(
        (topic, headers, payload, ttl_s, trace) in message(),
        qos in 0..3_u8,
        packet_id in 1..u16::MAX,
        flags: (bool, bool),
    ) {
        let borrowed: Vec<(&str, &[u8])> =
            headers.iter().map(|(name, value)| (name.as_str(), value.as_slice())).collect();
        for version in [Version::V4, Version::V5] {
            let mut parts = FrameParts {
                topic: &topic, time_us: ENTERED.time_us, time_trusted: true, trace, ttl_s,
                headers: &borrowed, payload: &payload,
            };
            let sent = delivery(parts.encode(), qos, packet_id, flags);
            let wire = encoded(version, &sent);
            let packet = complete(version, &wire);
            let publish = Publish::parse(version, packet.flags, packet.body).unwrap();
            prop_assert_eq!(publish.qos, sent.qos);
            prop_assert_eq!(publish.packet_id, sent.packet_id);
            prop_assert_eq!((publish.dup, publish.retain), (sent.dup, sent.retain));
            let frame = Arena::default().encode(&publish.message, ENTERED, wire.len());
            if version == Version::V4 {
                parts = FrameParts { trace: None, ttl_s: 0, headers: &[], ..parts };
            }
            prop_assert_eq!(frame, parts.encode(), "{:?}", version);
        }
    }

    #[test]
    fn rumqttd_reads_the_publish_that_this_server_writes(
        (topic, headers, payload, ttl_s, trace) in message(),
        // Of two identifiers rumqttd counts the bytes twice and leaves the last property in the payload.
        identifiers in prop::collection::vec(1..268_435_455_u32, 0..2),
    ) {
        let borrowed: Vec<(&str, &[u8])> =
            headers.iter().map(|(name, value)| (name.as_str(), value.as_slice())).collect();
        let parts = FrameParts {
            topic: &topic, time_us: ENTERED.time_us, time_trusted: true, trace, ttl_s,
            headers: &borrowed, payload: &payload,
        };
        let mut sent = delivery(parts.encode(), 1, 7, (false, true));
        let mut four = BytesMut::from(encoded(Version::V4, &sent).as_slice());
        let PeerPacket::Publish(read, None) = peer::v4::V4.read_mut(&mut four, MAX).unwrap() else { panic!() };
        prop_assert_eq!((&read.topic[..], &read.payload[..]), (topic.as_bytes(), &payload[..]));

        sent.identifiers = Some(identifiers.clone().into());
        let mut five = BytesMut::from(encoded(Version::V5, &sent).as_slice());
        let PeerPacket::Publish(read, properties) = peer::v5::V5.read_mut(&mut five, MAX).unwrap() else { panic!() };
        prop_assert_eq!((&read.topic[..], &read.payload[..]), (topic.as_bytes(), &payload[..]));
        let view = FrameView::parse(&sent.frame).unwrap();
        let Some(properties) = properties else {
            prop_assert!(headers.is_empty() && trace.is_none() && ttl_s == 0 && identifiers.is_empty());
            return Ok(());
        };
        prop_assert_eq!(properties.message_expiry_interval.unwrap_or(0), ttl_s);
        prop_assert_eq!(properties.content_type.as_deref().map(str::as_bytes), view.header(header::CONTENT_TYPE));
        prop_assert_eq!(properties.correlation_data.as_deref(), view.header(header::MQTT_CORRELATION_DATA));
        prop_assert_eq!(properties.response_topic.as_deref().map(str::as_bytes), view.header(header::MQTT_RESPONSE_TOPIC));
        let found: Vec<u32> = properties.subscription_identifiers.iter().map(|id| *id as u32).collect();
        prop_assert_eq!(found, identifiers);
        let traceparent = properties.user_properties.iter().find(|(name, _value)| name == "traceparent");
        prop_assert_eq!(traceparent.map(|(_name, value)| value.clone()), trace.map(Trace::to_traceparent));
    }
}

fn peer_packets() -> Vec<(Version, PeerPacket)> {
    let subscribe = peer::Subscribe {
        pkid: 9,
        filters: vec![peer::Filter {
            path: "a/+".into(),
            qos: peer::QoS::ExactlyOnce,
            nolocal: true,
            preserve_retain: true,
            retain_forward_rule: peer::RetainForwardRule::Never,
        }],
    };
    let unsubscribe = peer::Unsubscribe { pkid: 10, filters: vec!["a/+".into(), "b".into()] };
    let properties =
        peer::SubscribeProperties { id: Some(300), user_properties: vec![("k".into(), "v".into())] };
    vec![
        (Version::V4, PeerPacket::Subscribe(subscribe.clone(), None)),
        (Version::V5, PeerPacket::Subscribe(subscribe, Some(properties))),
        (Version::V4, PeerPacket::Unsubscribe(unsubscribe.clone(), None)),
        (Version::V5, PeerPacket::Unsubscribe(unsubscribe, None)),
    ]
}

fn peer_bytes(version: Version, packet: PeerPacket) -> Vec<u8> {
    let mut out = BytesMut::new();
    match version {
        Version::V4 => peer::v4::V4.write(packet, &mut out).unwrap(),
        Version::V5 => peer::v5::V5.write(packet, &mut out).unwrap(),
    };
    out.to_vec()
}

fn peer_connect(version: Version) -> Vec<u8> {
    let connect = peer::Connect { keep_alive: 30, client_id: "c1".into(), clean_session: false };
    let will = peer::LastWill {
        topic: Bytes::from_static(b"will/t"),
        message: Bytes::from_static(b"gone"),
        qos: peer::QoS::AtLeastOnce,
        retain: true,
    };
    let login = peer::Login { username: "u".into(), password: "p".into() };
    let properties = (version == Version::V5).then(|| peer::ConnectProperties {
        session_expiry_interval: Some(77),
        receive_maximum: Some(5),
        max_packet_size: Some(1000),
        topic_alias_max: Some(3),
        request_response_info: Some(1),
        request_problem_info: Some(0),
        user_properties: vec![("k".into(), "v".into())],
        authentication_method: None,
        authentication_data: None,
    });
    let will_properties = (version == Version::V5).then(|| peer::LastWillProperties {
        delay_interval: Some(4),
        payload_format_indicator: Some(1),
        message_expiry_interval: Some(60),
        content_type: Some("text/plain".into()),
        response_topic: Some("r/t".into()),
        correlation_data: Some(Bytes::from_static(b"\0\xff")),
        user_properties: vec![("w".into(), "x".into())],
    });
    peer_bytes(version, PeerPacket::Connect(connect, properties, Some(will), will_properties, Some(login)))
}

#[test]
fn this_server_reads_the_connect_that_rumqttd_writes() {
    for version in [Version::V4, Version::V5] {
        let wire = peer_connect(version);
        let Ok(Gate::Packet(packet)) = gate::check(&wire, None, MAX) else { panic!() };
        let read = super::connect::Connect::parse(packet.body).unwrap();
        assert_eq!((read.version, read.client_id, read.keep_alive_s), (version, "c1", 30));
        assert_eq!((read.username, read.password), (Some("u"), Some(b"p".as_slice())));
        let will = read.will.unwrap();
        assert_eq!((will.message.topic, will.message.payload), ("will/t", b"gone".as_slice()));
        assert_eq!((will.qos, will.retain), (1, true));
        if version == Version::V5 {
            assert_eq!((read.expiry_s, read.receive_max, read.packet_max), (77, 5, 1000));
            assert_eq!(will.delay_s, 4);
            assert_eq!(will.message.properties.response_topic, Some("r/t"));
        } else {
            assert_eq!(read.expiry_s, u32::MAX, "a session that is not clean lasts");
        }
    }
}

#[test]
fn this_server_reads_the_subscriptions_that_rumqttd_writes() {
    for (version, packet) in peer_packets() {
        let wire = peer_bytes(version, packet);
        let packet = complete(version, &wire);
        if packet.kind == Kind::Subscribe {
            let mut read = packet::Subscribe::parse(version, packet.body).unwrap();
            assert_eq!(read.identifier, if version == Version::V5 { 300 } else { 0 });
            let wanted = match read.next() {
                // A peer of 3.1.1 writes no options that 3.1.1 does not have.
                Ok(wanted) => wanted.unwrap(),
                Err(error) => panic!("{version:?}: {error}"),
            };
            assert_eq!((wanted.filter, wanted.qos), ("a/+", 2));
            if version == Version::V5 {
                assert!(wanted.no_local && wanted.retain_as_published);
                assert_eq!(wanted.retained, RetainedOnSubscribe::DoNotSend);
            }
            assert!(read.next().unwrap().is_none());
        } else {
            let mut read = packet::Unsubscribe::parse(version, packet.body).unwrap();
            assert_eq!(read.next().unwrap(), Some("a/+"));
            assert_eq!(read.next().unwrap(), Some("b"));
            assert_eq!(read.next().unwrap(), None);
        }
    }
}

#[test]
fn rumqttd_reads_the_answers_that_this_server_writes() {
    let mut out = Vec::new();
    let connack = encode::ConnAck {
        session_present: true,
        receive_max: 9,
        packet_max: MAX,
        topic_alias_max: 16,
        lowered_expiry_s: Some(77),
        assigned_client_id: Some("auto-1"),
    };
    encode::connack(&mut out, Version::V5, &connack);
    encode::suback(&mut out, Version::V5, 3, &[0, 1, 2, 0x8f]);
    encode::disconnect(&mut out, 0x8e);
    let mut wire = BytesMut::from(out.as_slice());
    let PeerPacket::ConnAck(read, Some(properties)) = read_v5_connack(&mut wire) else { panic!() };
    assert!(read.session_present);
    assert_eq!((properties.receive_max, properties.max_packet_size), (Some(9), Some(MAX as u32)));
    assert_eq!(properties.assigned_client_identifier.as_deref(), Some("auto-1"));
    assert_eq!(properties.shared_subscription_available, Some(0));
    assert_eq!(properties.session_expiry_interval, Some(77), "what was lowered is said");
    let PeerPacket::SubAck(read, _) = peer::v5::V5.read_mut(&mut wire, MAX).unwrap() else { panic!() };
    assert_eq!((read.pkid, read.return_codes.len()), (3, 4));
    let PeerPacket::Disconnect(read, _) = peer::v5::V5.read_mut(&mut wire, MAX).unwrap() else { panic!() };
    assert_eq!(read.reason_code, peer::DisconnectReasonCode::SessionTakenOver);
}

/// `rumqttd` is a server and does not read CONNACK (`20 01 00` reaches its `unreachable!()`): the few fields
/// that matter are read here, with its types.
fn read_v5_connack(wire: &mut BytesMut) -> PeerPacket {
    let len = 2 + usize::from(wire[1]);
    let packet = wire.split_to(len);
    let mut properties = peer::ConnAckProperties::default();
    let mut reader = super::wire::Reader::new(&packet[4..]);
    let mut found = reader.properties().unwrap();
    while let Some((id, value)) = found.next().unwrap() {
        use super::wire::{Value, property};
        match (id, value) {
            (property::SESSION_EXPIRY, Value::Four(seconds)) => {
                properties.session_expiry_interval = Some(seconds);
            }
            (property::RECEIVE_MAX, Value::Two(max)) => properties.receive_max = Some(max),
            (property::PACKET_MAX, Value::Four(max)) => properties.max_packet_size = Some(max),
            (property::SHARED_AVAILABLE, Value::Byte(byte)) => {
                properties.shared_subscription_available = Some(byte);
            }
            (property::ASSIGNED_CLIENT_ID, Value::Str(id)) => {
                properties.assigned_client_identifier = Some(id.to_owned());
            }
            _ => {}
        }
    }
    let connack = peer::ConnAck { session_present: packet[2] == 1, code: peer::ConnectReturnCode::Success };
    PeerPacket::ConnAck(connack, Some(properties))
}

#[test]
fn a_delivery_that_is_no_longer_permitted_is_settled_and_not_sent() {
    let counters = Arc::<Counters>::default();
    let limits = Limits {
        packet_max: MAX,
        client_packet_max: MAX,
        receive_max: 9,
        topic_alias_max: 0,
        lasting: true,
        expiry_max_s: u32::MAX,
        lowered_expiry_s: None,
    };
    let permissions = Permissions::new(Vec::new(), vec![codec::Filter::parse("mine/#").unwrap()]);
    let mut session =
        Session::new(SessionId(1), Version::V5, limits, Arc::new(permissions), Arc::clone(&counters), None);
    let mut writer = Writer::default();
    for (topic, qos) in [("theirs/a", 0), ("theirs/b", 1), ("theirs/c", 2)] {
        let frame = FrameParts { topic, ..FrameParts::default() }.encode();
        let delivery = delivery(frame, qos, u16::from(qos), (false, false));
        session.send(Output::Deliver(delivery), ENTERED.time_us, &mut writer).unwrap();
    }
    assert!(writer.is_idle(), "none was written");
    assert_eq!(counters.deliveries_denied.load(std::sync::atomic::Ordering::Relaxed), 3);
    let acks = vec![ClientAck::Ack(1), ClientAck::Comp(2)];
    let events = session.take_events();
    assert!(matches!(&events[..], [Event::Acked { acks: told, .. }] if *told == acks), "{events:?}");
    let frame = FrameParts { topic: "mine/a", ..FrameParts::default() }.encode();
    let permitted = delivery(frame, 1, 3, (false, false));
    session.send(Output::Deliver(permitted), ENTERED.time_us, &mut writer).unwrap();
    assert!(!writer.is_idle() && session.take_events().is_empty());
}

#[test]
fn no_mutation_of_whole_packets_panics_the_decoder() {
    let seed: u64 = std::env::var("MQTT_FUZZ_SEED").map_or(20, |text| text.parse().unwrap());
    let mut random = SmallRng::seed_from_u64(seed);
    let mut corpus = vec![peer_connect(Version::V4), peer_connect(Version::V5)];
    corpus.extend(peer_packets().into_iter().map(|(version, packet)| peer_bytes(version, packet)));
    let headers: [(&str, &[u8]); 4] = [
        (header::CONTENT_TYPE, b"x"),
        (header::MQTT_RESPONSE_TOPIC, b"_INBOX/a"),
        (header::MQTT_CORRELATION_DATA, b"\xff"),
        ("user", b"value"),
    ];
    let frame =
        FrameParts { topic: "a/b", ttl_s: 9, headers: &headers, payload: b"pay", ..FrameParts::default() };
    for version in [Version::V4, Version::V5] {
        for qos in 0..3 {
            corpus.push(encoded(version, &delivery(frame.encode(), qos, 1, (false, true))));
        }
    }
    corpus.extend([vec![0x62, 2, 0, 1], vec![0x40, 4, 0, 1, 0x10, 0], vec![0xe0, 2, 4, 0], vec![0xc0, 0]]);
    corpus.extend([vec![0x20, 1, 0], vec![0xb0, 1, 0]]);
    for round in 0..20_000 {
        let mut input = corpus[random.random_range(0..corpus.len())].clone();
        for _ in 0..random.random_range(1..5) {
            mutate(&mut random, &mut input);
        }
        let caught = std::panic::catch_unwind(|| super::fuzz::decode(&input));
        assert!(caught.is_ok(), "MQTT_FUZZ_SEED={seed} round {round}: {input:02x?}");
    }
}

fn mutate(random: &mut SmallRng, input: &mut Vec<u8>) {
    if input.is_empty() {
        return input.push(random.random());
    }
    let at = random.random_range(0..input.len());
    match random.random_range(0..6) {
        0 => input[at] ^= 1 << random.random_range(0..8),
        1 => input[at] = [0, 1, 0x7f, 0x80, 0xff][random.random_range(0..5)],
        2 => input.truncate(at),
        3 => input.insert(at, random.random()),
        4 => {
            input.remove(at);
        }
        // Keeps the length in the fixed header true, so that the readers behind the gate are reached.
        _ if input.len() > 1 => input[1] = (input.len() as u8).wrapping_sub(2),
        _ => {}
    }
}
