//! How often an address may fail before it has to wait.
//!
//! Secrets of 160 bits are not guessed; this is there so that one misconfigured or hostile machine costs
//! others nothing and shows in the log a few times a minute, not a thousand times.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv6Addr},
    sync::Mutex,
    time::Duration,
};

use tokio::time::Instant;

/// Failures within one window after which an address waits for its end.
const FAILURES_MAX: u32 = 20;
const WINDOW: Duration = Duration::from_secs(60);
/// Addresses remembered; all others share one entry.
const ADDRESSES_MAX: usize = 4096;

#[derive(Debug, Default)]
pub(super) struct Failures(Mutex<HashMap<IpAddr, Window>>);

#[derive(Debug, Clone, Copy)]
struct Window {
    since: Instant,
    failures: u32,
}

impl Failures {
    /// How long this address has to wait, if it has to.
    pub(super) fn check(&self, from: IpAddr) -> Result<(), Duration> {
        let windows = self.0.lock().expect("no panic under this lock");
        let Some(window) = windows.get(&slot(&windows, from)) else { return Ok(()) };
        match WINDOW.checked_sub(window.since.elapsed()) {
            Some(left) if !left.is_zero() && window.failures >= FAILURES_MAX => Err(left),
            _ => Ok(()),
        }
    }

    /// One more failure.
    pub(super) fn count(&self, from: IpAddr) {
        let mut windows = self.0.lock().expect("no panic under this lock");
        if windows.len() >= ADDRESSES_MAX {
            windows.retain(|_, window| window.since.elapsed() < WINDOW);
        }
        let slot = slot(&windows, from);
        let now = Window { since: Instant::now(), failures: 0 };
        let window = windows.entry(slot).or_insert(now);
        if window.since.elapsed() >= WINDOW {
            *window = now;
        }
        window.failures = window.failures.saturating_add(1);
    }
}

/// What counts as one address: an IPv6 host owns a /64.
pub(super) fn key(from: IpAddr) -> IpAddr {
    match from.to_canonical() {
        IpAddr::V6(address) => IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() >> 64 << 64)),
        address @ IpAddr::V4(_) => address,
    }
}

/// What finds no room shares the entry of the unspecified address.
fn slot(windows: &HashMap<IpAddr, Window>, from: IpAddr) -> IpAddr {
    let key = key(from);
    if windows.contains_key(&key) || windows.len() < ADDRESSES_MAX {
        key
    } else {
        IpAddr::V6(Ipv6Addr::UNSPECIFIED)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fail(failures: &Failures, from: IpAddr, times: u32) {
        for _ in 0..times {
            failures.count(from);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_address_that_keeps_failing_waits_and_others_do_not() {
        let failures = Failures::default();
        let (bad, good) = (IpAddr::from([10, 0, 0, 1]), IpAddr::from([10, 0, 0, 2]));
        fail(&failures, bad, FAILURES_MAX - 1);
        assert_eq!(failures.check(bad), Ok(()));
        fail(&failures, bad, 1);
        assert!(failures.check(bad).is_err());
        assert_eq!(failures.check(good), Ok(()));
        tokio::time::advance(WINDOW).await;
        assert_eq!(failures.check(bad), Ok(()));
    }

    #[tokio::test(start_paused = true)]
    async fn memory_is_bounded_and_the_rest_share_one_entry() {
        let failures = Failures::default();
        for host in 0..2 * u32::try_from(ADDRESSES_MAX).unwrap() {
            failures.count(IpAddr::V4(host.into()));
        }
        assert!(failures.0.lock().unwrap().len() <= ADDRESSES_MAX + 1);
        assert!(failures.check(IpAddr::from([250, 0, 0, 1])).is_err(), "they overflowed together");
    }

    #[tokio::test(start_paused = true)]
    async fn a_whole_ipv6_subnet_is_one_address() {
        let failures = Failures::default();
        let host = |n: u16| IpAddr::from([0x2001, 0xdb8, 0, 0, 0, 0, 0, n]);
        for n in 0..20 {
            fail(&failures, host(n), 1);
        }
        assert!(failures.check(host(999)).is_err());
        assert_eq!(failures.check(IpAddr::from([0x2001, 0xdb8, 0, 1, 0, 0, 0, 1])), Ok(()));
    }
}
