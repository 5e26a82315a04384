//! State that the tier owns: compare-and-set, several keys, what is read after a write.

use std::time::Duration;

use broker::event::Expect;
use bytes::Bytes;
use cloudhub::fabric::{Conflict, FabricError, Owner};

use super::{Replica, both, delete, put};

const SYS: &str = "sys";
const FLEET: &str = "fleet";

#[tokio::test]
async fn a_write_happens_where_what_it_expects_is_there_and_nowhere_else() {
    both(async |replica: Replica| {
        let fabric = &replica.fabric;
        let first =
            fabric.write(vec![put(SYS, "identity/a", "1", Expect::Absent)]).await.unwrap().unwrap()[0];
        let taken = fabric.write(vec![put(SYS, "identity/a", "2", Expect::Absent)]).await.unwrap();
        assert_eq!(taken, Err(Conflict { index: 0, found: first }));
        let second = fabric.write(vec![put(SYS, "identity/a", "2", Expect::Revision(first))]).await.unwrap();
        let second = second.unwrap()[0];
        assert!(second > first);
        let late = fabric.write(vec![put(SYS, "identity/a", "3", Expect::Revision(first))]).await.unwrap();
        assert_eq!(late, Err(Conflict { index: 0, found: second }));
        let held = fabric.get(SYS, "identity/a").await.unwrap().unwrap();
        assert_eq!((&held.value[..], held.revision), (&b"2"[..], second));
        let gone = fabric.write(vec![delete(SYS, "identity/a", Expect::Revision(second))]).await.unwrap();
        assert!(gone.unwrap()[0] > second);
        assert_eq!(fabric.get(SYS, "identity/a").await.unwrap(), None);
        let nothing = fabric.write(vec![delete(SYS, "identity/a", Expect::Any)]).await.unwrap();
        assert_eq!(nothing, Ok(vec![0]), "there is nothing to delete");
        let again = fabric.write(vec![put(SYS, "identity/a", "4", Expect::Absent)]).await.unwrap();
        assert!(again.unwrap()[0] > second, "deleted is absent, and revisions go on");
        let gone = fabric.write(vec![put(SYS, "identity/b", "1", Expect::Revision(second))]).await.unwrap();
        assert_eq!(gone, Err(Conflict { index: 0, found: 0 }));
        replica.stop().await;
    })
    .await;
}

#[tokio::test]
async fn what_was_written_is_seen_by_the_same_replica_at_once() {
    both(async |replica: Replica| {
        let fabric = &replica.fabric;
        for number in 0..20_u32 {
            let (sys, fleet) = (format!("token/{number:02}"), format!("obj/core/pods/ns/p{number:02}"));
            let ops = vec![put(SYS, &sys, "t", Expect::Any), put(FLEET, &fleet, "p", Expect::Any)];
            fabric.write(ops).await.unwrap().unwrap();
            assert!(fabric.peek(SYS, &sys).await.unwrap().is_some());
            assert!(fabric.peek(FLEET, &fleet).await.unwrap().is_some());
        }
        let keys = |entries: Vec<cloudhub::fabric::Entry>| {
            entries.into_iter().map(|entry| entry.key).collect::<Vec<_>>()
        };
        let page = keys(fabric.list(SYS, "token/", Some("token/03"), 3).await.unwrap());
        assert_eq!(page, ["token/04", "token/05", "token/06"]);
        let page = keys(fabric.list(FLEET, "obj/core/pods/ns/p1", None, 100).await.unwrap());
        assert_eq!(page.len(), 10);
        assert!(fabric.barrier().await.unwrap() > 0);
        assert!(fabric.peek(FLEET, "barrier").await.unwrap().is_some());
        replica.stop().await;
    })
    .await;
}

#[tokio::test]
async fn what_no_write_may_hold_is_refused_before_anything_is_written() {
    both(async |replica: Replica| {
        let fabric = &replica.fabric;
        let bad =
            [put(SYS, "token/a+", "t", Expect::Any), put(FLEET, "want/a", "\u{1}\u{1}\u{1}", Expect::Any)];
        for bad in bad {
            let refused = fabric.write(vec![put(SYS, "token/good", "t", Expect::Any), bad]).await;
            assert!(matches!(refused, Err(FabricError::Refused(_))), "{refused:?}");
            assert_eq!(fabric.get(SYS, "token/good").await.unwrap(), None);
        }
        replica.stop().await;
    })
    .await;
}

#[tokio::test]
async fn a_node_that_is_not_there_is_nobodys_and_gets_no_message() {
    both(async |replica: Replica| {
        let fabric = &replica.fabric;
        assert_eq!(fabric.owner("edge-1").await.unwrap(), Owner::Nobody);
        let frame = codec::frame::FrameParts { topic: "a", ..Default::default() }.encode();
        let refused = fabric.append_down("edge-1", frame.clone()).await;
        assert!(matches!(refused, Err(FabricError::Refused(_))), "{refused:?}");
        fabric.write(vec![put(SYS, "identity/edge-1", "{}", Expect::Any)]).await.unwrap().unwrap();
        tokio::time::timeout(Duration::from_secs(5), fabric.append_down("edge-1", frame))
            .await
            .unwrap()
            .unwrap();
        replica.stop().await;
    })
    .await;
}

#[tokio::test]
async fn a_value_as_large_as_any_is_written() {
    both(async |replica: Replica| {
        let large = Bytes::from(vec![b'x'; broker::limits::STATE_VALUE_MAX]);
        let text = String::from_utf8(large.to_vec()).unwrap();
        let op = put(FLEET, "obj/core/secrets/ns/large", &text, Expect::Absent);
        replica.fabric.write(vec![op]).await.unwrap().unwrap();
        let held = replica.fabric.get(FLEET, "obj/core/secrets/ns/large").await.unwrap().unwrap();
        assert_eq!(held.value, large);
        replica.stop().await;
    })
    .await;
}
