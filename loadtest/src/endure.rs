//! A fleet that goes on while others kill its hubs: what was promised holds in the end, and State never goes back.

use std::time::Duration;

use ops::{
    api::{self, WriteOp, Written},
    client::Client,
};
use tokio::time::{Instant, timeout};

use crate::{
    director::{RunError, Running},
    mark::Mark,
    pki,
    wire::Order,
};

/// A hub that does not answer within this is not waited for.
const ANSWER: Duration = Duration::from_secs(5);
/// Keys of one request where each may take a round trip of its own.
const WRITTEN_AT_ONCE: usize = 100;
/// One change in so many is of the object that all nodes want.
const SHARED_EVERY: u32 = 10;

/// What is written: the number of each object's newest value.
#[derive(Debug)]
struct Objects {
    shared: u32,
    own: Vec<u32>,
}

/// Which object: the one that all want, or a node's own.
#[derive(Debug, Clone, Copy)]
enum Object {
    Shared,
    Own(u32),
}

impl Running {
    /// Nodes publish and State changes for as long as the scenario says; then everything has to arrive.
    pub(crate) async fn endure(&mut self) -> Result<(), RunError> {
        if self.admins.is_empty() {
            return Err(RunError::Needs("endure", "hubs' administration sockets: --admin"));
        }
        let mut objects = Objects { shared: 0, own: vec![0; self.nodes as usize] };
        let wants = (0..self.nodes).map(|place| self.want(place)).collect();
        self.write_until_taken(wants).await?;
        let publish = Order::Publish { per_s: self.scenario.per_s, size: self.scenario.size };
        self.workers.order(&publish).await?;
        let began = Instant::now();
        let (mut turn, mut written, mut refused) = (0_u32, 0_u64, 0_u64);
        while began.elapsed() < self.scenario.hold {
            let due = began.elapsed().as_secs_f64() * self.scenario.changes_per_s;
            if f64::from(turn) >= due {
                self.look("watched", self.scenario.hold.as_secs(), |_counts| began.elapsed().as_secs())
                    .await?;
                continue;
            }
            let object = match turn % SHARED_EVERY {
                0 => Object::Shared,
                _ => Object::Own(turn % self.nodes),
            };
            turn += 1;
            let change = vec![self.value(object, objects.next(object))];
            match self.write_once(&change).await {
                true => written += 1,
                false => refused += 1,
            }
        }
        self.workers.order(&Order::Publish { per_s: 0.0, size: 0 }).await?;
        self.report.hold_s = began.elapsed().as_secs_f64();
        (self.report.changes_written, self.report.changes_refused) = (Some(written), Some(refused));

        let all = (0..self.nodes).map(Object::Own).chain([Object::Shared]);
        let last = all.map(|object| self.value(object, objects.next(object))).collect();
        self.write_until_taken(last).await?;
        let nodes = u64::from(self.nodes);
        if !self.until("linked", nodes, |counts| counts.connected).await? {
            let connected = self.workers.counts().connected;
            self.report.violations.push(format!("{connected} of {nodes} nodes are linked in the end"));
        }
        self.state_is_equal(&objects).await?;
        self.all_arrived().await
    }

    /// Every node has the newest value of both its objects, and no key ever went back.
    async fn state_is_equal(&mut self, objects: &Objects) -> Result<(), RunError> {
        let began = Instant::now();
        loop {
            let numbers = self.workers.numbers().await?;
            let held = numbers.iter().flat_map(|numbers| &numbers.held);
            let equal = held.zip(&objects.own).filter(|(held, own)| held[..] == [objects.shared, **own]);
            let behind = u64::from(self.nodes) - equal.count() as u64;
            let backwards = self.workers.counts().backwards;
            (self.report.behind, self.report.backwards) = (Some(behind), Some(backwards));
            if behind > 0 && began.elapsed() < self.scenario.patience {
                let nodes = u64::from(self.nodes);
                self.look("equal", nodes, |_counts| nodes - behind).await?;
                continue;
            }
            for (count, what) in
                [(behind, "nodes do not have the last State"), (backwards, "times State went backwards")]
            {
                if count > 0 {
                    self.report.violations.push(format!("{count} {what}"));
                }
            }
            return Ok(());
        }
    }

    fn name(&self, place: u32) -> String {
        pki::name(&self.prefix, self.first + place)
    }

    fn key(&self, object: Object) -> String {
        match object {
            Object::Shared => format!("obj/core/configmaps/loadtest/{}-shared", self.prefix),
            Object::Own(place) => format!("obj/core/configmaps/loadtest/{}", self.name(place)),
        }
    }

    fn want(&self, place: u32) -> WriteOp {
        let keys = vec![self.key(Object::Shared), self.key(Object::Own(place))];
        let want = codec::encode(&codec::proto::Want { keys });
        put(format!("want/{}", self.name(place)), &want)
    }

    fn value(&self, object: Object, number: u32) -> WriteOp {
        let node = match object {
            Object::Shared => u32::MAX,
            Object::Own(place) => self.first + place,
        };
        let value = Mark::now(self.run, node, number).payload(self.scenario.size as usize);
        put(self.key(object), &value)
    }

    /// Writes at the first hub that takes it; false if none does.
    async fn write_once(&self, ops: &Vec<WriteOp>) -> bool {
        for admin in &self.admins {
            let client = Client::new(admin);
            let answer = timeout(ANSWER, client.post_json::<Written>("/v1/state", ops)).await;
            if let Ok(Ok(_written)) = answer {
                return true;
            }
        }
        false
    }

    /// Writes all, some at a time, each as often as it takes.
    async fn write_until_taken(&mut self, ops: Vec<WriteOp>) -> Result<(), RunError> {
        let (count, mut done) = (ops.len() as u64, 0);
        let mut ops = ops.into_iter().peekable();
        while ops.peek().is_some() {
            let some: Vec<WriteOp> = ops.by_ref().take(WRITTEN_AT_ONCE).collect();
            let began = Instant::now();
            while !self.write_once(&some).await {
                if began.elapsed() > self.scenario.patience {
                    return Err(RunError::NotWritten);
                }
                self.look("written", count, |_counts| done).await?;
            }
            done += some.len() as u64;
            self.look("written", count, |_counts| done).await?;
        }
        Ok(())
    }
}

impl Objects {
    /// The number of an object's next value, counted from 1.
    fn next(&mut self, object: Object) -> u32 {
        let number = match object {
            Object::Shared => &mut self.shared,
            Object::Own(place) => &mut self.own[place as usize],
        };
        *number += 1;
        *number
    }
}

fn put(key: String, value: &[u8]) -> WriteOp {
    WriteOp {
        space: "fleet".to_owned(),
        key,
        value: Some(api::base64(value)),
        delete: false,
        revision: None,
        absent: false,
    }
}
