//! How long to wait before a container is started again.
//!
//! The delay that follows a container's end stands in an annotation of that container, so that it survives
//! whoever starts it: the first restart is at once, then 10 s, doubling to 5 min. A run of more than 10 min
//! begins anew.

use std::time::Duration;

use super::seen::{Contained, Exit};

const FIRST: Duration = Duration::from_secs(10);
const LONGEST: Duration = Duration::from_mins(5);
const STEADY: Duration = Duration::from_mins(10);

fn was_steady(exit: &Exit) -> bool {
    let ran = exit.finished_at.saturating_sub(exit.started_at).max(0);
    exit.started_at > 0 && Duration::from_nanos(ran.unsigned_abs()) > STEADY
}

/// How long after its end an instance may be followed by the next.
pub(crate) fn delay_after(ended: &Contained, exit: &Exit) -> Duration {
    if was_steady(exit) { Duration::ZERO } else { ended.back_off }
}

/// What to note with the instance that follows.
pub(crate) fn noted_after(ended: Option<&Contained>) -> Duration {
    match ended.and_then(|container| Some((container, container.exit()?))) {
        None => Duration::ZERO,
        Some((_, exit)) if was_steady(exit) => FIRST,
        Some((container, _)) => doubled(container.back_off, FIRST, LONGEST),
    }
}

/// The next of a series of delays.
pub(crate) fn doubled(delay: Duration, first: Duration, longest: Duration) -> Duration {
    (delay * 2).clamp(first, longest)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pods::seen::State;

    fn ended(back_off: Duration, ran: Duration) -> Contained {
        let exit = Exit {
            started_at: 1,
            finished_at: 1 + i64::try_from(ran.as_nanos()).unwrap(),
            code: 1,
            ..Exit::default()
        };
        Contained {
            id: "c".to_owned(),
            sandbox: "s".to_owned(),
            name: "web".to_owned(),
            attempt: 0,
            state: State::Exited(exit),
            created_at: 1,
            image: String::new(),
            image_ref: String::new(),
            spec: String::new(),
            back_off,
            log_path: String::new(),
        }
    }

    #[test]
    fn delays_are_none_then_ten_seconds_doubling_to_five_minutes() {
        let mut noted = noted_after(None);
        let mut delays = Vec::new();
        for _ in 0..8 {
            let container = ended(noted, Duration::from_secs(1));
            delays.push(delay_after(&container, container.exit().unwrap()).as_secs());
            noted = noted_after(Some(&container));
        }
        assert_eq!(delays, [0, 10, 20, 40, 80, 160, 300, 300]);
    }

    #[test]
    fn a_run_of_ten_minutes_begins_anew() {
        let container = ended(LONGEST, STEADY + Duration::from_secs(1));
        assert_eq!(delay_after(&container, container.exit().unwrap()), Duration::ZERO);
        assert_eq!(noted_after(Some(&container)), FIRST);
    }
}
