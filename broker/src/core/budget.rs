//! What a node lets itself send: budgets on the links above it.
//!
//! A budget concerns streams, spaces and classes, and limits them by a rate (a token bucket), by windows of
//! the day, and by caps per day and month. Every budget that concerns a record must permit it. What is held
//! stays where it is, a Log in its Log, State in its space; only Live is dropped, and counted. Control
//! messages are never held, alarms only by a budget that names them.
//!
//! **Time.** Days, months and windows are UTC and follow the wall clock while it is trusted. While it is not,
//! windows count as open, because a node that never learns the time would else never speak; and caps go on
//! counting against the last day that was known, which ends after 24 hours of running. So a clock that is
//! wrong never gives a cap twice.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use codec::Class;

use super::{
    Core, Timer,
    event::Now,
    spend::{DAY, Spend, month_of},
};

/// Bytes that a link may spend.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Budget {
    /// Its name, for people.
    pub name: Arc<str>,
    /// Streams and spaces that it concerns, of this node and of those behind it.
    pub streams: Vec<Arc<str>>,
    /// Classes that it concerns. With neither streams nor classes: everything but alarms.
    pub classes: Vec<Class>,
    /// Bytes a second, and how many at once after a pause.
    pub rate: Option<Rate>,
    /// When it may be spent, minutes of the UTC day, `from` until before `to`; over midnight if `to` is less.
    /// None: at any time.
    pub windows: Vec<(u16, u16)>,
    /// Bytes of a UTC day.
    pub per_day: Option<u64>,
    /// Bytes of a UTC month.
    pub per_month: Option<u64>,
}

/// A token bucket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    /// Bytes a second.
    pub bytes: u64,
    /// Bytes that may go at once after a pause.
    pub burst: u64,
}

/// Where a budget stands, for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BudgetState {
    /// Its name.
    pub name: Arc<str>,
    /// Why something waits for it.
    pub held: Option<HeldBy>,
    /// Bytes spent today and in this month.
    pub day: u64,
    /// See `day`.
    pub month: u64,
    /// Its caps.
    pub per_day: Option<u64>,
    /// See `per_day`.
    pub per_month: Option<u64>,
}

/// Why a budget holds something back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HeldBy {
    /// It went as fast as it may.
    Rate,
    /// None of its windows is open.
    Window,
    /// The day's cap is spent.
    Day,
    /// The month's cap is spent.
    Month,
}

impl HeldBy {
    /// The label in metrics.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Rate => "rate",
            Self::Window => "window",
            Self::Day => "day",
            Self::Month => "month",
        }
    }
}

/// A record may not go now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Held {
    /// Monotonic time at which it is worth asking again.
    pub(super) until: Duration,
}

/// A budget began or ended to hold something back for long.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Turned {
    pub(super) name: Arc<str>,
    pub(super) held: Option<HeldBy>,
}

/// Of a bucket that ran dry, this part of a second's bytes must be there before it is worth waking up.
const QUANTUM: u64 = 10;
/// Asked again at the latest after this long: the clock may be set.
const PATIENCE: Duration = Duration::from_mins(1);

#[derive(Debug)]
struct Bucket {
    budget: Budget,
    /// Bytes that may go now; negative after a record that was larger than what was left.
    tokens: i64,
    filled_at: Duration,
    /// Something waits, for this.
    held: Option<HeldBy>,
}

/// All budgets of a node and what was spent.
#[derive(Debug)]
pub(super) struct Budgets {
    buckets: Vec<Bucket>,
    pub(super) spend: Spend,
}

impl Budgets {
    pub(super) fn new(budgets: &[Budget], spend: Spend) -> Self {
        let bucket = |budget: &Budget| Bucket {
            tokens: budget.rate.map_or(0, |rate| signed(rate.burst)),
            budget: budget.clone(),
            filled_at: Duration::ZERO,
            held: None,
        };
        Self { buckets: budgets.iter().map(bucket).collect(), spend }
    }

    /// Whether a record of this stream or space may go now.
    pub(super) fn permit(&mut self, now: Now, class: Class, name: &str) -> Result<(), Held> {
        let mut held: Option<Held> = None;
        let spend = &mut self.spend;
        for bucket in self.buckets.iter_mut().filter(|bucket| bucket.budget.concerns(class, name)) {
            match bucket.permit(now, spend) {
                Ok(()) => bucket.held = None,
                Err((by, after)) => {
                    bucket.held = Some(by);
                    let until = now.mono + after.min(PATIENCE);
                    held = Some(Held { until: held.map_or(until, |other| other.until.max(until)) });
                }
            }
        }
        held.map_or(Ok(()), Err)
    }

