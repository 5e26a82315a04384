//! A session without its socket: text in, text and events out.

use bytes::Bytes;
use codec::frame::FrameParts;

use super::{super::Side, *};
use crate::{
    core::event::{Position, Publish, PublishRefusal, Target},
    limits,
};

struct Client {
    session: Session,
    outputs: VecDeque<Output>,
    events: Vec<Event>,
}

impl Client {
    /// A client that has read the greeting and sent this.
    fn new(side: Side, text: &str) -> Self {
        let mut client = Self::greeted(Config::new(side, "test", Auth::Anonymous));
        assert!(client.read().starts_with("INFO {"));
        client.says(text);
        client
    }

    fn greeted(config: Config) -> Self {
        let peer = SocketAddr::from(([127, 0, 0, 1], 1));
        let session = Session::new(Arc::new(config), SessionId(7), peer, Instant::now());
        Self { session, outputs: VecDeque::new(), events: Vec::new() }
    }

    /// A quiet client with headers.
    fn connected(side: Side) -> Self {
        let mut client = Self::new(side, CONNECT);
        assert_eq!(client.read(), "");
        client
    }

    fn says(&mut self, text: impl AsRef<[u8]>) {
        let mut rest = text.as_ref();
        loop {
            let used = self.session.receive(rest);
            self.events.extend(self.session.take_events().into_iter().map(|(event, _)| event));
            rest = &rest[used..];
            if used == 0 {
                break;
            }
        }
    }

    fn gets(&mut self, output: Output) {
        self.outputs.push_back(output);
        self.session.send(&mut self.outputs);
        self.events.extend(self.session.take_events().into_iter().map(|(event, _)| event));
    }

    /// Everything written so far.
    fn read(&mut self) -> String {
        let mut text = Vec::new();
        while !self.session.egress().is_empty() {
            let mut slices = [std::io::IoSlice::new(&[]); 16];
            let filled = self.session.egress().slices(&mut slices);
            let part: Vec<u8> = slices[..filled].iter().flat_map(|slice| slice.to_vec()).collect();
            text.extend_from_slice(&part);
            self.session.written(part.len());
        }
        String::from_utf8(text).unwrap()
    }

    fn published(&mut self) -> Vec<Publish> {
        let messages = self.events.drain(..).filter_map(|event| match event {
            Event::Published { messages, .. } => Some(messages),
            _ => None,
        });
        messages.flatten().collect()
    }

    fn subscribed(&mut self) -> Vec<Subscription> {
        let subscriptions = self.events.drain(..).filter_map(|event| match event {
            Event::Subscribed { token: 0, subscriptions, .. } => Some(subscriptions),
            _ => None,
        });
        subscriptions.flatten().collect()
    }
}

const CONNECT: &str = "CONNECT {\"verbose\":false,\"headers\":true,\"no_responders\":true}\r\n";

fn frame(topic: &str, headers: &[(&str, &[u8])], payload: &[u8]) -> Bytes {
    FrameParts { topic, headers, payload, ..FrameParts::default() }.encode()
}

fn delivery(sub: SubId, topic: &str, payload: &[u8]) -> Delivery {
    Delivery {
        frame: frame(topic, &[], payload),
        origin: "edge-1".into(),
        sub,
        identifiers: None,
        qos: 0,
        packet_id: 0,
        dup: false,
        retain: false,
        position: None,
        reply: None,
        no_responders: false,
    }
}

#[test]
fn the_greeting_tells_what_a_client_must_know() {
    let mut client = Client::greeted(Config::new(Side::Hub, "hub-1", Auth::Anonymous));
    let info = client.read();
    let json = info.strip_prefix("INFO ").unwrap().strip_suffix("\r\n").unwrap();
    let json: serde_json::Value = serde_json::from_str(json).unwrap();
    assert_eq!(json["server_name"], "hub-1");
    assert_eq!(json["max_payload"], 1 << 20);
    assert_eq!(json["headers"], true);
    assert_eq!(json["proto"], 1);
    assert_eq!(json["client_id"], 7);
    assert_eq!(json["auth_required"], false);
}

