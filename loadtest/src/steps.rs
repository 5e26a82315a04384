//! What each scenario does once its nodes may dial.

use std::{collections::HashMap, path::Path, time::Duration};

use hdrhistogram::Histogram;
use ops::client::Client;
use tokio::time::Instant;

use crate::{
    check::{self, Found},
    director::{RunError, Running, Sample},
    pki, process,
    report::{Cpu, merged, quantiles},
    scenario::Kind,
    tier::{self, Servers},
    wire::{Counts, Numbers, Order},
};

/// How often a run is looked at.
pub(crate) const LOOK: Duration = Duration::from_millis(100);

/// What a process has used.
#[derive(Debug, Clone, Copy)]
struct Used {
    what: &'static str,
    pid: u32,
    cpu: Duration,
}

impl Running {
    /// The whole scenario; what it found is in the report.
    pub(crate) async fn all(&mut self) -> Result<(), RunError> {
        let before = self.cpu();
        self.ramp().await?;
        let linked = self.cpu();
        match self.scenario.kind {
            Kind::Connect | Kind::Steady => self.hold().await?,
            Kind::Telemetry => Box::pin(self.telemetry()).await?,
            Kind::FanOut => self.fan_out().await?,
            Kind::Storm | Kind::RollingRestart => Box::pin(self.restarts()).await?,
            Kind::Churn => self.churn().await?,
            Kind::Downlink => Box::pin(self.downlink()).await?,
            Kind::Endure => Box::pin(self.endure()).await?,
        }
        let end = self.cpu();
        self.tell_cpu(&before, &linked, &end);
        let numbers = self.workers.numbers().await?;
        self.tell(&numbers);
        Ok(())
    }

    /// Listens to the workers for a moment, takes a sample and shows how far it is.
    pub(crate) async fn look(
        &mut self,
        what: &str,
        of: u64,
        done: impl Fn(&Counts) -> u64,
    ) -> Result<Counts, RunError> {
        self.workers.listen(Instant::now() + LOOK).await?;
        let counts = self.workers.counts();
        self.progress.show(what, done(&counts), of);
        let all = self.cpu();
        let cpu = |what: &str| -> f64 {
            all.iter().filter(|used| used.what == what).map(|used| used.cpu.as_secs_f64()).sum()
        };
        let rss = |what: &str| -> u64 {
            all.iter().filter(|used| used.what == what).filter_map(|used| process::rss(used.pid).ok()).sum()
        };
        self.samples.push(Sample {
            at_s: self.began.elapsed().as_secs_f64(),
            connected: counts.connected,
            cpu_s: (cpu("hub"), cpu("worker")),
            rss: (rss("hub"), rss("worker")),
        });
        Ok(counts)
    }

