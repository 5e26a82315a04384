//! What a run does: TOML and flags, read together, every mistake named at once.
//!
//! A reader *takes* each setting it knows; what nobody took is unknown. A flag `--set KEY=VALUE` stands over the
//! file's key of the same name, and values have the same form in both.

use std::{collections::BTreeMap, fmt, time::Duration};

use ops::config::units;
use serde::{Deserialize, Serialize};

/// The kinds of runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// All nodes link, as fast as admission lets them or at a rate, and stay.
    Connect,
    /// Linked nodes exchange heartbeats and nothing else.
    Steady,
    /// Each node publishes durable messages; all must arrive at the hub, once, in order.
    Telemetry,
    /// A shared object and a key for each node go to every node.
    FanOut,
    /// The hub, or so many of the replicas, is killed and started again.
    Storm,
    /// The hub, or each replica in turn, is stopped in an orderly way and started again.
    RollingRestart,
    /// Nodes come and go.
    Churn,
    /// One node gets acknowledged messages over a long line: windows against one message in flight.
    Downlink,
    /// Nodes publish and State changes while others do what they want to the hubs; all must arrive in the end.
    Endure,
}

impl Kind {
    /// All of them, in the order of the documentation.
    pub const ALL: [Self; 9] = [
        Self::Connect,
        Self::Steady,
        Self::Telemetry,
        Self::FanOut,
        Self::Storm,
        Self::RollingRestart,
        Self::Churn,
        Self::Downlink,
        Self::Endure,
    ];

    /// Its word in scenarios.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Connect => "connect",
            Self::Steady => "steady",
            Self::Telemetry => "telemetry",
            Self::FanOut => "fan-out",
            Self::Storm => "storm",
            Self::RollingRestart => "rolling-restart",
            Self::Churn => "churn",
            Self::Downlink => "downlink",
            Self::Endure => "endure",
        }
    }

    /// The scenario of this kind that is built in: `loadtest/scenarios/KIND.toml`.
    #[must_use]
    pub const fn shipped(self) -> &'static str {
        match self {
            Self::Connect => include_str!("../scenarios/connect.toml"),
            Self::Steady => include_str!("../scenarios/steady.toml"),
            Self::Telemetry => include_str!("../scenarios/telemetry.toml"),
            Self::FanOut => include_str!("../scenarios/fan-out.toml"),
            Self::Storm => include_str!("../scenarios/storm.toml"),
            Self::RollingRestart => include_str!("../scenarios/rolling-restart.toml"),
            Self::Churn => include_str!("../scenarios/churn.toml"),
            Self::Downlink => include_str!("../scenarios/downlink.toml"),
            Self::Endure => include_str!("../scenarios/endure.toml"),
        }
    }
}

/// A run, as scenario and flags say.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Scenario {
    /// What happens.
    pub kind: Kind,
    /// Nodes of the whole fleet.
    pub nodes: u32,
    /// Their names are `PREFIX-0`, `PREFIX-1`, ...
    pub prefix: String,
    /// Heartbeat period of the links.
    pub heartbeat: Duration,
    /// UDP sockets that the fleet dials from.
    pub sockets: u32,
    /// Links begun per second; 0: as many as admission lets.
    pub rate: f64,
    /// Links that may be on their way to Welcome at a time.
    pub in_flight: u32,
    /// Nodes keep a session ticket, as the agent does.
    pub tickets: bool,
    /// How long the fleet is watched once it is linked.
    pub hold: Duration,
    /// Longest time until all are linked, or linked again.
    pub patience: Duration,
    /// First and greatest bound of a node's delay before it dials again.
    pub backoff: (Duration, Duration),
    /// Bytes of a message or of a State value.
    pub size: u32,
    /// Messages of each node in a second (telemetry), or nodes that leave and come back in a second (churn).
    pub per_s: f64,
    /// Changes of State in a second, of all nodes together (endure).
    pub changes_per_s: f64,
    /// Hubs that are killed at a time (storm); 0: all.
    pub killed: u32,
    /// How often: changes sent to everybody, kills, restarts.
    pub times: u32,
    /// The hub stays away for this long.
    pub down: Duration,
    /// Messages of a downlink.
    pub messages: u32,
    /// Round trip of the long line.
    pub round_trip: Duration,
}

