//! When to ask, and what the answers amount to.

use std::time::Duration;

use k8s_openapi::api::core::v1::Probe;
use tokio::time::Instant;

use super::{Kind, Outcome};

/// Never, as far as timers go.
const NEVER: Duration = Duration::from_secs(86_400 * 365 * 30);

/// What the answers so far amount to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// There were not enough of them.
    Unknown,
    /// It is well.
    Passed,
    /// It is not.
    Failed,
}

/// One probe of one instance of a container.
///
/// ```text
/// due -> begin -> (the asking) -> finished -> due ...
/// ```
/// The verdict turns when as many answers in a row say the same as the probe's threshold. A verdict that ends the
/// instance, or that ends the probing (a startup probe's), is the last.
#[derive(Debug, Clone)]
pub struct Schedule {
    kind: Kind,
    period: Duration,
    success_threshold: u32,
    failure_threshold: u32,
    due: Instant,
    verdict: Verdict,
    /// The last answer, and how often it came in a row.
    run: Option<(Verdict, u32)>,
}

impl Schedule {
    /// For an instance that started then. `jitter` spreads the first askings of an agent that just began.
    #[must_use]
    pub fn new(kind: Kind, probe: &Probe, started: Instant, jitter: Duration) -> Self {
        let number = |field: Option<i32>, default: u32| {
            field.filter(|number| *number > 0).map_or(default, i32::unsigned_abs)
        };
        let delay = number(probe.initial_delay_seconds, 0);
        Self {
            kind,
            period: Duration::from_secs(number(probe.period_seconds, 10).into()),
            success_threshold: number(probe.success_threshold, 1),
            failure_threshold: number(probe.failure_threshold, 3),
            due: started + Duration::from_secs(delay.into()) + jitter,
            verdict: Verdict::Unknown,
            run: None,
        }
    }

    /// When to ask next.
    #[must_use]
    pub fn due(&self) -> Instant {
        self.due
    }

    /// It is being asked; the next time is a period from here, however long the answer takes.
    pub fn begin(&mut self, now: Instant) {
        self.due = now + self.period;
    }

    /// It answered. The verdict, if it turned.
    pub fn finished(&mut self, now: Instant, outcome: &Outcome) -> Option<Verdict> {
        let (said, threshold) = match outcome {
            Outcome::Success => (Verdict::Passed, self.success_threshold),
            Outcome::Failure(_) => (Verdict::Failed, self.failure_threshold),
            Outcome::Unknown(_) => return None,
        };
        let times = match self.run {
            Some((last, times)) if last == said => times.saturating_add(1),
            _ => 1,
        };
        self.run = Some((said, times));
        if times < threshold || said == self.verdict {
            return None;
        }
        self.verdict = said;
        let is_last = match self.kind {
            Kind::Startup => true,
            Kind::Liveness => said == Verdict::Failed,
            Kind::Readiness => false,
        };
        if is_last {
            self.due = now + NEVER;
        }
        Some(said)
    }

    /// What the answers so far amount to.
    #[must_use]
    pub fn verdict(&self) -> Verdict {
        self.verdict
    }
}
