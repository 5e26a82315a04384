//! Streams through another replica, which has the node: real QUIC between the two.

use super::{
    quic::{Ca, PATIENCE},
    *,
};
use crate::{
    link::{
        accept::{Acceptor, Admission},
        quic::{QuicDialler, QuicListener, Shape},
        replicas::Replicas,
        stream::{OpenError, StreamCode},
        tls::{self, TierSecret},
    },
    tasks::Tasks,
};

const HAS: &str = "octobus://tier-1/hub/r0";
const ASKED: &str = "octobus://tier-1/hub/r1";

/// Replica r0, which has node `peer`; and the way of r1 to it.
struct Pair {
    node: Broker,
    /// The link of r0 to the node.
    _link: Kept,
    address: String,
    serving: Tasks,
    replicas: Replicas,
    _tasks: Tasks,
}

/// What keeps a link over memory up.
type Kept = (Broker, mem::Network, JoinSet<(&'static str, Ended)>);

async fn pair() -> Pair {
    let Two { node, hub, network, tasks: ends } = two().await;
    let (ca, secret) = (Ca::new(), TierSecret::new(&[5; 32]));
    let tls = Arc::new(tls::acceptor(ca.issue(HAS), &secret).unwrap());
    let listener = QuicListener::bind("127.0.0.1:0".parse().unwrap(), tls, &secret, Shape::HUB).unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let (serving, tasks) = (Tasks::new(), Tasks::new());
    let acceptor = Acceptor {
        broker: hub.handle.clone(),
        params: Arc::default(),
        admission: Admission::default(),
        counters: Arc::default(),
        links: Arc::clone(&hub.links),
        tasks: serving.clone(),
    };
    serving.spawn("accept", acceptor.run(listener, |_certificate| async { Ok(()) }));
    let tls = Arc::new(tls::dialler(ca.issue(ASKED), "tier-1").unwrap());
    let dialler = QuicDialler::new(tls, Shape::HUB).unwrap();
    let replicas = Replicas::new(dialler, Arc::default(), tasks.clone());
    Pair { node, _link: (hub, network, ends), address, serving, replicas, _tasks: tasks }
}

impl Pair {
    async fn open(&self, node: &str, kind: &str) -> Result<ByteStream, OpenError> {
        let open = proto::StreamOpen { kind: kind.into(), target: "pod/x".into(), ..Default::default() };
        let opening = self.replicas.open("r0", &self.address, node, &open);
        tokio::time::timeout(PATIENCE, opening).await.unwrap()
    }
}

#[tokio::test]
async fn a_stream_goes_through_the_replica_that_has_the_node_and_ends_by_itself_each_way() {
    let pair = pair().await;
    let mut taken = pair.node.links.accept("kubelet", 4);
    let (ours, theirs) = tokio::join!(pair.open("peer", "kubelet"), async {
        let incoming = taken.recv().await.unwrap();
        assert_eq!((&*incoming.open.target, incoming.open.headers.len()), ("pod/x", 0), "as it was opened");
        incoming.accept().await.unwrap()
    });
    let (mut ours, mut theirs) = (ours.unwrap(), theirs);
    let sent = vec![7; 3 << 20];
    let ((), got) = tokio::join!(
        async {
            ours.write_all(&sent).await.unwrap();
            ours.shutdown().await.unwrap();
        },
        async {
            let mut got = Vec::new();
            theirs.read_to_end(&mut got).await.unwrap();
            got.len()
        }
    );
    assert_eq!(got, sent.len());
    // The other direction is still open.
    theirs.write_all(b"goodbye").await.unwrap();
    theirs.shutdown().await.unwrap();
    let mut back = Vec::new();
    ours.read_to_end(&mut back).await.unwrap();
    assert_eq!(back, b"goodbye");
}

#[tokio::test]
async fn refusals_and_resets_keep_their_codes() {
    let pair = pair().await;
    let refused = pair.open("peer", "unheard-of").await.unwrap_err();
    assert!(matches!(refused, OpenError::Refused { code: StreamCode::UNKNOWN_KIND, .. }), "{refused}");
    assert_eq!(pair.open("edge-9", "kubelet").await.unwrap_err(), OpenError::NoLink("edge-9".into()));

    let mut taken = pair.node.links.accept("kubelet", 4);
    let (ours, theirs) = tokio::join!(pair.open("peer", "kubelet"), async {
        taken.recv().await.unwrap().accept().await.unwrap()
    });
    theirs.reset(StreamCode::NOT_FOUND);
    let error = ours.unwrap().read_u8().await.unwrap_err();
    assert_eq!(StreamCode::of(&error), Some(StreamCode::NOT_FOUND));
}

#[tokio::test]
async fn what_a_replica_passes_on_goes_to_nodes_alone() {
    let pair = pair().await;
    // r0 itself stands in the links of its node, not in its own: and a hub there would not count.
    assert_eq!(pair.open("r0", stream::ECHO).await.unwrap_err(), OpenError::NoLink("r0".into()));
    let wrong = pair.replicas.open("r2", &pair.address, "peer", &proto::StreamOpen::default()).await;
    assert!(
        matches!(&wrong, Err(OpenError::Replica { why, .. }) if why.contains("is replica r0")),
        "{wrong:?}"
    );
}

#[tokio::test]
async fn more_streams_than_one_connection_carries_find_another() {
    let pair = pair().await;
    let mut echoes = Vec::new();
    for _ in 0..20 {
        echoes.push(pair.open("peer", stream::ECHO).await.unwrap());
    }
    for echo in &mut echoes {
        echo.write_u8(7).await.unwrap();
        assert_eq!(echo.read_u8().await.unwrap(), 7);
    }
}

#[tokio::test]
async fn a_replica_that_ends_breaks_its_streams_and_nothing_looks_complete() {
    let pair = pair().await;
    let mut echo = pair.open("peer", stream::ECHO).await.unwrap();
    echo.write_u8(7).await.unwrap();
    assert_eq!(echo.read_u8().await.unwrap(), 7);
    pair.serving.drain(5 * SECOND).await;
    tokio::time::timeout(PATIENCE, echo.read_u8()).await.unwrap().unwrap_err();
    let gone = pair.open("peer", stream::ECHO).await.unwrap_err();
    assert!(matches!(gone, OpenError::Replica { .. } | OpenError::LinkGone), "{gone}");
}
