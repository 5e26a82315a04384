//! Messages between a node's devices and the hub's clients, over QUIC.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use broker::{
    Handle, Outbox,
    event::{
        Delivery, Event, Front, OriginFilter, Output, Publish, Reply, RetainedOnSubscribe, SessionOpen,
        Subscription, Target,
    },
    link::dial::State,
};
use bytes::Bytes;
use codec::Filter;
use edgehub::edge::Edge;
use tokio::time::timeout;

use super::{TestHub, start_edge, stop_edge};

const SOON: Duration = Duration::from_secs(20);

/// A client inside the process.
struct Client {
    handle: Handle,
    outbox: Outbox,
    queue: VecDeque<Output>,
}

impl Client {
    async fn open(handle: &Handle) -> Self {
        let (session, outbox) = handle.open_session();
        let open = SessionOpen {
            session,
            front: Front::Internal,
            client_id: Arc::from(""),
            clean_start: true,
            expiry_s: 0,
            receive_max: 100,
            will: None,
        };
        handle.send(Event::SessionOpened(open), 0).await.unwrap();
        let mut client = Self { handle: handle.clone(), outbox, queue: VecDeque::new() };
        client.wait(|output| matches!(output, Output::Reply(Reply::Opened { .. })).then_some(())).await;
        client
    }

    async fn subscribe(&mut self, origin: OriginFilter, filter: &str) {
        let subscription = Subscription {
            id: 1,
            origin,
            filter: Filter::parse(filter).unwrap(),
            qos: 1,
            group: None,
            no_local: false,
            retain_as_published: false,
            retained: RetainedOnSubscribe::Send,
            wildcard_matches_dollar: false,
            identifier: 0,
        };
        let session = self.outbox.session();
        let event = Event::Subscribed { session, token: 1, subscriptions: vec![subscription] };
        self.handle.send(event, 0).await.unwrap();
        self.wait(|output| matches!(output, Output::Reply(Reply::Subscribed { .. })).then_some(())).await;
    }

    async fn publish(&mut self, target: Target, topic: &str, payload: &'static [u8]) {
        let frame = codec::proto::Frame {
            topic: topic.into(),
            payload: Bytes::from_static(payload),
            ..Default::default()
        };
        let publish = Publish {
            target,
            frame: codec::encode(&frame),
            qos: 1,
            packet_id: 7,
            dup: false,
            retain: false,
            reply: None,
        };
        let session = self.outbox.session();
        self.handle.send(Event::Published { session, messages: vec![publish] }, payload.len()).await.unwrap();
        self.wait(|output| match output {
            Output::Reply(Reply::PubAck(7)) => Some(()),
            Output::Reply(Reply::Refused { reason, .. }) => panic!("refused: {reason}"),
            _ => None,
        })
        .await;
    }

    async fn delivery(&mut self) -> (String, String, Vec<u8>) {
        let delivery: Delivery = self
            .wait(|output| match output {
                Output::Deliver(delivery) => Some(delivery.clone()),
                _ => None,
            })
            .await;
        let view = codec::FrameView::parse(&delivery.frame).unwrap();
        (delivery.origin.to_string(), view.topic().to_owned(), view.payload().to_vec())
    }

    async fn close(self) {
        let session = self.outbox.session();
        self.handle.send(Event::SessionClosed { session, clean: true }, 0).await.unwrap();
    }

    async fn wait<T>(&mut self, mut wanted: impl FnMut(&Output) -> Option<T>) -> T {
        timeout(SOON, async {
            loop {
                while let Some(output) = self.queue.pop_front() {
                    if let Some(found) = wanted(&output) {
                        return found;
                    }
                }
                self.outbox.recv(&mut self.queue).await;
            }
        })
        .await
        .expect("it comes soon")
    }
}

async fn wait_for_link(edge: &Edge, wanted: State) {
    let mut link = edge.link();
    let reached = link.wait_for(|status| status.state == wanted);
    let reached = timeout(SOON, reached).await.map(drop);
    assert!(reached.is_ok(), "the link is soon {wanted:?}: {:?}", edge.link().borrow());
}