/// Every mistake of a scenario.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct ScenarioError {
    /// File or `built in`.
    pub name: String,
    /// At least one: where, what is wrong, what to write.
    pub mistakes: Vec<String>,
}

impl fmt::Display for ScenarioError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.mistakes.len() {
            1 => write!(f, "the scenario has a mistake ({}):", self.name)?,
            n => write!(f, "the scenario has {n} mistakes ({}):", self.name)?,
        }
        for mistake in &self.mistakes {
            write!(f, "\n  {mistake}")?;
        }
        Ok(())
    }
}

impl Scenario {
    /// Reads a scenario and what flags put over it, as (key, value).
    ///
    /// # Errors
    /// Every mistake of both.
    pub fn read(name: &str, text: &str, over: &[(String, String)]) -> Result<Self, ScenarioError> {
        let mut keys = Keys::default();
        match text.parse::<toml::Table>() {
            Ok(table) => keys.file(table),
            Err(error) => keys.mistakes.push(format!("not TOML: {}", error.to_string().trim_end())),
        }
        for (key, value) in over {
            keys.values.insert(key.clone(), value.clone());
        }
        let scenario = keys.scenario();
        keys.refuse_unknown();
        match scenario {
            Some(scenario) if keys.mistakes.is_empty() => Ok(scenario),
            _ => Err(ScenarioError { name: name.to_owned(), mistakes: keys.mistakes }),
        }
    }

    /// The scenario of a kind that is built in.
    ///
    /// # Errors
    /// Mistakes of what is put over it.
    pub fn built_in(kind: Kind, over: &[(String, String)]) -> Result<Self, ScenarioError> {
        Self::read(&format!("built in: {}", kind.as_str()), kind.shipped(), over)
    }
}

/// Settings while they are being read.
#[derive(Debug, Default)]
struct Keys {
    values: BTreeMap<String, String>,
    known: Vec<&'static str>,
    mistakes: Vec<String>,
}

impl Keys {
    fn file(&mut self, table: toml::Table) {
        for (key, value) in table {
            let text = match value {
                toml::Value::String(text) => text,
                toml::Value::Integer(number) => number.to_string(),
                toml::Value::Float(number) => number.to_string(),
                toml::Value::Boolean(truth) => truth.to_string(),
                toml::Value::Datetime(_) | toml::Value::Array(_) | toml::Value::Table(_) => {
                    self.mistakes.push(format!("{key}: one text, number, or true or false stands here"));
                    // It was given, if wrongly: not missing too.
                    continue;
                }
            };
            self.values.insert(key, text);
        }
    }

