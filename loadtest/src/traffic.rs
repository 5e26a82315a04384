//! The scenarios that carry messages and State.

use std::{io, net::SocketAddr, time::Duration};

use broker::{Tasks, clock};
use hdrhistogram::Histogram;
use ops::{
    api::{self, WriteOp, Written},
    client::Client,
};
use tokio::{
    sync::{mpsc, oneshot},
    time::{Instant, timeout},
};

use crate::{
    director::{RunError, Running},
    mark::{ACK, DOWN, Mark, UP},
    nats::{self, Publisher, Said, Subscriber},
    pki,
    report::{merged, quantiles},
    wire::{Order, histogram},
};

/// Keys written with one request.
const WRITTEN_AT_ONCE: usize = 1000;
/// How long stop-and-wait is measured: each message takes a round trip.
const ONE_IN_FLIGHT: Duration = Duration::from_secs(5);
/// Longest wait for the answer to one message.
const ANSWER: Duration = Duration::from_secs(10);
/// Answers that wait for the director.
const ANSWERS_WAITING: usize = 16;

impl Running {
    /// Nodes publish, all arrives; how long it takes to a subscriber.
    pub(crate) async fn telemetry(&mut self) -> Result<(), RunError> {
        let tasks = Tasks::new();
        let listening = match self.nats {
            Some(nats) => Some(listen(nats, self.run, &tasks).await.map_err(RunError::Nats)?),
            None => None,
        };
        let began = Instant::now();
        let publish = Order::Publish { per_s: self.scenario.per_s, size: self.scenario.size };
        self.workers.order(&publish).await?;
        self.wait(self.scenario.hold).await?;
        self.workers.order(&Order::Publish { per_s: 0.0, size: 0 }).await?;
        self.report.hold_s = began.elapsed().as_secs_f64();
        self.all_arrived().await?;
        tasks.drain(Duration::from_secs(5)).await;
        if let Some(times) = listening {
            let times = times.await.unwrap_or_else(|_ended| histogram());
            (self.report.message_p50_us, self.report.message_p99_us) = quantiles(&times);
        }
        self.nobody_was_lost();
        Ok(())
    }

    /// An object that all want, then one for each, so many times.
    pub(crate) async fn fan_out(&mut self) -> Result<(), RunError> {
        let Some(admin) = self.admins.first().cloned() else {
            return Err(RunError::Needs("fan-out", "a hub's administration socket: --admin"));
        };
        let (admin, nodes) = (Client::new(&admin), u64::from(self.nodes));
        let object = |name: &str| format!("obj/core/configmaps/loadtest/{name}");
        let shared = object(&format!("{}-shared", self.prefix));
        let all: Vec<String> = (0..self.nodes).map(|n| pki::name(&self.prefix, self.first + n)).collect();
        let wants = all.iter().map(|node| {
            let keys = vec![shared.clone(), object(node)];
            let want = codec::encode(&codec::proto::Want { keys });
            (format!("want/{node}"), want.to_vec())
        });
        self.write(&admin, wants).await?;
        self.workers.order(&Order::Forget).await?;
        let (run, size) = (self.run, self.scenario.size as usize);
        let began = Instant::now();
        for time in 0..self.scenario.times {
            let before = self.workers.counts().changes;
            let value = Mark::now(run, u32::MAX, time).payload(size).to_vec();
            self.write(&admin, std::iter::once((shared.clone(), value))).await?;
            let one = self.until("shared", before + nodes, |counts| counts.changes).await?;
            let own = all
                .iter()
                .zip(0..)
                .map(|(node, number)| (object(node), Mark::now(run, number, time).payload(size).to_vec()));
            self.write(&admin, own).await?;
            let each = self.until("own", before + 2 * nodes, |counts| counts.changes).await?;
            if !one || !each {
                let arrived = self.workers.counts().changes - before;
                let violation = format!("{arrived} of {} changes arrived in time", 2 * nodes);
                self.report.violations.push(violation);
            }
        }
        self.report.hold_s = began.elapsed().as_secs_f64();
        let numbers = self.workers.numbers().await?;
        let times = merged(numbers.iter().map(|numbers| &numbers.change));
        (self.report.change_p50_us, self.report.change_p99_us) = quantiles(&times);
        self.nobody_was_lost();
        Ok(())
    }

    /// Writes keys of `fleet`; values are made when their request is.
    async fn write(
        &mut self,
        admin: &Client,
        entries: impl Iterator<Item = (String, Vec<u8>)>,
    ) -> Result<(), RunError> {
        let mut entries = entries.peekable();
        while entries.peek().is_some() {
            let op = |(key, value): (String, Vec<u8>)| WriteOp {
                space: "fleet".to_owned(),
                key,
                value: Some(api::base64(&value)),
                delete: false,
                revision: None,
                absent: false,
            };
            let ops: Vec<WriteOp> = entries.by_ref().take(WRITTEN_AT_ONCE).map(op).collect();
            let _written: Written = admin.post_json("/v1/state", &ops).await?;
        }
        Ok(())
    }