    /// Whether a message that does not wait may go now.
    pub(super) fn allow(&mut self, now: Now, class: Class, name: &str) -> bool {
        let spend = &mut self.spend;
        let mut concerned = self.buckets.iter_mut().filter(|bucket| bucket.budget.concerns(class, name));
        concerned.all(|bucket| bucket.permit(now, spend).is_ok())
    }

    /// No link is there that anything could wait for.
    pub(super) fn rest(&mut self) {
        for bucket in &mut self.buckets {
            bucket.held = None;
        }
    }

    /// Bytes that rates let go now: not worth reading more.
    pub(super) fn room(&self, class: Class, name: &str) -> usize {
        let concerned = self.buckets.iter().filter(|bucket| bucket.budget.concerns(class, name));
        let rated = concerned.filter(|bucket| bucket.budget.rate.is_some());
        let least = rated.map(|bucket| usize::try_from(bucket.tokens).unwrap_or(0)).min();
        least.map_or(usize::MAX, |tokens| tokens.max(1))
    }

    /// A record went.
    pub(super) fn spent(&mut self, now: Now, class: Class, name: &str, bytes: usize) {
        for bucket in self.buckets.iter_mut().filter(|bucket| bucket.budget.concerns(class, name)) {
            if bucket.budget.rate.is_some() {
                bucket.tokens -= signed(bytes as u64);
            }
            self.spend.by_budget(now, &bucket.budget.name, bytes as u64);
        }
    }

    /// Budgets that began to hold something back by a window or cap, or no longer do, since the last call.
    pub(super) fn turned(&mut self, standing: &mut BTreeMap<Arc<str>, HeldBy>) -> Vec<Turned> {
        let mut turned = Vec::new();
        for bucket in &mut self.buckets {
            let name = &bucket.budget.name;
            let lasting = bucket.held.filter(|by| *by != HeldBy::Rate);
            if standing.get(name).copied() != lasting {
                match lasting {
                    Some(by) => drop(standing.insert(Arc::clone(name), by)),
                    None => drop(standing.remove(name)),
                }
                turned.push(Turned { name: Arc::clone(name), held: lasting });
            }
        }
        turned
    }

    pub(super) fn states(&self) -> Vec<BudgetState> {
        let state = |bucket: &Bucket| {
            let (day, month) = self.spend.of_budget(&bucket.budget.name);
            BudgetState {
                name: Arc::clone(&bucket.budget.name),
                held: bucket.held,
                day,
                month,
                per_day: bucket.budget.per_day,
                per_month: bucket.budget.per_month,
            }
        };
        self.buckets.iter().map(state).collect()
    }
}

impl Budget {
    /// True for records of this stream or space, and class.
    fn concerns(&self, class: Class, name: &str) -> bool {
        if class == Class::Control {
            return false;
        }
        let named = self.classes.contains(&class) || self.streams.iter().any(|held| **held == *name);
        let all = self.classes.is_empty() && self.streams.is_empty();
        named || (all && class != Class::Alarm)
    }

    /// How long until a window opens; zero if one is.
    fn opens_in(&self, wall_us: u64) -> Duration {
        let second = (wall_us / 1_000_000) % DAY.as_secs();
        let closed = |(from, to): &(u16, u16)| {
            let (from, to) = (u64::from(*from) * 60, u64::from(*to) * 60);
            let open = if from < to { (from..to).contains(&second) } else { second >= from || second < to };
            if open { 0 } else { (from + DAY.as_secs() - second) % DAY.as_secs() }
        };
        Duration::from_secs(self.windows.iter().map(closed).min().unwrap_or(0))
    }
}