    fn scenario(&mut self) -> Option<Scenario> {
        let kind = self.take("kind", Err("missing; one of them stands first".to_owned()), |text| {
            let known = Kind::ALL.into_iter().find(|kind| kind.as_str() == text);
            known.ok_or_else(|| "not a kind of run".to_owned())
        });
        if kind.is_none() {
            let kinds: Vec<_> = Kind::ALL.iter().map(|kind| kind.as_str()).collect();
            self.mistakes.push(format!("kind: there are {}", kinds.join(", ")));
        }
        let count = |min: u64, max: u64| {
            move |text: &str| units::count(text, min, max).map(|n| u32::try_from(n).unwrap_or(u32::MAX))
        };
        let second = Duration::from_secs(1);
        let size = |text: &str| match units::size(text)? {
            bytes @ 32..=1_000_000 => Ok(u32::try_from(bytes).unwrap_or(u32::MAX)),
            _ => Err("between 32 bytes and 1 MB".to_owned()),
        };
        let heartbeat = |text: &str| match units::duration(text)? {
            period if (second..=600 * second).contains(&period) => Ok(period),
            _ => Err("between 1s and 10m, as hubs permit".to_owned()),
        };
        Some(Scenario {
            nodes: self.take("nodes", Ok(1000), count(1, 1_000_000))?,
            prefix: self.take("prefix", Ok("load".to_owned()), |text| {
                let longest = format!("{text}-1000000");
                codec::topic::validate_node_name(&longest).map_err(|error| error.to_string())?;
                Ok(text.to_owned())
            })?,
            heartbeat: self.take("heartbeat", Ok(10 * second), heartbeat)?,
            sockets: self.take("sockets", Ok(64), count(1, 4096))?,
            rate: self.take("rate", Ok(0.0), per_second)?,
            in_flight: self.take("in_flight", Ok(256), count(1, 100_000))?,
            tickets: self.take("tickets", Ok(true), units::boolean)?,
            hold: self.take("hold", Ok(10 * second), units::duration)?,
            patience: self.take("patience", Ok(120 * second), units::duration)?,
            backoff: (
                self.take("backoff", Ok(second / 2), units::duration)?,
                self.take("backoff_max", Ok(60 * second), units::duration)?,
            ),
            size: self.take("size", Ok(256), size)?,
            per_s: self.take("per_s", Ok(1.0), per_second)?,
            changes_per_s: self.take("changes_per_s", Ok(1.0), per_second)?,
            killed: self.take("killed", Ok(0), count(0, 256))?,
            times: self.take("times", Ok(1), count(1, 1000))?,
            down: self.take("down", Ok(second), units::duration)?,
            messages: self.take("messages", Ok(10_000), count(1, 1_000_000))?,
            round_trip: self.take("round_trip", Ok(second / 20), units::duration)?,
            kind: kind?,
        })
    }

    /// A setting, or what it is where it is not given. `None`: a mistake was noted.
    fn take<T: Clone>(
        &mut self,
        key: &'static str,
        missing: Result<T, String>,
        read: impl Fn(&str) -> Result<T, String>,
    ) -> Option<T> {
        self.known.push(key);
        let read = match self.values.remove(key) {
            Some(text) => read(&text).map_err(|what| format!("{key} = {text:?}: {what}")),
            None => missing.clone().map_err(|what| format!("{key}: {what}")),
        };
        match read {
            Ok(value) => Some(value),
            Err(mistake) => {
                self.mistakes.push(mistake);
                // The others are looked at all the same, where there is something to go on with.
                missing.ok()
            }
        }
    }

    fn refuse_unknown(&mut self) {
        for key in self.values.keys() {
            self.mistakes.push(format!("{key}: unknown; known are {}", self.known.join(", ")));
        }
    }
}

fn per_second(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(rate) if (0.0..=1e6).contains(&rate) => Ok(rate),
        _ => Err("not a number from 0 to 1000000".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_shipped_scenario_is_of_its_kind() {
        for kind in Kind::ALL {
            assert_eq!(Scenario::built_in(kind, &[]).unwrap().kind, kind);
        }
    }

    #[test]
    fn every_mistake_is_named_at_once() {
        let text = "kind = \"steddy\"\nnodes = 0\nheartbeat = \"10\"\nholdd = \"1s\"\nsize = [1]";
        let error = Scenario::read("bad.toml", text, &[("rate".into(), "fast".into())]).unwrap_err();
        let shown = error.to_string();
        for word in
            ["kind = \"steddy\"", "nodes = \"0\"", "heartbeat = \"10\"", "holdd: unknown", "size:", "rate"]
        {
            assert!(shown.contains(word), "{word} is not in: {shown}");
        }
        assert!(shown.contains("bad.toml"), "{shown}");
    }

    #[test]
    fn what_is_not_toml_is_said() {
        let error = Scenario::read("x", "kind = ", &[]).unwrap_err();
        assert!(error.to_string().contains("not TOML"), "{error}");
    }

    #[test]
    fn a_flag_stands_over_the_file() {
        let over = [("nodes".to_owned(), "7".to_owned())];
        assert_eq!(Scenario::built_in(Kind::Steady, &over).unwrap().nodes, 7);
    }
}
