//! What the hub's Log holds of a run: every message once, in the order of its node.

use std::collections::HashSet;

use ops::{
    api::{Entry, payload},
    client::{Client, ClientError},
};

use crate::mark::{Mark, UP};

/// What was found of one or of many nodes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Found {
    /// Different messages.
    pub arrived: u64,
    /// Messages that are there once more.
    pub twice: u64,
    /// Messages that stand behind a later one.
    pub disordered: u64,
}

/// Judges the messages of one node in the order of its Log.
#[derive(Debug, Default)]
pub(crate) struct Judge {
    pub(crate) found: Found,
    seen: HashSet<u32>,
    last: Option<u32>,
}

impl Judge {
    pub(crate) fn message(&mut self, number: u32) {
        if !self.seen.insert(number) {
            self.found.twice += 1;
            return;
        }
        self.found.arrived += 1;
        self.found.disordered += u64::from(self.last.is_some_and(|last| number < last));
        self.last = self.last.max(Some(number));
    }
}

impl Found {
    /// Adds another node's.
    pub fn add(&mut self, other: &Self) {
        self.arrived += other.arrived;
        self.twice += other.twice;
        self.disordered += other.disordered;
    }
}

/// Reads what a hub has of a node's messages of this run.
///
/// # Errors
/// The hub does not answer. A node of which it has nothing is no error.
pub async fn read(hub: &Client, node: &str, run: u64) -> Result<Found, ClientError> {
    let mut judge = Judge::default();
    let query = [("node", node), ("topic", UP)];
    let mut lines = match hub.lines("/v1/log", &query).await {
        Err(error) if error.is_not_found() => return Ok(judge.found),
        lines => lines?,
    };
    while let Some(line) = lines.next().await? {
        let not_understood = |what: String| ClientError::NotUnderstood { what };
        let entry: Entry =
            serde_json::from_slice(&line).map_err(|error| not_understood(error.to_string()))?;
        let Entry::Record(record) = entry else { continue };
        let bytes = payload(&record.payload).map_err(|error| not_understood(error.to_string()))?;
        if let Some(mark) = Mark::of(&bytes, run) {
            judge.message(mark.number);
        }
    }
    Ok(judge.found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_there_twice_or_too_late_is_found() {
        let judged = |numbers: &[u32]| {
            let mut judge = Judge::default();
            numbers.iter().for_each(|number| judge.message(*number));
            judge.found
        };
        assert_eq!(judged(&[0, 1, 2]), Found { arrived: 3, twice: 0, disordered: 0 });
        assert_eq!(judged(&[0, 2, 1]), Found { arrived: 3, twice: 0, disordered: 1 });
        assert_eq!(judged(&[0, 1, 1, 0]), Found { arrived: 2, twice: 2, disordered: 0 });
    }
}