    /// Messages to one node over the long line: as many as windows permit, then one at a time.
    pub(crate) async fn downlink(&mut self) -> Result<(), RunError> {
        let Some(nats) = self.nats else {
            return Err(RunError::Needs("downlink", "a hub's NATS front: --nats"));
        };
        let (node, run) = (pki::name(&self.prefix, self.first), self.run);
        let (down, size) = (format!("octobus.down.{node}.{}", DOWN.replace('/', ".")), self.scenario.size);
        let size = size as usize;
        let (mut publisher, mut subscriber) = nats::connect(nats).await.map_err(RunError::Nats)?;
        let (began_us, messages) = (clock::wall_us(), self.scenario.messages);
        for number in 0..messages {
            let payload = Mark::now(run, self.first, number).payload(size);
            publisher.publish(&down, &payload).await.map_err(RunError::Nats)?;
        }
        let all = self.until("messages", messages.into(), |counts| counts.downs).await?;
        let numbers = self.workers.numbers().await?;
        let last_us = numbers.iter().map(|numbers| numbers.last_down_us).max().unwrap_or_default();
        // The last one's acknowledgement has half of the line before it.
        let took = Duration::from_micros(last_us.saturating_sub(began_us)) + self.scenario.round_trip / 2;
        let counts = self.workers.counts();
        self.report.windows_per_s = Some(counts.downs as f64 / took.as_secs_f64());
        if !all || counts.downs != u64::from(messages) || counts.downs_disordered > 0 {
            self.report.violations.push(format!(
                "{} of {messages} messages arrived at the node, {} of them out of order",
                counts.downs, counts.downs_disordered
            ));
        }

        self.workers.order(&Order::Answer).await?;
        let (sender, mut answers) = mpsc::channel(ANSWERS_WAITING);
        publisher
            .subscribe(&format!("octobus.up.{node}.{}", ACK.replace('/', ".")))
            .await
            .map_err(RunError::Nats)?;
        let tasks = Tasks::new();
        let stop = tasks.stopped();
        tasks.spawn("answers", async move {
            loop {
                let said = tokio::select! {
                    () = stop.cancelled() => return,
                    said = subscriber.next() => said,
                };
                let Ok(said) = said else { return };
                let Said::Message(payload) = said else { continue };
                let mark = Mark::of(&payload, run);
                if let Some(mark) = mark
                    && sender.send(mark).await.is_err()
                {
                    return;
                }
            }
        });
        let (began, mut number) = (Instant::now(), messages);
        while began.elapsed() < ONE_IN_FLIGHT {
            let payload = Mark::now(run, self.first, number).payload(size);
            publisher.publish(&down, &payload).await.map_err(RunError::Nats)?;
            let answered = async { while answers.recv().await.is_some_and(|mark| mark.number != number) {} };
            if timeout(ANSWER, answered).await.is_err() {
                self.report.violations.push("a message was not answered".to_owned());
                break;
            }
            number += 1;
            self.workers.listen(Instant::now()).await?;
        }
        let one = f64::from(number - messages) / began.elapsed().as_secs_f64();
        self.report.one_in_flight_per_s = Some(one);
        tasks.drain(Duration::from_secs(1)).await;
        Ok(())
    }
}

/// Listens to what nodes publish until `tasks` stop; then tells how long it took from the node to here.
async fn listen(nats: SocketAddr, run: u64, tasks: &Tasks) -> io::Result<oneshot::Receiver<Histogram<u64>>> {
    let (mut publisher, mut subscriber) = nats::connect(nats).await?;
    publisher.subscribe(&format!("octobus.up.*.{}", UP.replace('/', "."))).await?;
    publisher.ping().await?;
    while subscriber.next().await? != Said::Pong {}
    let (told, times) = oneshot::channel();
    let stop = tasks.stopped();
    tasks.spawn("subscriber", async move {
        let mut times = histogram();
        tokio::select! {
            biased;
            () = stop.cancelled() => {}
            () = hear(&mut publisher, &mut subscriber, run, &mut times) => {}
        }
        drop(told.send(times));
    });
    Ok(times)
}

async fn hear(publisher: &mut Publisher, subscriber: &mut Subscriber, run: u64, times: &mut Histogram<u64>) {
    while let Ok(said) = subscriber.next().await {
        let payload = match said {
            Said::Message(payload) => payload,
            Said::Ping if publisher.pong().await.is_ok() => continue,
            Said::Ping => return,
            Said::Pong => continue,
        };
        if let Some(mark) = Mark::of(&payload, run) {
            times.saturating_record(clock::wall_us().saturating_sub(mark.time_us).max(1));
        }
    }
}
