//! The one JSON line of a run.

use std::io::Write;

use serde_json::{Value, json};

use crate::{normalizer, procfs};

/// Prints the line to standard output. `cases` holds, for each case, its name and `ours`, `peer`, `ratio`,
/// `cpu_ns_per_op` and what else belongs to it.
///
/// # Errors
/// Standard output is closed, or a normalizer cannot be measured.
pub fn print(goal: &str, cases: &[Value]) -> anyhow::Result<()> {
    let line = json!({
        "goal": goal,
        "cases": cases,
        "rss": procfs::own_rss()?,
        "load": procfs::load(),
        "normalizers": normalizer::measure()?,
    });
    Ok(writeln!(std::io::stdout(), "{line}")?)
}

/// A line for people, to standard error.
pub fn say(line: std::fmt::Arguments<'_>) {
    // Nobody to tell: the figures are in the JSON line as well.
    drop(writeln!(std::io::stderr(), "{line}"));
}
