//! The spend ledger: bytes sent above by link, class and day, and by budget and day.
//!
//! It counts records as they are handed to a link, before compression, so what crosses the network is usually
//! less; heartbeats, handshakes and the framing of packets are not in it. A day is one fact in the store,
//! written about once a second while it grows: a crash forgets that much.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use bytes::Bytes;
use codec::{Class, Kind, proto};

use super::{event::Now, ledger::Ledger};
use crate::store::LocalFact;

/// A day.
pub(super) const DAY: Duration = Duration::from_hours(24);
/// Days that are kept: this month and the one before.
const DAYS_KEPT: usize = 62;
/// Key of a day's fact, before its number.
const KEY: &[u8] = b"spend/";
/// No day before this one (in 2001) is a date: it was counted before the time was known.
const FIRST_DATE: u32 = 11_323;

/// Bytes of one day.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
struct Day {
    /// By receiver: empty is the tier, else a relay.
    links: BTreeMap<Arc<str>, [u64; Class::ALL.len()]>,
    budgets: BTreeMap<Arc<str>, u64>,
}

/// The ledger.
#[derive(Debug, Default)]
pub(super) struct Spend {
    /// By day since 1970.
    days: BTreeMap<u32, Day>,
    /// The day that is counted now, and since when it is, by the monotonic clock.
    today: u32,
    since: Duration,
    dirty: bool,
}

impl Spend {
    /// From what the store recovered.
    pub(super) fn restore(locals: &[LocalFact], now: Now) -> Self {
        let mut spend = Self { since: now.mono, ..Self::default() };
        for fact in locals.iter().filter(|fact| fact.kind == Kind::META) {
            let Some(number) = fact.key.strip_prefix(KEY) else { continue };
            let (Ok(number), Ok(stored)) =
                (number.try_into(), codec::decode::<proto::SpendDay>(fact.value.clone()))
            else {
                continue;
            };
            let mut day = Day::default();
            for link in stored.links {
                let bytes = day.links.entry(link.receiver.into()).or_default();
                bytes.iter_mut().zip(link.bytes).for_each(|(held, bytes)| *held = bytes);
            }
            day.budgets =
                stored.budgets.into_iter().map(|budget| (budget.name.into(), budget.bytes)).collect();
            spend.days.insert(u32::from_be_bytes(number), day);
        }
        spend.today = spend.days.keys().next_back().copied().unwrap_or(0);
        spend
    }

    /// The day that counts now. Never goes back.
    pub(super) fn today(&mut self, now: Now) -> u32 {
        if now.trusted {
            let day = u32::try_from(now.wall_us / 1_000_000 / DAY.as_secs()).unwrap_or(u32::MAX);
            if day > self.today {
                // What was spent before the date was known was spent today, as far as caps care.
                let dated = self.today >= FIRST_DATE;
                let undated = if dated { None } else { self.days.remove(&self.today) };
                (self.today, self.since) = (day, now.mono);
                if let Some(spent) = undated {
                    self.days.insert(day, spent);
                    self.dirty = true;
                }
            }
            return self.today;
        }
        while now.mono >= self.since + DAY {
            (self.today, self.since) = (self.today + 1, self.since + DAY);
        }
        self.today
    }

    fn day(&mut self, now: Now) -> &mut Day {
        let today = self.today(now);
        self.dirty = true;
        self.days.entry(today).or_default()
    }

    /// Records went over a link.
    pub(super) fn by_link(&mut self, now: Now, receiver: &str, class: Class, bytes: u64) {
        let day = self.day(now);
        if !day.links.contains_key(receiver) {
            day.links.insert(receiver.into(), Default::default());
        }
        let counts = day.links.get_mut(receiver).expect("just inserted");
        counts[class as usize] = counts[class as usize].saturating_add(bytes);
    }

    /// Records that a budget concerns went.
    pub(super) fn by_budget(&mut self, now: Now, budget: &Arc<str>, bytes: u64) {
        let spent = self.day(now).budgets.entry(Arc::clone(budget)).or_default();
        *spent = spent.saturating_add(bytes);
    }

    /// Bytes that a budget's records took today and in this month.
    pub(super) fn of_budget(&self, budget: &str) -> (u64, u64) {
        let of = |day: &Day| day.budgets.get(budget).copied().unwrap_or(0);
        let today = self.days.get(&self.today).map_or(0, of);
        let month = month_of(self.today);
        let days = self.days.iter().rev().take_while(|(number, _)| month_of(**number) == month);
        (today, days.map(|(_, day)| of(day)).sum())
    }

    /// Bytes sent today, by receiver and class.
    pub(super) fn by_class(&self) -> BTreeMap<(Arc<str>, Class), u64> {
        let links = self.days.get(&self.today).into_iter().flat_map(|day| &day.links);
        links
            .flat_map(|(receiver, bytes)| {
                Class::ALL
                    .into_iter()
                    .zip(bytes)
                    .map(|(class, bytes)| ((Arc::clone(receiver), class), *bytes))
            })
            .filter(|(_, bytes)| *bytes > 0)
            .collect()
    }

    /// Writes what has changed: today. Days that nobody needs go.
    pub(super) fn write(&mut self, ledger: &mut Ledger) {
        if !std::mem::take(&mut self.dirty) {
            return;
        }
        if let Some(day) = self.days.get(&self.today) {
            let links = day.links.iter().map(|(receiver, bytes)| proto::SpendLink {
                receiver: receiver.to_string(),
                bytes: bytes.to_vec(),
            });
            let budgets = day
                .budgets
                .iter()
                .map(|(name, bytes)| proto::SpendBudget { name: name.to_string(), bytes: *bytes });
            let value = proto::SpendDay { links: links.collect(), budgets: budgets.collect() };
            ledger.write_local(Kind::META, key(self.today), Some(codec::encode(&value)));
        }
        while self.days.len() > DAYS_KEPT {
            let (oldest, _) = self.days.pop_first().expect("more than none");
            ledger.write_local(Kind::META, key(oldest), None);
        }
    }
}

fn key(day: u32) -> Bytes {
    [KEY, &day.to_be_bytes()].concat().into()
}

/// Months since the year 0 of a day since 1970, in the proleptic Gregorian calendar.
pub(super) fn month_of(day: u32) -> u32 {
    // Days since 0000-03-01, whose years end with the leap day; 400 years are 146097 days.
    let days = u64::from(day) + 719_468;
    let (era, of_era) = (days / 146_097, days % 146_097);
    let year = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let from_march = (5 * of_year + 2) / 153;
    u32::try_from((era * 400 + year) * 12 + from_march + 2).unwrap_or(u32::MAX)
}
