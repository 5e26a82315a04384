//! What happens to a fleet, as a list of decisions: the same text drives a simulation and real processes.
//!
//! A script needs no random numbers to run: each step says what it does and to whom, and a step that finds
//! nothing to do does nothing. So any part of a script is a script, which is what makes a failing one
//! shrinkable, and a step means the same whatever was removed before it.
//!
//! ```text
//! # any comment
//! seed 17
//! 1200 publish n1 a 2 durable
//! 40 sync n1 3
//! ```
//!
//! Each line is the time since the step before in microseconds, a verb, and its arguments.

use std::{fmt, str::FromStr};

/// Who there is: three nodes, their hub, and room for a copy of one of the nodes.
pub const NAMES: [&str; 5] = ["n1", "n2", "n3", "hub", "copy"];
/// The nodes are the first of [`NAMES`].
pub const NODES: usize = 3;
/// The hub's place in [`NAMES`].
pub const HUB: usize = 3;
/// The copy's place in [`NAMES`].
pub const COPY: usize = 4;
/// Topics that are published to.
pub const TOPICS: [&str; 3] = ["a", "b/c", "alarm/x"];
/// Spaces that are written to by commands.
pub const SPACES: [&str; 2] = ["status", "twin"];

/// A run: ids come from `seed`, everything else from the steps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Script {
    /// Seed of what a broker itself chooses: epochs, incarnations, tokens.
    pub seed: u64,
    /// What happens, in order.
    pub steps: Vec<Step>,
}

/// One decision.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Step {
    /// Time since the step before.
    pub after_us: u32,
    /// What happens then.
    pub what: What,
}

/// A host by its place in [`NAMES`].
pub type Who = usize;

