//! Who has which node, among replicas on one real nats-server.

use std::{sync::atomic::Ordering, time::Duration};

use broker::event::tier::News;
use cloudhub::fabric::nats::{
    Feed,
    claims::{Claimant, Claims, Owner},
    connection::Connection,
};
use octobus_tests::servers::NatsServers;

use super::{Replica, replica};

const SOON: Duration = Duration::from_secs(5);

fn claimant<'a>(node: &'a str, instance: &'a [u8; 16], stamp: u64) -> Claimant<'a> {
    Claimant { node, instance, generation: 1, stamp }
}

fn claims(replica: &Replica) -> Claims {
    replica.tier.as_ref().unwrap().claims().clone()
}

async fn until(what: &str, done: impl Fn() -> bool) {
    let waited = tokio::time::timeout(SOON, async {
        while !done() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    waited.await.unwrap_or_else(|_| panic!("{what} did not happen within {SOON:?}"));
}

#[tokio::test]
async fn the_newest_session_of_an_instance_fences_the_older_wherever_it_is() {
    let servers = NatsServers::start(1);
    let (a, b) = (replica(&servers, "hub-a").await, replica(&servers, "hub-b").await);
    let (a_claims, b_claims) = (claims(&a), claims(&b));
    let older = a_claims.claim(claimant("edge-1", &[1; 16], 10)).await.unwrap();
    assert!(a_claims.holds("edge-1", older));
    assert_eq!(a_claims.owner("edge-1"), Owner::Here);
    until("b learning who has the node", || b_claims.owner("edge-1") == Owner::Replica("hub-a".into())).await;
    let newer = b_claims.claim(claimant("edge-1", &[1; 16], 11)).await.unwrap();
    assert!(newer.session > older.session);
    until("the fence", || !a_claims.holds("edge-1", older)).await;
    assert_eq!(a_claims.counters().fenced.load(Ordering::Relaxed), 1);
    // What was dialled before comes too late.
    let late = a_claims.claim(claimant("edge-1", &[1; 16], 10)).await.unwrap_err();
    assert_eq!(late.reason(), codec::proto::RefusalReason::Fenced);
    assert!(b_claims.holds("edge-1", newer));
    a.stop().await;
    b.stop().await;
}

#[tokio::test]
async fn a_second_instance_of_one_generation_waits_until_the_first_is_really_gone() {
    let servers = NatsServers::start(1);
    let (a, b) = (replica(&servers, "hub-a").await, replica(&servers, "hub-b").await);
    let (a_claims, b_claims) = (claims(&a), claims(&b));
    let held = a_claims.claim(claimant("edge-1", &[1; 16], 0)).await.unwrap();
    let refused = b_claims.claim(claimant("edge-1", &[2; 16], 0)).await.unwrap_err();
    assert_eq!(refused.reason(), codec::proto::RefusalReason::DuplicateIdentity);
    assert!(refused.retry_after_ms > 0);
    a_claims.release("edge-1", held).await;
    assert_eq!(a_claims.owner("edge-1"), Owner::Nobody);
    let refused = b_claims.claim(claimant("edge-1", &[2; 16], 0)).await.unwrap_err();
    assert_eq!(refused.reason(), codec::proto::RefusalReason::DuplicateIdentity, "it left a moment ago");
    // The same instance need not wait, and a newer generation neither.
    b_claims.claim(claimant("edge-1", &[1; 16], 0)).await.unwrap();
    let replaced = Claimant { generation: 2, ..claimant("edge-1", &[2; 16], 0) };
    a_claims.claim(replaced).await.unwrap();
    a.stop().await;
    b.stop().await;
}

#[tokio::test]
async fn a_connect_costs_one_operation_of_claims_and_never_an_api_request() {
    let servers = NatsServers::start(1);
    let a = replica(&servers, "hub-a").await;
    let claims = claims(&a);
    let before = claims.counters().operations.load(Ordering::Relaxed);
    let names: Vec<String> = (0..50).map(|number| format!("edge-{number}")).collect();
    for round in 0..2 {
        for name in &names {
            claims.claim(claimant(name, &[1; 16], round + 1)).await.unwrap();
        }
    }
    let operations = claims.counters().operations.load(Ordering::Relaxed) - before;
    assert_eq!(operations, 100, "one compare-and-set each");
    assert_eq!(claims.count(), 50);
    a.stop().await;
}

#[tokio::test]
async fn a_replica_that_cannot_renew_its_lease_lets_go_of_its_nodes_before_others_may_take_them() {
    let mut servers = NatsServers::start(1);
    let config = super::hub_config(&servers, "hub-a");
    let (tier, mut feed) =
        Box::pin(cloudhub::fabric::nats::Tier::open(&config, &super::identity())).await.unwrap();
    tier.claims().begin().await.unwrap();
    let held = tier.claims().claim(claimant("edge-1", &[1; 16], 0)).await.unwrap();
    let stop = tokio_util::sync::CancellationToken::new();
    let keeping = {
        let (claims, stop) = (tier.claims().clone(), stop.clone());
        let tasks = broker::Tasks::new();
        tasks.spawn("lease", async move { claims.keep_lease(stop).await });
        tasks
    };
    servers.kill(0);
    let began = tokio::time::Instant::now();
    let told = std::future::poll_fn(|cx| feed.poll(cx)).await;
    assert!(matches!(told, News::Fenced { node, .. } if &*node == "edge-1"));
    let took = began.elapsed();
    assert!(took < cloudhub::fabric::nats::claims::DEAD_AFTER, "{took:?}: others take its nodes by then");
    assert!(!tier.claims().holds("edge-1", held));
    assert!(tier.claims().claim(claimant("edge-2", &[1; 16], 0)).await.is_err(), "it takes none either");
    // The servers are back: so is the replica.
    servers.run(0);
    let limit = tokio::time::Instant::now() + 3 * SOON;
    while tier.claims().claim(claimant("edge-1", &[1; 16], 0)).await.is_err() {
        assert!(tokio::time::Instant::now() < limit, "it never takes a node again");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    stop.cancel();
    keeping.drain(SOON).await;
}

#[tokio::test]
async fn a_message_that_was_appended_for_a_node_is_told_to_every_replica() {
    let servers = NatsServers::start(1);
    let config = super::hub_config(&servers, "hub-a");
    let (tier, feed) =
        Box::pin(cloudhub::fabric::nats::Tier::open(&config, &super::identity())).await.unwrap();
    let (connection, mut feed): (Connection, Feed) = (tier.connection().clone(), feed);
    let tasks = broker::Tasks::new();
    let mirror = tier.mirror().clone();
    tasks.spawn("down log", async move { mirror.run_downlog().await });
    let frame = codec::frame::FrameParts { topic: "a", ..Default::default() }.encode();
    // Following begins with what comes after it began.
    let arrived = async {
        loop {
            let append = cloudhub::fabric::nats::live::append_down(&connection, "plant.1", frame.clone());
            append.await.unwrap();
            let told = std::future::poll_fn(|cx| feed.poll(cx));
            if let Ok(News::Arrived { node, down }) =
                tokio::time::timeout(Duration::from_millis(300), told).await
            {
                return (node, down.last);
            }
        }
    };
    let (node, seq) = tokio::time::timeout(SOON, arrived).await.unwrap();
    assert_eq!((&*node, seq > 0), ("plant.1", true));
}