    /// Looks until `done` of the counts reaches `of`, or patience ends; false then.
    pub(crate) async fn until(
        &mut self,
        what: &str,
        of: u64,
        done: impl Fn(&Counts) -> u64,
    ) -> Result<bool, RunError> {
        let began = Instant::now();
        while done(&self.look(what, of, &done).await?) < of {
            if began.elapsed() > self.scenario.patience {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Looks for this long.
    pub(crate) async fn wait(&mut self, time: Duration) -> Result<(), RunError> {
        let (began, of) = (Instant::now(), time.as_secs());
        while began.elapsed() < time {
            self.look("watched", of, |_counts| began.elapsed().as_secs()).await?;
        }
        Ok(())
    }

    /// Links all nodes, or as many as patience allows.
    async fn ramp(&mut self) -> Result<(), RunError> {
        let wanted = u64::from(self.nodes);
        self.began = Instant::now();
        self.workers.order(&Order::Ramp).await?;
        self.until("linked", wanted, |counts| counts.connected).await?;
        let (took, counts) = (self.began.elapsed().as_secs_f64(), self.workers.counts());
        let numbers = self.workers.numbers().await?;
        let welcome = merged(numbers.iter().map(|numbers| &numbers.welcome));
        let report = &mut self.report;
        report.ramp_s = took;
        (report.connected, report.failed) = (counts.connected, wanted.saturating_sub(counts.connected));
        report.handshakes_per_s = counts.welcomed as f64 / took;
        (report.welcome_p50_us, report.welcome_p99_us) = quantiles(&welcome);
        if report.failed > 0 {
            report.violations.push(format!("{} of {wanted} nodes were not linked in time", report.failed));
        }
        Ok(())
    }

    /// Watches linked nodes: their heartbeats, and what they cost.
    async fn hold(&mut self) -> Result<(), RunError> {
        self.workers.order(&Order::Forget).await?;
        let (began, before) = (Instant::now(), self.cpu());
        self.wait(self.scenario.hold).await?;
        let (held, after) = (began.elapsed(), self.cpu());
        let heartbeats = self.heartbeats().await?;
        let report = &mut self.report;
        report.hold_s = held.as_secs_f64();
        report.heartbeats = heartbeats.len();
        (report.heartbeat_p50_us, report.heartbeat_p99_us) = quantiles(&heartbeats);
        let used = |what: &str| -> Option<f64> {
            let of = |all: &[Used]| -> Duration {
                all.iter().filter(|used| used.what == what).map(|used| used.cpu).sum()
            };
            (!heartbeats.is_empty() && after.iter().any(|used| used.what == what))
                .then(|| (of(&after) - of(&before)).as_secs_f64() * 1e6 / heartbeats.len() as f64)
        };
        report.hub_cpu_us_per_heartbeat = used("hub");
        report.node_cpu_us_per_heartbeat = used("worker");
        self.nobody_was_lost();
        Ok(())
    }

    async fn heartbeats(&mut self) -> Result<Histogram<u64>, RunError> {
        let numbers = self.workers.numbers().await?;
        Ok(merged(numbers.iter().map(|numbers| &numbers.heartbeat)))
    }

    pub(crate) fn nobody_was_lost(&mut self) {
        let lost = self.workers.counts().lost;
        if lost > 0 {
            self.report.violations.push(format!("{lost} links ended though nobody ended them"));
        }
    }

    /// Hubs are killed, or stopped in an orderly way, and started again, while nodes publish.
    async fn restarts(&mut self) -> Result<(), RunError> {
        let (what, count) = (self.scenario.kind.as_str(), self.hubs.count());
        if count == 0 {
            return Err(RunError::Needs(what, "hubs of its own: --self-hosted"));
        }
        let publish = Order::Publish { per_s: self.scenario.per_s, size: self.scenario.size };
        self.workers.order(&publish).await?;
        for time in 0..self.scenario.times as usize {
            match (self.scenario.kind, self.scenario.killed as usize) {
                (Kind::RollingRestart, _) => {
                    for number in 0..count {
                        self.wait(self.scenario.hold).await?;
                        self.restart(&[number]).await?;
                    }
                }
                (_, killed) => {
                    let killed = if killed == 0 { count } else { killed.min(count) };
                    let which: Vec<usize> = (0..killed).map(|next| (time * killed + next) % count).collect();
                    self.wait(self.scenario.hold).await?;
                    self.restart(&which).await?;
                }
            }
        }
        self.workers.order(&Order::Publish { per_s: 0.0, size: 0 }).await?;
        self.all_arrived().await
    }

    async fn restart(&mut self, which: &[usize]) -> Result<(), RunError> {
        let (all, before) = (u64::from(self.nodes), self.workers.counts());
        let mut wanted = all;
        if which.len() < self.hubs.count() {
            wanted = 0;
            for number in which {
                wanted += self.hubs.nodes_owned(*number).await.unwrap_or(0);
            }
        }
        let gone = Instant::now();
        for number in which {
            self.hubs.end(*number, self.scenario.kind != Kind::Storm).await;
        }
        // While others serve, nodes come back before it does.
        let others = which.len() < self.hubs.count();
        let mut serves = gone;
        if !others {
            self.wait(self.scenario.down).await?;
            serves = self.start_again(which).await?;
        }
        let (mut noticed, mut back) = (None, None);
        while (noticed.is_none() || back.is_none()) && serves.elapsed() < self.scenario.patience {
            let counts = self.look("back", wanted, |counts| counts.welcomed - before.welcomed).await?;
            if noticed.is_none() && counts.noticed - before.noticed >= wanted {
                noticed = Some(gone.elapsed());
            }
            if back.is_none() && counts.welcomed - before.welcomed >= wanted && counts.connected >= all {
                back = Some(serves.elapsed());
            }
        }
        let counts = self.workers.counts();
        if others {
            self.wait(self.scenario.down.saturating_sub(gone.elapsed())).await?;
            self.start_again(which).await?;
        }
        let seconds = |time: Option<Duration>| time.map_or(f64::NAN, |time| time.as_secs_f64());
        self.report.detection_s.push(seconds(noticed));
        self.report.return_s.push(seconds(back));
        if back.is_none() {
            let returned = counts.welcomed - before.welcomed;
            self.report.violations.push(format!("{returned} of {wanted} nodes came back in time"));
        }
        Ok(())
    }

    /// Starts hubs again; when all of them serve.
    async fn start_again(&mut self, which: &[usize]) -> Result<Instant, RunError> {
        for number in which {
            self.hubs.start(*number).await?;
        }
        Ok(Instant::now())
    }

    /// Nodes come and go; in the end all are there.
    async fn churn(&mut self) -> Result<(), RunError> {
        let (before, wanted) = (self.workers.counts(), u64::from(self.nodes));
        let processes = f64::from(self.report.processes);
        self.workers.order(&Order::Forget).await?;
        self.workers.order(&Order::Churn { per_s: self.scenario.per_s / processes }).await?;
        let began = Instant::now();
        self.wait(self.scenario.hold).await?;
        self.workers.order(&Order::Churn { per_s: 0.0 }).await?;
        let all = self.until("back", wanted, |counts| counts.connected).await?;
        self.report.hold_s = began.elapsed().as_secs_f64();
        let (after, violations) = (self.workers.counts(), &mut self.report.violations);
        if !all {
            violations.push(format!("{} of {wanted} nodes are linked in the end", after.connected));
        }
        if after.welcomed == before.welcomed {
            violations.push("nobody came back".to_owned());
        }
        self.nobody_was_lost();
        Ok(())
    }

    /// Everything that was published is in the hubs' Log: once, in order.
    pub(crate) async fn all_arrived(&mut self) -> Result<(), RunError> {
        let numbers = self.workers.numbers().await?;
        let counts = numbers.iter().flat_map(|numbers| &numbers.published).map(|count| u64::from(*count));
        let published: Vec<(String, u64)> =
            (self.first..).map(|number| pki::name(&self.prefix, number)).zip(counts).collect();
        let wanted: u64 = published.iter().map(|(_node, count)| count).sum();
        let found = match (self.servers.clone(), self.admins.clone()) {
            (Some(servers), _) => self.found_on(&servers, published).await?,
            (None, admins) if !admins.is_empty() => self.found_at(&admins[0], &published).await?,
            (None, _) => {
                self.report.violations.push("nobody was asked what arrived: name --admin".to_owned());
                return Ok(());
            }
        };
        let report = &mut self.report;
        let missing = wanted.saturating_sub(found.arrived);
        report.published = wanted;
        report.arrived = Some(found.arrived);
        (report.missing, report.twice) = (Some(missing), Some(found.twice));
        report.disordered = Some(found.disordered);
        for (count, what) in [
            (missing, "never arrived"),
            (found.twice, "arrived twice"),
            (found.disordered, "arrived out of order"),
        ] {
            if count > 0 {
                report.violations.push(format!("{count} messages {what}"));
            }
        }
        if wanted == 0 {
            report.violations.push("nothing was published".to_owned());
        }
        Ok(())
    }

    /// What a hub has of each node.
    async fn found_at(&mut self, admin: &Path, published: &[(String, u64)]) -> Result<Found, RunError> {
        let admin = Client::new(admin);
        let (mut found, mut began) = (Found::default(), Instant::now());
        for (place, (node, wanted)) in (0..).zip(published) {
            let mut here = check::read(&admin, node, self.run).await?;
            // What is still on its way is waited for, by all nodes together.
            while here.arrived < *wanted && began.elapsed() < self.scenario.patience {
                self.look("arriving", published.len() as u64, |_counts| place).await?;
                here = check::read(&admin, node, self.run).await?;
            }
            if here.arrived >= *wanted {
                began = Instant::now();
            }
            found.add(&here);
        }
        Ok(found)
    }

    /// What the servers of a tier have of each node.
    async fn found_on(
        &mut self,
        servers: &Servers,
        published: Vec<(String, u64)>,
    ) -> Result<Found, RunError> {
        let (connection, run, patience) = (servers.connect().await?, self.run, self.scenario.patience);
        let wanted: HashMap<String, u64> = published.into_iter().collect();
        let reading = tier::read(&connection, run, &wanted, Instant::now() + patience);
        let mut reading = std::pin::pin!(reading);
        loop {
            tokio::select! {
                biased;
                found = &mut reading => {
                    let mut all = Found::default();
                    found?.values().for_each(|found| all.add(found));
                    return Ok(all);
                }
                listened = self.workers.listen(Instant::now() + LOOK) => listened?,
            }
        }
    }

    fn tell(&mut self, numbers: &[Numbers]) {
        let counts = self.workers.counts();
        let linked = counts.connected as f64;
        let workers: u64 = numbers.iter().map(|numbers| numbers.rss).sum();
        let grown = |now: u64, before: u64| (linked > 0.0).then(|| (now as f64 - before as f64) / linked);
        self.report.node_rss_bytes = grown(workers, self.workers.empty_rss());
        self.report.hub_rss_bytes_per_node =
            self.hubs.rss().zip(self.hub_rss).and_then(|(now, before)| grown(now, before));
        self.report.failed_dials = counts.failed;
        self.report.resumed = counts.resumed;
        for (end, count) in numbers.iter().flat_map(|numbers| &numbers.ends) {
            *self.report.ends.entry(end.clone()).or_default() += count;
        }
    }

    /// CPU of every process that is watched, up to now.
    fn cpu(&self) -> Vec<Used> {
        let hub = self.hubs.pids().map(|pid| ("hub", pid));
        let workers = self.workers.pids().into_iter().map(|pid| ("worker", pid));
        let watched = self.watch.iter().map(|pid| ("watched", *pid));
        let all = hub.chain(workers).chain(watched);
        all.map(|(what, pid)| Used { what, pid, cpu: process::cpu_time(pid).unwrap_or_default() }).collect()
    }

    fn tell_cpu(&mut self, before: &[Used], linked: &[Used], end: &[Used]) {
        for now in end {
            let at = |all: &[Used]| {
                all.iter().find(|used| used.pid == now.pid).map_or(Duration::ZERO, |used| used.cpu)
            };
            self.report.cpu.push(Cpu {
                what: now.what.to_owned(),
                pid: now.pid,
                ramp_s: at(linked).saturating_sub(at(before)).as_secs_f64(),
                hold_s: now.cpu.saturating_sub(at(linked)).as_secs_f64(),
                rss: process::rss(now.pid).unwrap_or(0),
            });
        }
    }
}