impl Bucket {
    fn permit(&mut self, now: Now, spend: &mut Spend) -> Result<(), (HeldBy, Duration)> {
        let budget = &self.budget;
        if now.trusted {
            let wait = budget.opens_in(now.wall_us);
            if !wait.is_zero() {
                return Err((HeldBy::Window, wait));
            }
        }
        if budget.per_day.is_some() || budget.per_month.is_some() {
            let today = spend.today(now);
            let (day, month) = spend.of_budget(&budget.name);
            if budget.per_month.is_some_and(|cap| month >= cap) {
                let days = (1..32).find(|ahead| month_of(today + ahead) != month_of(today)).unwrap_or(1);
                return Err((HeldBy::Month, DAY * days));
            }
            if budget.per_day.is_some_and(|cap| day >= cap) {
                return Err((HeldBy::Day, DAY));
            }
        }
        let Some(rate) = budget.rate else { return Ok(()) };
        let elapsed = now.mono.saturating_sub(self.filled_at);
        let gained = u128::from(rate.bytes) * elapsed.as_micros() / 1_000_000;
        if gained > 0 {
            // What is less than a byte stays in the clock.
            let gained_us = u64::try_from(gained * 1_000_000 / u128::from(rate.bytes)).unwrap_or(u64::MAX);
            self.filled_at += Duration::from_micros(gained_us);
            let gained = i64::try_from(gained).unwrap_or(i64::MAX);
            self.tokens = self.tokens.saturating_add(gained).min(signed(rate.burst));
        }
        if self.tokens > 0 {
            return Ok(());
        }
        let quantum = signed((rate.bytes / QUANTUM).clamp(1, rate.burst.max(1)));
        let missing = u64::try_from(quantum - self.tokens).unwrap_or(0);
        let wait = Duration::from_micros(missing.saturating_mul(1_000_000) / rate.bytes.max(1));
        Err((HeldBy::Rate, wait))
    }
}

fn signed(bytes: u64) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}

impl Core {
    /// Something waits for a budget until then.
    pub(super) fn ask_budgets_at(&mut self, until: Duration) {
        if self.budgets_due.is_none_or(|due| until < due) {
            self.budgets_due = Some(until);
            self.after(until.saturating_sub(self.now.mono), Timer::Budget);
        }
    }

    pub(super) fn on_budget_due(&mut self) {
        if self.budgets_due.is_some_and(|due| due <= self.now.mono) {
            self.budgets_due = None;
            self.pump_links_above();
        }
    }