async fn wait_for_error(edge: &Edge, text: &str) {
    let mut link = edge.link();
    let told = link.wait_for(|status| status.last_error.as_deref().is_some_and(|error| error.contains(text)));
    let told = timeout(SOON, told).await.map(drop);
    assert!(told.is_ok(), "{text}: {:?}", edge.link().borrow());
}

#[tokio::test]
async fn a_message_goes_up_and_another_comes_down() {
    let hub = TestHub::start().await;
    let node = tempfile::tempdir().unwrap();
    hub.join(node.path(), &hub.token("edge-1", false).await).await.unwrap();
    let edge = start_edge(node.path(), &[]).await;
    wait_for_link(&edge, State::Live).await;

    let (mut device, mut app) = (Client::open(edge.handle()).await, Client::open(hub.hub.handle()).await);
    app.subscribe(OriginFilter::Node(Arc::from("edge-1")), "sensors/#").await;
    device.publish(Target::Own, "sensors/boiler/temp", b"71.5").await;
    assert_eq!(app.delivery().await, ("edge-1".into(), "sensors/boiler/temp".into(), b"71.5".to_vec()));

    device.subscribe(OriginFilter::Own, "valves/#").await;
    app.publish(Target::Node(Arc::from("edge-1")), "valves/3", b"open").await;
    let (_origin, topic, payload) = device.delivery().await;
    assert_eq!((topic.as_str(), payload.as_slice()), ("valves/3", b"open".as_slice()));
    device.close().await;
    app.close().await;
    stop_edge(edge).await;
    hub.stop().await;
}

#[tokio::test]
async fn a_node_serves_its_devices_with_no_hub_and_links_once_it_joins() {
    let node = tempfile::tempdir().unwrap();
    let edge = start_edge(node.path(), &[("--node", "edge-1")]).await;
    let (mut device, mut app) = (Client::open(edge.handle()).await, Client::open(edge.handle()).await);
    app.subscribe(OriginFilter::Own, "a/#").await;
    device.publish(Target::Own, "a/b", b"1").await;
    assert_eq!(app.delivery().await, ("edge-1".into(), "a/b".into(), b"1".to_vec()));
    device.close().await;
    app.close().await;

    let hub = TestHub::start().await;
    hub.join(node.path(), &hub.token("edge-1", false).await).await.unwrap();
    wait_for_link(&edge, State::Live).await;
    stop_edge(edge).await;
    hub.stop().await;
}

#[tokio::test]
async fn a_replaced_node_loses_its_link_and_is_told_why() {
    let hub = TestHub::start().await;
    let (old, new) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    hub.join(old.path(), &hub.token("edge-1", false).await).await.unwrap();
    let edge = start_edge(old.path(), &[]).await;
    wait_for_link(&edge, State::Live).await;

    hub.join(new.path(), &hub.token("edge-1", true).await).await.unwrap();
    wait_for_error(&edge, "refused by the hub: this enrolment was replaced").await;
    stop_edge(edge).await;
    let edge = start_edge(old.path(), &[]).await;
    wait_for_error(&edge, "octobus token create --node edge-1 --replace").await;
    stop_edge(edge).await;
    hub.stop().await;
}

#[tokio::test]
async fn a_hub_that_restarts_keeps_its_nodes_and_their_messages() {
    let hub = TestHub::start().await;
    let node = tempfile::tempdir().unwrap();
    hub.join(node.path(), &hub.token("edge-1", false).await).await.unwrap();
    let tier = hub.hub.tier().to_owned();
    let data = hub.stop().await;

    let hub = TestHub::restart(data).await;
    assert_eq!(hub.hub.tier(), tier);
    let quic = hub.hub.endpoints().quic.unwrap().to_string();
    let edge = start_edge(node.path(), &[("--hub", &quic)]).await;
    wait_for_link(&edge, State::Live).await;
    stop_edge(edge).await;
    hub.stop().await;
}

#[tokio::test]
async fn one_folder_is_one_process() {
    let hub = TestHub::start().await;
    let config =
        super::config(ops::config::Role::Cloud, hub.data.path(), &[("--nats", "off"), ("--metrics", "off")]);
    let second = Box::pin(cloudhub::hub::Hub::start(&config)).await;
    let error = second.expect_err("the folder is locked").to_string();
    assert!(error.contains("in use"), "{error}");
    hub.stop().await;
}
