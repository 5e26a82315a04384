//! From a failing run to a short one that breaks the same rule.

use std::{
    cell::RefCell,
    panic::{AssertUnwindSafe, PanicHookInfo},
    sync::Once,
};

use octobus_tests::script::Script;

use crate::world::World;

/// Trials of one shrinking: a bound on its time, not on its result.
const TRIALS_MAX: usize = 4000;

/// Why a run failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Failure {
    /// The rule that was broken, or the place of a panic.
    pub(crate) rule: String,
    pub(crate) what: String,
}

thread_local! {
    /// Where the panic was that this thread waits for; none while panics are to be printed.
    static QUIET: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// From now on a panic in a thread that waits for it is remembered and not printed.
fn remember_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let printed = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info: &PanicHookInfo<'_>| {
            let waits = QUIET.with_borrow_mut(|quiet| match quiet {
                Some(place) => {
                    *place = info.location().map(ToString::to_string).unwrap_or_default();
                    true
                }
                None => false,
            });
            if !waits {
                printed(info);
            }
        }));
    });
}

/// Runs something that may break a rule.
pub(crate) fn attempt<T>(run: impl FnOnce() -> T) -> Result<T, Failure> {
    remember_panics();
    QUIET.set(Some(String::new()));
    let outcome = std::panic::catch_unwind(AssertUnwindSafe(run));
    let place = QUIET.take().unwrap_or_default();
    outcome.map_err(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
        let text = text.unwrap_or_default();
        match text.strip_prefix('[').and_then(|rest| rest.split_once("] ")) {
            Some((rule, what)) => Failure { rule: rule.to_owned(), what: what.to_owned() },
            None => Failure { rule: format!("no panic at {place}"), what: text },
        }
    })
}

/// Runs a script.
pub(crate) fn fails(script: &Script) -> Option<Failure> {
    attempt(|| World::run(script, false)).err()
}

/// The shortest script found that still fails by the same rule: stretches of steps are removed as long as it
/// does, from half of the run down to single steps.
pub(crate) fn shrink(script: &Script, rule: &str, fails: impl Fn(&Script) -> Option<Failure>) -> Script {
    let mut best = script.clone();
    let mut trials = 0;
    let mut holds = |candidate: &Script| {
        trials += 1;
        trials <= TRIALS_MAX && fails(candidate).is_some_and(|failure| failure.rule == rule)
    };
    let mut stretch = best.steps.len().div_ceil(2);
    loop {
        let mut removed = false;
        // From the end: what follows the failure goes first, and for nothing.
        let mut end = best.steps.len();
        while end > 0 {
            let start = end.saturating_sub(stretch);
            let mut candidate = best.clone();
            // The time that passed still passes, so that timers fire as they did.
            let passed: u32 = candidate.steps.drain(start..end).map(|step| step.after_us).sum();
            if let Some(next) = candidate.steps.get_mut(start) {
                next.after_us = next.after_us.saturating_add(passed);
            }
            if holds(&candidate) {
                best = candidate;
                removed = true;
            }
            end = start;
        }
        if stretch == 1 && !removed {
            return best;
        }
        if !removed || stretch > best.steps.len() {
            stretch = (stretch / 2).max(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use octobus_tests::script::{Health, What};

    use super::*;
    use crate::plan;

    /// Steps that a full run has, and a shrunk one may.
    const STEPS: usize = 300;
    const FEW: usize = 8;

    /// A world with a fault of its own: from the first full disk of a host on, it forgets to deliver what
    /// is acknowledged to its subscriber.
    fn faulty(script: &Script) -> Option<Failure> {
        attempt(|| World::run_with(script, |world| world.lose_deliveries_after_a_full_disk())).err()
    }

    #[test]
    fn a_run_that_breaks_a_rule_is_shrunk_to_the_few_steps_that_break_it() {
        let rule = "a_subscriber_gets_all_that_is_acknowledged";
        let broken = |script: &Script| faulty(script).is_some_and(|failure| failure.rule == rule);
        let script = (1..200).map(|seed| plan::script(seed, STEPS)).find(broken);
        let script = script.expect("one of 200 seeds has a full disk and a publish after it");
        let short = shrink(&script, rule, faulty);
        assert!(short.steps.len() <= FEW, "{short}");
        let full = |what: &What| matches!(what, What::Disk { state: Health::Full, .. });
        assert!(short.steps.iter().any(|step| full(&step.what)), "without its cause:\n{short}");
        // What is written down is what was found, and the world without the fault keeps the rule.
        let again: Script = short.to_string().parse().expect("a script");
        assert_eq!(faulty(&again).map(|failure| failure.rule).as_deref(), Some(rule));
        assert_eq!(fails(&again), None);
    }
}