    /// Says which budgets hold something back for long. A rate does so all the time: that is a gauge.
    pub(super) fn show_budgets(&mut self) {
        for turned in self.budgets.turned(&mut self.budgets_held) {
            let Some(by) = turned.held else {
                self.clear_condition("BudgetHolds", &turned.name);
                continue;
            };
            let until = match by {
                HeldBy::Window => "none of its windows is open",
                HeldBy::Day => "the day's bytes are spent",
                HeldBy::Month => "the month's bytes are spent",
                HeldBy::Rate => "it goes as fast as it may",
            };
            let message = format!(
                "budget {} holds back what it concerns: {until}; it is kept here and sent later, as far as the \
                 quotas of its streams allow",
                turned.name
            );
            self.set_condition("BudgetHolds", turned.name.to_string(), message);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);
    /// 2026-11-20 00:00:00 UTC.
    const MIDNIGHT_US: u64 = 1_795_132_800_000_000;

    fn budget(change: impl FnOnce(&mut Budget)) -> Budget {
        let mut budget = Budget {
            name: "b".into(),
            streams: Vec::new(),
            classes: Vec::new(),
            rate: None,
            windows: Vec::new(),
            per_day: None,
            per_month: None,
        };
        change(&mut budget);
        budget
    }

    fn budgets(change: impl FnOnce(&mut Budget)) -> Budgets {
        Budgets::new(&[budget(change)], Spend::default())
    }

    /// So long after a midnight.
    fn at(after: Duration) -> Now {
        let wall_us = MIDNIGHT_US + u64::try_from(after.as_micros()).unwrap();
        Now { mono: SECOND + after, wall_us, trusted: true }
    }

    fn untrusted(after: Duration) -> Now {
        Now { wall_us: 1, trusted: false, ..at(after) }
    }

    #[test]
    fn a_rate_lets_its_burst_go_and_then_so_much_a_second() {
        let mut budgets = budgets(|budget| budget.rate = Some(Rate { bytes: 1_000, burst: 5_000 }));
        let mut sent = 0;
        let mut now = Duration::ZERO;
        while now <= 10 * SECOND {
            match budgets.permit(at(now), Class::Telemetry, "s") {
                Ok(()) => {
                    budgets.spent(at(now), Class::Telemetry, "s", 100);
                    sent += 100;
                }
                Err(held) => now = held.until - SECOND,
            }
        }
        assert!((14_800..=15_200).contains(&sent), "{sent} in ten seconds");
    }

    #[test]
    fn a_record_larger_than_the_burst_goes_and_is_paid_for() {
        let mut budgets = budgets(|budget| budget.rate = Some(Rate { bytes: 1_000, burst: 4_000 }));
        budgets.permit(at(Duration::ZERO), Class::Bulk, "s").unwrap();
        budgets.spent(at(Duration::ZERO), Class::Bulk, "s", 10_000);
        let held = budgets.permit(at(Duration::ZERO), Class::Bulk, "s").unwrap_err();
        assert_eq!(held.until, SECOND + Duration::from_millis(6_100));
        budgets.permit(at(held.until - SECOND), Class::Bulk, "s").unwrap();
    }

    #[test]
    fn alarms_and_control_are_held_only_by_a_budget_that_names_them() {
        let spent = |change: fn(&mut Budget), class| {
            let mut budgets = budgets(|budget| {
                budget.per_day = Some(1);
                change(budget);
            });
            budgets.spent(at(SECOND), class, "s", 100);
            budgets.permit(at(SECOND), class, "s").is_err()
        };
        assert!(!spent(|_| {}, Class::Alarm) && !spent(|_| {}, Class::Control));
        assert!(spent(|_| {}, Class::State) && spent(|_| {}, Class::Telemetry));
        assert!(spent(|budget| budget.classes = vec![Class::Alarm], Class::Alarm));
        assert!(spent(|budget| budget.streams = vec!["s".into()], Class::Alarm));
        assert!(!spent(|budget| budget.streams = vec!["other".into()], Class::Telemetry));
        assert!(!spent(|budget| budget.streams = vec!["s".into()], Class::Control));
    }

    #[test]
    fn a_window_over_midnight_is_open_at_night() {
        let mut budgets = budgets(|budget| budget.windows = vec![(22 * 60, 6 * 60)]);
        let hour = Duration::from_hours(1);
        for (hours, open) in
            [(0, true), (5, true), (6, false), (12, false), (21, false), (22, true), (23, true)]
        {
            let permitted = budgets.permit(at(hour * hours), Class::Telemetry, "s");
            assert_eq!(permitted.is_ok(), open, "at {hours} o'clock");
        }
        assert_eq!(budgets.buckets[0].budget.opens_in(at(hour * 12).wall_us), hour * 10);
        budgets.permit(untrusted(hour * 12), Class::Telemetry, "s").unwrap();
    }

    #[test]
    fn a_cap_of_a_day_ends_at_midnight_and_that_of_a_month_with_the_month() {
        let hour = Duration::from_hours(1);
        let mut daily = budgets(|budget| budget.per_day = Some(1_000));
        daily.spent(at(hour), Class::Telemetry, "s", 1_000);
        daily.permit(at(hour * 23), Class::Telemetry, "s").unwrap_err();
        daily.permit(at(hour * 24), Class::Telemetry, "s").unwrap();
        let mut monthly = budgets(|budget| budget.per_month = Some(1_000));
        monthly.spent(at(hour), Class::Telemetry, "s", 1_000);
        monthly.permit(at(DAY * 10), Class::Telemetry, "s").unwrap_err();
        assert_eq!(monthly.states()[0].held, Some(HeldBy::Month));
        monthly.permit(at(DAY * 11), Class::Telemetry, "s").unwrap();
    }

    #[test]
    fn a_cap_is_not_given_twice_by_a_clock_that_is_wrong_or_set_back() {
        let mut budgets = budgets(|budget| budget.per_day = Some(1_000));
        budgets.spent(at(DAY), Class::Telemetry, "s", 1_000);
        budgets.permit(at(Duration::ZERO), Class::Telemetry, "s").unwrap_err();
        budgets.permit(untrusted(DAY + DAY / 2), Class::Telemetry, "s").unwrap_err();
        // A day of running without the time is a day.
        budgets.permit(untrusted(DAY * 2), Class::Telemetry, "s").unwrap();
        // What was spent before the time was known counts on the day on which it is known.
        let mut early = self::budgets(|budget| budget.per_day = Some(1_000));
        early.spent(untrusted(SECOND), Class::Telemetry, "s", 1_000);
        early.permit(at(2 * SECOND), Class::Telemetry, "s").unwrap_err();
    }

    #[test]
    fn months_are_those_of_the_calendar() {
        let months = |days: &[u32]| days.iter().map(|day| month_of(*day) - month_of(0)).collect::<Vec<_>>();
        // 1970-01-31, 02-01; 1972-02-29, 03-01; 2000-02-29, 03-01; 2100-02-28, 03-01.
        assert_eq!(months(&[30, 31, 789, 790]), [0, 1, 25, 26]);
        assert_eq!(months(&[11_016, 11_017, 47_540, 47_541]), [361, 362, 1_561, 1_562]);
    }
}
