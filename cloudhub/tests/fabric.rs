//! One body of tests for both implementations of `Fabric`: a hub alone, and replicas on a real nats-server.
#![allow(clippy::unwrap_used)] // what fails in a helper fails the test

#[path = "fabric/claims.rs"]
mod claims;
#[path = "fabric/deleted.rs"]
mod deleted;
#[path = "fabric/setup.rs"]
mod setup;
#[path = "fabric/state.rs"]
mod state;
#[path = "fabric/store.rs"]
mod store;

use std::{
    collections::VecDeque,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use broker::{
    Handle, Tasks, core, driver,
    event::{
        Expect, Group, ReadRequest, StateChange, StateOp,
        tier::{Adoption, Ask, News},
    },
    store::{Recovered, Store, StoreEvent, mem::MemStore},
};
use bytes::Bytes;
use cloudhub::fabric::{
    Fabric, Local,
    nats::{Feed, Identity, Tier},
};
use octobus_tests::servers::NatsServers;
use ops::config::{Config, Role, Sources};

const STOP: Duration = Duration::from_secs(10);

/// One replica, or a hub that is alone.
struct Replica {
    fabric: Arc<dyn Fabric>,
    tier: Option<Tier>,
    broker: Handle,
    tasks: Tasks,
}

impl Replica {
    async fn stop(self) {
        let Self { fabric, tier, broker, tasks } = self;
        drop((fabric, tier, broker));
        tasks.drain(STOP).await;
    }
}

/// A hub alone.
fn alone() -> Replica {
    let tasks = Tasks::new();
    let config = core::Config::hub("hub", "t", [1; 16], 1);
    let broker = driver::start(config, MemStore::auto(), Recovered::default(), &tasks);
    Replica { fabric: Arc::new(Local::new(broker.clone())), tier: None, broker, tasks }
}

fn hub_config(servers: &NatsServers, replica: &str) -> ops::config::fabric::Fabric {
    let (list, password) = (servers.list(), servers.password_file().display().to_string());
    let file =
        format!("[fabric]\nuser = 'octobus'\npassword_file = '{password}'\nshards = 2\nlog_bytes = '1GiB'");
    let flags = vec![("--fabric", list), ("--replica", replica.to_owned())];
    let sources = Sources { file: Some(("octobus.toml".into(), file)), env: Vec::new(), flags };
    Config::resolve(Role::Cloud, sources).unwrap().fabric.unwrap()
}

fn identity() -> Identity {
    Identity { tier: "t".to_owned(), ca_sha256: [7; 32] }
}

/// A replica of a tier.
async fn replica(servers: &NatsServers, name: &str) -> Replica {
    let (tier, feed) = Box::pin(Tier::open(&hub_config(servers, name), &identity())).await.unwrap();
    let tasks = Tasks::new();
    let config = core::Config::replica(name, "t", [1; 16], 1);
    let broker = driver::start(config, Fed { feed, events: VecDeque::new() }, Recovered::default(), &tasks);
    tier.start(&broker, &tasks).await.unwrap();
    Replica { fabric: Arc::new(tier.clone()), tier: Some(tier), broker, tasks }
}

/// A store that hears of the tier, and of which nobody asks more.
struct Fed {
    feed: Feed,
    events: VecDeque<News>,
}

impl Store for Fed {
    fn submit(&mut self, group: Group) {
        self.events.push_back(News::Written { node: group.lane, lsn: group.lsn });
    }

    fn read(&mut self, _request: ReadRequest) {}

    fn ask(&mut self, ask: Ask) {
        if let Ask::Adopt(adopt) = ask {
            let outcome = Ok(Box::new(Adoption::default()));
            self.events.push_back(News::Adopted { session: adopt.session, outcome });
        }
    }

    fn poll_event(&mut self, cx: &mut Context<'_>) -> Poll<StoreEvent> {
        match self.events.pop_front() {
            Some(news) => Poll::Ready(StoreEvent::Tier(news)),
            None => self.feed.poll(cx).map(StoreEvent::Tier),
        }
    }
}

/// Both kinds, one after the other.
async fn both<T>(test: impl AsyncFn(Replica) -> T) {
    test(alone()).await;
    let servers = NatsServers::start(1);
    test(replica(&servers, "hub-1").await).await;
}

fn put(space: &str, key: &str, value: &str, expect: Expect) -> StateOp {
    let change = StateChange::Put(Bytes::copy_from_slice(value.as_bytes()));
    StateOp { space: space.into(), key: key.to_owned(), change, expect }
}

fn delete(space: &str, key: &str, expect: Expect) -> StateOp {
    StateOp { space: space.into(), key: key.to_owned(), change: StateChange::Delete, expect }
}