macro_rules! verbs {
    ($($(#[$doc:meta])* $verb:ident = $text:literal { $($field:ident: $type:ty),* },)*) => {
        /// What may happen.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum What {
            $($(#[$doc])* $verb { $($field: $type),* },)*
        }

        impl fmt::Display for What {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                match *self {
                    $(Self::$verb { $($field),* } => {
                        f.write_str($text)?;
                        $(write!(f, " {}", <$type as Word>::word($field))?;)*
                        Ok(())
                    })*
                }
            }
        }

        impl FromStr for What {
            type Err = String;

            fn from_str(text: &str) -> Result<Self, String> {
                let mut words = text.split_whitespace();
                let verb = words.next().unwrap_or_default();
                let mut next = || words.next().ok_or_else(|| format!("{text:?} ends too early"));
                match verb {
                    $($text => Ok(Self::$verb { $($field: <$type as Word>::parse(next()?)?),* }),)*
                    _ => Err(format!("no verb {verb:?}")),
                }
            }
        }
    };
}

verbs! {
    /// A client of a node publishes.
    Publish = "publish" { node: Host, topic: Topic, qos: u8, retain: Flag, durable: Flag, pad: u32 },
    /// A client of the hub publishes to a node.
    Down = "down" { node: Host, retain: Flag },
    /// A node writes, deletes or compares-and-sets a key of a space of its own.
    Write = "write" { node: Host, space: SpaceName, key: u8, how: How },
    /// The source of what nodes are to have changes an object.
    Object = "object" { number: u8, how: How },
    /// The source wants these objects of a node, by bits.
    Want = "want" { node: Host, mask: u8 },
    /// The source has been listed completely.
    Barrier = "barrier" {},
    /// An operator accepts what a node holds back.
    Accept = "accept" { node: Host },
    /// The subscriber of a node handles this many of what it was sent.
    Read = "read" { node: Host, count: u32 },
    /// The subscriber of a node goes away.
    Away = "away" { node: Host },
    /// The subscriber of a node comes back.
    Back = "back" { node: Host },
    /// Watchers at the hub begin anew.
    Watch = "watch" { node: Host },
    /// Some of what waits for the disk is durable.
    Sync = "sync" { host: Host, groups: u32 },
    /// Batches arrive: `count` of them, beginning with this lane of the node's links.
    Carry = "carry" { node: Host, way: Way, lane: u8, count: u32 },
    /// A batch arrives twice.
    Repeat = "repeat" { node: Host, way: Way },
    /// A node dials, although it may be linked.
    Dial = "dial" { node: Host },
    /// A link breaks, and both ends see it.
    Cut = "cut" { node: Host },
    /// A link swallows what goes this way; its ends find out by their heartbeats.
    Deafen = "deafen" { node: Host, way: Way },
    /// From its next link on, what a node sends and gets is as a newer or an older version would have it.
    Version = "version" { node: Host, as_of: Age },
    /// The power is cut and comes back.
    Crash = "crash" { host: Host },
    /// The disk is full, hangs, or is well again.
    Disk = "disk" { host: Host, state: Health },
    /// The wall clock steps.
    Clock = "clock" { host: Host, seconds: i64 },
    /// The wall clock is known to be right, or not.
    Trust = "trust" { host: Host, yes: Flag },
    /// The disk is lost; the host starts with an empty one.
    Wipe = "wipe" { host: Host },
    /// A copy of the disk is put aside.
    Snapshot = "snapshot" { host: Host },
    /// The copy that was put aside comes back as it is.
    Rollback = "rollback" { host: Host },
    /// The copy that was put aside comes back by `octobus restore`: new epochs and incarnation.
    Restore = "restore" { host: Host },
    /// A second machine starts with a copy of a node's disk; it knows that it is one (`fresh`), or not.
    Clone = "clone" { node: Host, fresh: Flag },
    /// The copy is switched off.
    Unclone = "unclone" {},
    /// The host restarts with the stream `alarms` declared, or not.
    Alarms = "alarms" { node: Host, declared: Flag },
    /// The host restarts with this quota of its default stream.
    Quota = "quota" { host: Host, bytes: u64 },
}

/// An argument as a word.
trait Word: Sized {
    fn word(self) -> String;
    fn parse(word: &str) -> Result<Self, String>;
}

macro_rules! number_words {
    ($($type:ty),*) => {$(
        impl Word for $type {
            fn word(self) -> String {
                self.to_string()
            }

            fn parse(word: &str) -> Result<Self, String> {
                word.parse().map_err(|_not_a_number| format!("{word:?} is no number"))
            }
        }
    )*};
}

number_words!(u8, u32, u64, i64);

/// A host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Host(pub Who);

/// One of [`TOPICS`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Topic(pub usize);

/// One of [`SPACES`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SpaceName(pub usize);

fn find(word: &str, names: &[&str]) -> Result<usize, String> {
    names.iter().position(|name| *name == word).ok_or_else(|| format!("{word:?} is none of {names:?}"))
}

macro_rules! named_words {
    ($($type:ident of $names:ident),*) => {$(
        impl Word for $type {
            fn word(self) -> String {
                $names[self.0].to_owned()
            }

            fn parse(word: &str) -> Result<Self, String> {
                find(word, &$names).map(Self)
            }
        }
    )*};
}

named_words!(Host of NAMES, Topic of TOPICS, SpaceName of SPACES);

macro_rules! choice_words {
    ($($(#[$doc:meta])* $type:ident { $($(#[$of:meta])* $name:ident = $text:literal),* })*) => {$(
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
        pub enum $type { $($(#[$of])* $name),* }

        impl Word for $type {
            fn word(self) -> String {
                match self { $(Self::$name => $text.to_owned()),* }
            }

            fn parse(word: &str) -> Result<Self, String> {
                match word {
                    $($text => Ok(Self::$name),)*
                    _ => Err(format!("{word:?} is no {}", stringify!($type))),
                }
            }
        }
    )*};
}

choice_words! {
    /// Yes or no.
    Flag {
        /// No.
        No = "no",
        /// Yes.
        Yes = "yes"
    }
    /// A direction on a link.
    Way {
        /// To the hub.
        Up = "up",
        /// To the node.
        Down = "down",
        /// Both.
        Both = "both"
    }
    /// What a write does.
    How {
        /// Sets a value.
        Set = "set",
        /// Deletes.
        Delete = "delete",
        /// Sets a value if the key is as it was last seen.
        Compare = "compare"
    }
    /// What a disk does.
    Health {
        /// It works.
        Well = "well",
        /// It has little room left: what it held back for deletions and cursors.
        Low = "low",
        /// It has no room.
        Full = "full",
        /// It answers nothing.
        Stuck = "stuck"
    }
    /// How old the software of a link's other end is.
    Age {
        /// As this one.
        Same = "same",
        /// It sends what this one does not know.
        Newer = "newer",
        /// It knows only what the first version knew.
        Older = "older"
    }
}

impl Flag {
    /// As a truth value.
    #[must_use]
    pub fn yes(self) -> bool {
        self == Self::Yes
    }
}

impl From<bool> for Flag {
    fn from(yes: bool) -> Self {
        if yes { Self::Yes } else { Self::No }
    }
}

impl fmt::Display for Script {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "seed {}", self.seed)?;
        for step in &self.steps {
            writeln!(f, "{} {}", step.after_us, step.what)?;
        }
        Ok(())
    }
}

impl FromStr for Script {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut script = Self { seed: 0, steps: Vec::new() };
        let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
        for line in lines {
            let (first, rest) = line.split_once(' ').ok_or_else(|| format!("{line:?} is one word"))?;
            if first == "seed" {
                script.seed = Word::parse(rest)?;
            } else {
                script.steps.push(Step { after_us: Word::parse(first)?, what: rest.parse()? });
            }
        }
        Ok(script)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_script_reads_back_as_it_was_written() {
        let whats = [
            What::Publish {
                node: Host(1),
                topic: Topic(2),
                qos: 2,
                retain: Flag::Yes,
                durable: Flag::No,
                pad: 7,
            },
            What::Carry { node: Host(0), way: Way::Up, lane: 3, count: 9 },
            What::Clock { host: Host(HUB), seconds: -3600 },
            What::Write { node: Host(2), space: SpaceName(1), key: 4, how: How::Compare },
            What::Unclone {},
        ];
        let steps = whats.into_iter().map(|what| Step { after_us: 12, what }).collect();
        let script = Script { seed: 42, steps };
        assert_eq!(script.to_string().parse::<Script>(), Ok(script));
    }

    #[test]
    fn nonsense_is_refused_and_named() {
        for (text, part) in
            [("5 fly n1", "fly"), ("5 crash n9", "n9"), ("x crash n1", "x"), ("5 sync n1", "early")]
        {
            let error = text.parse::<Script>().expect_err("nonsense");
            assert!(error.contains(part), "{error}");
        }
    }
}
