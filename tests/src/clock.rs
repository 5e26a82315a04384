//! Real time: what is tested here are other processes, so no clock can be paused.

use std::time::{Duration, Instant};

/// Now.
#[must_use]
#[allow(clippy::disallowed_methods)] // the one place of the harness that reads the clock
pub fn now() -> Instant {
    Instant::now()
}

/// Asks again until there is an answer. The one polling loop of the tests: it ends as soon as the answer
/// is there, so a limit costs nothing when all is well.
///
/// # Panics
/// If there is none within `limit`, saying what was waited for.
pub fn wait_for<T>(what: &str, limit: Duration, mut ask: impl FnMut() -> Option<T>) -> T {
    let began = now();
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(began.elapsed() < limit, "waited {limit:?} for {what}, in vain");
        pause(Duration::from_millis(10));
    }
}

/// Lets real time pass: for loads and measurements, never to wait for something that can be asked.
pub fn pause(time: Duration) {
    std::thread::sleep(time);
}
