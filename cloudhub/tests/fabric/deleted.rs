//! Buckets and streams that are deleted under running replicas: nothing is removed by that, and it is repaired.

use std::time::Duration;

use broker::event::{Command, Expect, Response};
use cloudhub::fabric::nats::names::Bucket;
use octobus_tests::servers::NatsServers;

use cloudhub::fabric::Owner;

use super::{Replica, put, replica};

const SOON: Duration = Duration::from_secs(15);

async fn delete_bucket(replica: &Replica, bucket: Bucket) {
    let connection = replica.tier.as_ref().unwrap().connection();
    let path = format!("STREAM.DELETE.{}", bucket.stream());
    let answer: serde_json::Value = connection.ask(&path, &serde_json::json!({})).await.unwrap();
    assert_eq!(answer["success"], true, "{answer}");
}

async fn until(what: &str, done: impl AsyncFn() -> bool) {
    let waited = tokio::time::timeout(SOON, async {
        while !done().await {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    });
    waited.await.unwrap_or_else(|_| panic!("{what} did not happen within {SOON:?}"));
}

#[tokio::test]
async fn a_bucket_that_is_deleted_under_replicas_is_made_anew_with_what_they_hold() {
    let servers = NatsServers::start(1);
    let (a, b) = (replica(&servers, "hub-a").await, replica(&servers, "hub-b").await);
    let before = a.tier.as_ref().unwrap().mirror().reached("fleet").incarnation;
    for number in 0..300_u32 {
        let op = put("fleet", &format!("obj/core/pods/ns/p{number}"), "spec", Expect::Absent);
        a.fabric.write(vec![op]).await.unwrap().unwrap();
    }
    a.fabric.barrier().await.unwrap();
    delete_bucket(&a, Bucket::Fleet).await;
    for replica in [&a, &b] {
        let mirror = replica.tier.as_ref().unwrap().mirror().clone();
        until("a new incarnation with its barrier", async || {
            let complete = mirror.reached("fleet");
            let barrier = replica.fabric.peek("fleet", "barrier").await.unwrap();
            complete.incarnation > before && complete.complete && barrier.is_some()
        })
        .await;
        let held = replica.fabric.list("fleet", "obj/", None, 1_000).await.unwrap();
        assert_eq!(held.len(), 300, "nothing was lost by it");
        until("the condition to go", async || {
            let Response::Conditions(now) = replica.broker.call(Command::Conditions).await.unwrap() else {
                panic!("conditions");
            };
            !now.iter().any(|condition| condition.kind == "TierBucket")
        })
        .await;
    }
    a.stop().await;
    b.stop().await;
}

#[tokio::test]
async fn identities_tokens_and_claims_outlive_the_bucket_that_held_them() {
    let servers = NatsServers::start(1);
    let (a, b) = (replica(&servers, "hub-a").await, replica(&servers, "hub-b").await);
    let write = vec![
        put("sys", "identity/edge-1", "{}", Expect::Absent),
        put("sys", "token/t", "{}", Expect::Absent),
    ];
    a.fabric.write(write).await.unwrap().unwrap();
    let claims = a.tier.as_ref().unwrap().claims().clone();
    let claimant = cloudhub::fabric::nats::claims::Claimant {
        node: "edge-1",
        instance: &[1; 16],
        generation: 1,
        stamp: 0,
    };
    let held = claims.claim(claimant).await.unwrap();
    until("b seeing all of it", async || {
        b.fabric.peek("sys", "token/t").await.unwrap().is_some()
            && matches!(b.fabric.owner("edge-1").await.unwrap(), Owner::Elsewhere { .. })
    })
    .await;
    delete_bucket(&b, Bucket::Sys).await;
    until("the bucket with all that it held", async || {
        let get = async |key: &str| b.fabric.get("sys", key).await.ok().flatten().is_some();
        get("identity/edge-1").await
            && get("token/t").await
            && get("claims/edge-1").await
            && get("tier").await
    })
    .await;
    assert!(claims.holds("edge-1", held), "whoever had a node has it still");
    until("b seeing who has the node", async || {
        matches!(b.fabric.owner("edge-1").await.unwrap(), Owner::Elsewhere { .. })
    })
    .await;
    a.stop().await;
    b.stop().await;
}