#[test]
fn verbose_clients_hear_ok_for_everything_that_was_taken() {
    let mut client =
        Client::new(Side::Node, "CONNECT {}\r\nSUB a 1\r\nPUB a 1\r\nx\r\nUNSUB 1\r\nUNSUB 9\r\n");
    assert_eq!(client.read(), "+OK\r\n".repeat(5));
    client.says("PUB a..b 0\r\n\r\nSUB a..b 2\r\nPING\r\n");
    assert_eq!(client.read(), "-ERR 'Invalid Publish Subject'\r\n-ERR 'Invalid Subject'\r\n");
}

#[test]
fn who_needs_no_credentials_need_not_introduce_itself() {
    let mut client = Client::new(Side::Node, "PUB a 1\r\nx\r\n");
    assert_eq!(client.read(), "+OK\r\n");
    assert!(matches!(client.events[0], Event::SessionOpened(_)));
    assert_eq!(client.published().len(), 1);
}

#[test]
fn a_publish_becomes_a_frame_with_its_headers_in_order() {
    let mut client = Client::connected(Side::Node);
    let headers = "NATS/1.0\r\nB: 1\r\na: 2\r\nB: 3\r\n\
        traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01\r\n\r\n";
    client.says(format!("HPUB a.b {} {}\r\n{headers}hello\r\n", headers.len(), headers.len() + 5));
    let [message] = &client.published()[..] else { panic!("one message") };
    let view = FrameView::parse(&message.frame).unwrap();
    assert_eq!((view.topic(), view.payload()), ("a/b", &b"hello"[..]));
    let expected: Vec<(&str, &[u8])> = vec![("B", b"1"), ("a", b"2"), ("B", b"3")];
    assert_eq!(view.headers().collect::<Vec<_>>(), expected);
    assert_eq!(
        view.trace().unwrap().to_traceparent(),
        "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    );
    assert_eq!((message.qos, &message.target, &message.reply), (0, &Target::Own, &None));
}

#[test]
fn a_node_appends_what_asks_for_it_and_forwards_no_reply_then() {
    let mut client = Client::connected(Side::Node);
    client.says("HPUB a _INBOX.1 28 28\r\nNATS/1.0\r\nOctobus-QoS: 1\r\n\r\n\r\nPUB a _INBOX.1 0\r\n\r\n");
    assert_eq!(client.read(), "");
    let [durable, live] = &client.published()[..] else { panic!("two messages") };
    assert_eq!((durable.qos, durable.packet_id, durable.reply.as_deref()), (1, 0, None));
    assert_eq!(FrameView::parse(&durable.frame).unwrap().headers().count(), 0, "it is for the front alone");
    assert_eq!((live.qos, live.reply.as_deref()), (0, Some("_INBOX/1")));
}

#[test]
fn at_a_hub_down_is_a_live_request_with_a_reply_and_durable_without() {
    let mut client = Client::connected(Side::Hub);
    client.says("PUB octobus.down.n.a.b _INBOX.1 1\r\nx\r\nPUB octobus.down.n.a.b 1\r\nx\r\n");
    let retain = "NATS/1.0\r\nOctobus-Retain: 1\r\n\r\n";
    client.says(format!("HPUB octobus.down.n.a {0} {0}\r\n{retain}\r\n", retain.len()));
    let [request, durable, retained] = &client.published()[..] else { panic!("three messages") };
    assert_eq!((request.qos, request.reply.as_deref()), (0, Some("_INBOX/1")));
    assert_eq!((durable.qos, durable.packet_id, durable.reply.as_deref()), (1, 0, None));
    assert_eq!(FrameView::parse(&retained.frame).unwrap().header("Octobus-Retain"), Some(&b"1"[..]));
    for message in [request, durable, retained] {
        assert_eq!(message.target, Target::Node("n".into()));
    }
}

#[test]
fn what_is_not_offered_here_is_a_permissions_violation() {
    let mut client = Client::connected(Side::Hub);
    client.says("PUB octobus.up.n.a 0\r\n\r\nSUB octobus.down.> 1\r\nSUB octobus.down.> q 1\r\nPUB a octobus.x 0\r\n\r\n");
    let expected = "-ERR 'Permissions Violation for Publish to \"octobus.up.n.a\"'\r\n\
        -ERR 'Permissions Violation for Subscription to \"octobus.down.>\"'\r\n\
        -ERR 'Permissions Violation for Subscription to \"octobus.down.>\" using queue \"q\"'\r\n\
        -ERR 'Permissions Violation for Publish with Reply of \"octobus.x\"'\r\n";
    assert_eq!(client.read(), expected);
    assert!(client.session.wants_input(), "the connection goes on");
}

#[test]
fn errors_that_close_close() {
    let cases = [
        ("nonsense", "Unknown Protocol Operation"),
        ("PUB a 2000000\r\n", "Maximum Payload Violation"),
        ("CONNECT {\"no_responders\":true}\r\n", "no responders requires headers support"),
        ("CONNECT {\"protocol\":9}\r\n", "invalid client protocol"),
        ("CONNECT nonsense\r\n", "Unknown Protocol Operation"),
        (
            "CONNECT {\"verbose\":false}\r\nHPUB a 12 12\r\nNATS/1.0\r\n\r\n\r\n",
            "message headers not supported",
        ),
        (
            "CONNECT {\"verbose\":false,\"headers\":true}\r\nHPUB a 2 2\r\nxx\r\n",
            "Unknown Protocol Operation",
        ),
    ];
    for (text, error) in cases {
        let mut client = Client::new(Side::Node, text);
        assert_eq!(client.read(), format!("-ERR '{error}'\r\n"), "{text}");
        assert!(client.session.is_closing());
        client.says("PING\r\n");
        assert_eq!(client.read(), "", "nothing is heard after the error");
    }
}

#[test]
fn a_pong_follows_what_the_core_did_with_earlier_operations() {
    let mut client = Client::connected(Side::Node);
    client.says("PING\r\n");
    assert_eq!(client.read(), "PONG\r\n", "a heartbeat never enters the core");
    client.events.clear();
    client.says("SUB a 1\r\nPUB a 1\r\nx\r\nPING\r\nPING\r\n");
    assert_eq!(client.read(), "");
    let Some(Event::Subscribed { token, subscriptions, .. }) = client.events.last() else {
        panic!("a barrier")
    };
    let (token, _) = (*token, assert!(subscriptions.is_empty()));
    client.gets(Output::Reply(Reply::Subscribed { token: 0, granted: vec![0] }));
    client.gets(Output::Deliver(delivery(0, "a", b"x")));
    client.gets(Output::Reply(Reply::Subscribed { token, granted: vec![] }));
    assert_eq!(client.read(), "MSG a 1 1\r\nx\r\nPONG\r\nPONG\r\n");
}

#[test]
fn a_delivery_from_a_node_names_it_and_its_place_in_the_log() {
    let mut client = Client::connected(Side::Hub);
    client.says("SUB octobus.up.> up\r\n");
    let [subscription] = &client.subscribed()[..] else { panic!("one subscription") };
    assert_eq!(subscription.origin, OriginFilter::AnyNode);
    assert!(subscription.wildcard_matches_dollar);
    let position = Position { stream: "default".into(), epoch: 0xabc, seq: 42 };
    let forged: &[(&str, &[u8])] = &[("octobus-seq", b"1"), ("k", b"v"), ("bin", b"\r\nX: y")];
    client.gets(Output::Deliver(Delivery {
        frame: frame("a/b.c/", forged, b"71.5"),
        origin: "plant.1".into(),
        position: Some(position),
        reply: Some("_INBOX/9".into()),
        ..delivery(subscription.id, "", b"")
    }));
    let headers = "NATS/1.0\r\nOctobus-Stream: default\r\nOctobus-Epoch: 0000000000000abc\r\n\
        Octobus-Seq: 42\r\nk: v\r\n\r\n";
    let (h, t) = (headers.len(), headers.len() + 4);
    let expected = format!("HMSG octobus.up.plant%2E1.a.b%2Ec.% up _INBOX.9 {h} {t}\r\n{headers}71.5\r\n");
    assert_eq!(client.read(), expected);
}

#[test]
fn a_client_without_headers_gets_the_payload_alone() {
    let mut client = Client::new(Side::Node, "CONNECT {\"verbose\":false}\r\nSUB a 1\r\n");
    let [subscription] = &client.subscribed()[..] else { panic!("one subscription") };
    let message = Delivery { frame: frame("a", &[("k", b"v")], b"x"), ..delivery(subscription.id, "", b"") };
    client.gets(Output::Deliver(message));
    assert_eq!(client.read(), "MSG a 1 1\r\nx\r\n");
}

#[test]
fn nobody_answering_is_told_to_who_asked_for_it() {
    let mut client = Client::connected(Side::Hub);
    client.says("SUB _INBOX.1.* 5\r\n");
    let id = client.subscribed()[0].id;
    let nobody = |headers: &[(&str, &[u8])]| {
        let frame = frame("_INBOX/1/a", headers, b"");
        Output::Deliver(Delivery { frame, no_responders: true, ..delivery(id, "", b"") })
    };
    client.gets(nobody(&[]));
    assert_eq!(client.read(), "HMSG _INBOX.1.a 5 16 16\r\nNATS/1.0 503\r\n\r\n\r\n");
    client.gets(nobody(&[("Nats-Service-Error-Code", b"503"), ("Nats-Service-Error", b"node offline")]));
    let headers = "NATS/1.0 503\r\nNats-Service-Error-Code: 503\r\nNats-Service-Error: node offline\r\n\r\n";
    assert_eq!(client.read(), format!("HMSG _INBOX.1.a 5 {0} {0}\r\n{headers}\r\n", headers.len()));
    client.says("PUB $JS.API.INFO _INBOX.1.b 0\r\n\r\n");
    assert_eq!(client.read(), "HMSG _INBOX.1.b 5 16 16\r\nNATS/1.0 503\r\n\r\n\r\n");
    client.says("CONNECT {\"verbose\":false}\r\n");
    client.gets(nobody(&[]));
    assert_eq!(client.read(), "", "a client that did not ask for it would take it for an answer");
}

#[test]
fn delivery_stops_exactly_at_max() {
    let mut client = Client::connected(Side::Node);
    client.says("SUB a 1\r\nUNSUB 1 3\r\n");
    let id = client.subscribed()[0].id;
    for _ in 0..5 {
        client.gets(Output::Deliver(delivery(id, "a", b"x")));
    }
    assert_eq!(client.read(), "MSG a 1 1\r\nx\r\n".repeat(3));
    let ended = |event: &Event| matches!(event, Event::Unsubscribed { which, .. } if which.len() == 1);
    assert_eq!(client.events.iter().filter(|event| ended(event)).count(), 1);
    client.says("SUB a 1\r\n");
    let second = client.subscribed()[0].id;
    client.gets(Output::Deliver(delivery(second, "a", b"x")));
    client.says("UNSUB 1 1\r\n");
    client.gets(Output::Deliver(delivery(second, "a", b"x")));
    assert_eq!(client.read(), "MSG a 1 1\r\nx\r\n", "a max that is reached already ends it at once");
}

#[test]
fn what_was_published_before_an_unsub_is_still_delivered() {
    let mut client = Client::connected(Side::Node);
    client.says("SUB a 1\r\nPUB a 1\r\nx\r\nUNSUB 1\r\nSUB b 1\r\n");
    let Some(Event::Unsubscribed { token, .. }) =
        client.events.iter().find(|event| matches!(event, Event::Unsubscribed { .. }))
    else {
        panic!("an end")
    };
    let token = *token;
    let ids: Vec<SubId> = client.subscribed().iter().map(|one| one.id).collect();
    client.gets(Output::Deliver(delivery(ids[0], "a", b"x")));
    client.gets(Output::Reply(Reply::Unsubscribed { token, existed: vec![true] }));
    client.gets(Output::Deliver(delivery(ids[0], "a", b"late")));
    client.gets(Output::Deliver(delivery(ids[1], "b", b"y")));
    assert_eq!(client.read(), "MSG a 1 1\r\nx\r\nMSG b 1 1\r\ny\r\n");
}

#[test]
fn a_second_subscription_of_the_same_name_changes_nothing() {
    let mut client = Client::connected(Side::Node);
    client.says("SUB a 1\r\nSUB b 1\r\n");
    assert_eq!(client.subscribed().len(), 1);
}

#[test]
fn a_refused_publish_is_told_in_a_way_that_clients_survive() {
    let mut client = Client::connected(Side::Hub);
    let refused = || Reply::Refused { packet_id: 0, qos: 1, reason: PublishRefusal::NoSuchNode };
    client.outputs.push_back(Output::Reply(refused()));
    client.gets(Output::Reply(refused()));
    assert_eq!(
        client.read(),
        "-ERR 'Permissions Violation for Publish: no node of that name is enrolled'\r\n"
    );
    assert!(client.session.wants_input());
}

#[test]
fn the_core_hears_what_was_written_in_large_steps_and_loses_no_byte_of_it() {
    let mut client = Client::connected(Side::Node);
    client.says("SUB a 1\r\n");
    let id = client.subscribed()[0].id;
    let mut cost = 0;
    for _ in 0..100 {
        let output = Output::Deliver(delivery(id, "a", &[b'x'; 1000]));
        cost += output.cost();
        client.gets(output);
        client.says("PING\r\n");
        client.read();
    }
    client.says("");
    let sent: Vec<usize> = client
        .events
        .iter()
        .filter_map(|event| if let Event::Sent { bytes, .. } = event { Some(*bytes) } else { None })
        .collect();
    assert!(sent.iter().all(|&bytes| bytes >= limits::SENT_REPORT_BYTES));
    assert!(cost - sent.iter().sum::<usize>() < limits::SENT_REPORT_BYTES);
}

#[test]
fn a_client_that_does_not_read_its_answers_is_not_read() {
    let mut client = Client::new(Side::Node, "CONNECT {}\r\n");
    let flood = "PUB a..b 0\r\n\r\n".repeat(20_000);
    let mut used = 0;
    loop {
        let more = client.session.receive(&flood.as_bytes()[used..]);
        client.session.take_events();
        used += more;
        if more == 0 {
            break;
        }
    }
    assert!(used < flood.len());
    assert!(client.session.egress().pending() < EGRESS_HIGH + 100);
    assert!(!client.session.wants_input());
    client.read();
    assert!(client.session.wants_input());
}

#[test]
fn a_silent_client_is_pinged_twice_and_then_stale() {
    let mut client = Client::connected(Side::Node);
    let tick = |client: &mut Client| {
        let deadline = client.session.deadline();
        client.session.tick(deadline);
        client.read()
    };
    assert_eq!(tick(&mut client), "", "it has just spoken");
    assert_eq!(tick(&mut client), "PING\r\n");
    client.says("PONG\r\n");
    assert_eq!(tick(&mut client), "");
    assert_eq!(tick(&mut client), "PING\r\n");
    assert_eq!(tick(&mut client), "PING\r\n");
    assert_eq!(tick(&mut client), "-ERR 'Stale Connection'\r\n");
    assert!(client.session.is_closing());
}

#[test]
fn a_client_that_never_introduces_itself_is_closed() {
    let mut client = Client::new(Side::Node, "");
    client.session.tick(client.session.deadline());
    assert_eq!(client.read(), "-ERR 'Authentication Timeout'\r\n");
    assert!(client.session.closed().is_none(), "the core never knew it");
}

fn guarded() -> Client {
    let users = crate::front::auth::Users::parse("").unwrap();
    let mut client = Client::greeted(Config::new(Side::Node, "test", Auth::Users(Arc::new(users))));
    assert!(client.read().contains("\"auth_required\":true"));
    client
}

#[test]
fn strangers_may_only_introduce_themselves() {
    for text in ["PING\r\n", "SUB a 1\r\n", "PUB a 0\r\n\r\n", "PUB a 100\r\n"] {
        let mut client = guarded();
        client.says(text);
        assert_eq!(client.read(), "-ERR 'Authorization Violation'\r\n", "{text}");
        assert!(client.session.is_closing());
    }
}

#[test]
fn permissions_decide_what_a_user_does() {
    let mut client = guarded();
    client.says("CONNECT {\"user\":\"u\",\"pass\":\"p\"}\r\nPUB a 0\r\n\r\n");
    assert!(!client.session.wants_input(), "nothing is read while the password is checked");
    let login = client.session.take_login().unwrap();
    assert_eq!((login.user.as_deref(), login.password.as_deref()), (Some("u"), Some("p")));
    let permissions = Permissions::new(vec![codec::Filter::parse("a/#").unwrap()], vec![]);
    client.session.admit(Some(Principal { name: Some("u".into()), permissions: Arc::new(permissions) }));
    client.says("PUB a.b 0\r\n\r\nPUB b 0\r\n\r\nSUB a 1\r\n");
    let expected = "+OK\r\n+OK\r\n-ERR 'Permissions Violation for Publish to \"b\"'\r\n\
        -ERR 'Permissions Violation for Subscription to \"a\"'\r\n";
    assert_eq!(client.read(), expected);
    assert_eq!(client.published().len(), 1);

    let mut client = guarded();
    client.says("CONNECT {\"user\":\"u\",\"pass\":\"p\"}\r\n");
    assert!(client.session.take_login().is_some());
    client.session.admit(None);
    assert_eq!(client.read(), "-ERR 'Authorization Violation'\r\n");
}
