//! How many nodes may be on their way to Welcome, and how many begin in a second.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, sleep_until},
};

/// A worker's gate. A node holds its [`Pass`] from the dial to Welcome or failure.
#[derive(Debug)]
pub struct Gate {
    places: Arc<Semaphore>,
    /// Between two that begin.
    pace: Option<Duration>,
    next: Mutex<Option<Instant>>,
}

/// The right to dial. Dropping it lets the next one in.
#[derive(Debug)]
pub struct Pass(#[allow(dead_code, reason = "held for its drop")] OwnedSemaphorePermit);

impl Gate {
    /// Lets `in_flight` in at a time, and `rate` in a second (0: no bound).
    #[must_use]
    pub fn new(in_flight: u32, rate: f64) -> Self {
        let pace = (rate > 0.0).then(|| Duration::from_secs_f64(1.0 / rate));
        Self { places: Arc::new(Semaphore::new(in_flight as usize)), pace, next: Mutex::default() }
    }

    /// Waits for its turn. Cancel safe, though a turn that was given up is not given to another.
    pub async fn enter(&self) -> Pass {
        let place = Arc::clone(&self.places).acquire_owned().await.expect("the semaphore is never closed");
        if let Some(pace) = self.pace {
            let turn = {
                let mut next = self.next.lock().expect("no panic under this lock");
                // Turns that nobody took are not made up for in a burst.
                let turn = next.unwrap_or_else(Instant::now).max(Instant::now() - pace);
                *next = Some(turn + pace);
                turn
            };
            sleep_until(turn).await;
        }
        Pass(place)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_rate_is_kept_and_places_are_few() {
        let (gate, began) = (Gate::new(2, 10.0), Instant::now());
        for _ in 0..11 {
            drop(gate.enter().await);
        }
        assert_eq!(began.elapsed().as_millis(), 1000);
        let _held = (gate.enter().await, gate.enter().await);
        tokio::time::timeout(Duration::from_secs(60), gate.enter()).await.unwrap_err();
    }
}
