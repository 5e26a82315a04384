//! `[[stream]]`: which messages belong to which stream, and what is kept of it.

use std::{sync::Arc, time::Duration};

use broker::core::{self, ACKED_MIN, DEAD_LETTER_STREAM, Full, Policy};
use codec::{Class, Filter};

use super::{DAY, DEFAULT_STREAM, MINUTE, SECOND, filter, layers::Layers, name, units, within};

/// A stream: QoS >= 1 messages belong to the first whose filter matches.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StreamConfig {
    /// Its name.
    pub name: Arc<str>,
    /// Which topics.
    pub filters: Vec<Filter>,
    /// Class of all its records.
    pub class: Class,
    /// What is kept of it.
    pub policy: Policy,
}

/// Streams as the core takes them: the declared ones, and the policy of all others.
#[must_use]
pub fn for_core(streams: &[StreamConfig]) -> (Vec<core::StreamConfig>, Option<core::StreamConfig>) {
    let mut streams: Vec<core::StreamConfig> = streams
        .iter()
        .map(|stream| core::StreamConfig {
            name: Arc::clone(&stream.name),
            filters: stream.filters.clone(),
            class: stream.class,
            policy: stream.policy.clone(),
        })
        .collect();
    let default = streams.pop();
    (streams, default)
}

pub(super) fn read(layers: &mut Layers) -> Vec<StreamConfig> {
    let mut streams = layers.take_tables("stream", read_one).unwrap_or_default();
    for at in 1..streams.len() {
        if streams[..at].iter().any(|earlier| earlier.name == streams[at].name) {
            layers.mistake(format!("stream {:?}", streams[at].name), "is declared twice".to_owned());
        }
    }
    let default = streams.iter().position(|stream| &*stream.name == DEFAULT_STREAM);
    let default = default.map_or_else(default_stream, |at| streams.remove(at));
    streams.push(default);
    streams
}

fn read_one(layers: &mut Layers, prefix: &str) -> Option<StreamConfig> {
    let name = layers.field(prefix, "name", None, stream_name);
    let is_default = name.as_deref() == Some(DEFAULT_STREAM);
    let filters = if is_default {
        Some(all_topics()) // a `filters` field left in the table is reported as unknown
    } else {
        layers.list_field(prefix, "filters", filter)
    };
    let class = layers.field(prefix, "class", Some(Class::Telemetry), stream_class);
    let policy = read_policy(layers, prefix, class.unwrap_or(Class::Telemetry));
    Some(StreamConfig { name: name?, filters: filters?, class: class?, policy: policy? })
}

fn read_policy(layers: &mut Layers, prefix: &str, class: Class) -> Option<Policy> {
    let bytes_max = layers.field(prefix, "max_bytes", Some(STREAM_BYTES), stream_bytes);
    let some = |parse: fn(&str) -> Result<u64, String>| move |text: &str| parse(text).map(Some);
    let count_max =
        layers.field(prefix, "max_count", Some(None), some(|text| units::count(text, 1, COUNT_MAX)));
    let mut time = |key: &str, min: Duration| {
        layers.field(prefix, key, Some(None), |text| within(min, 3_650 * DAY)(text).map(Some))
    };
    let (age_max, ttl) = (time("max_age", MINUTE), time("ttl", SECOND));
    let retain_acked = time("retain_acked", ACKED_MIN);
    let window =
        layers.field(prefix, "thin_window", Some(None), |text| within(SECOND / 10, DAY)(text).map(Some));
    let full = layers.field(prefix, "full", Some(Policy::of_class(class, 0).full), full)?;
    let place = format!("[[stream]], key {prefix}.full");
    let full = match (full, window?) {
        (Full::Thin { .. }, _) if class == Class::Alarm => {
            let what = "\"thin\" would remove alarms: write \"reject\", or \"drop-oldest\" if the newest matter most";
            layers.mistake(place, what.to_owned());
            return None;
        }
        (Full::Thin { window }, given) => Full::Thin { window: given.unwrap_or(window) },
        (_, Some(_)) => {
            layers.mistake(place, "must be \"thin\" for thin_window to have a meaning".to_owned());
            return None;
        }
        (full, None) => full,
    };
    Some(Policy {
        bytes_max: bytes_max?,
        count_max: count_max?,
        age_max: age_max?,
        full,
        ttl: ttl?,
        retain_acked: retain_acked?,
    })
}

const STREAM_BYTES: u64 = 1 << 30;
const COUNT_MAX: u64 = 1_000_000_000_000;

fn default_stream() -> StreamConfig {
    let class = Class::Telemetry;
    let policy = Policy::of_class(class, STREAM_BYTES);
    StreamConfig { name: Arc::from(DEFAULT_STREAM), filters: all_topics(), class, policy }
}

pub(super) fn all_topics() -> Vec<Filter> {
    vec![Filter::parse("#").expect("# is a filter")]
}

fn stream_name(text: &str) -> Result<Arc<str>, String> {
    match text {
        "down" => Err("the name of what comes down from the hub; choose another".to_owned()),
        DEAD_LETTER_STREAM => Err("the name of what could not be taken; choose another".to_owned()),
        _ => name(text).map(Arc::from),
    }
}

fn stream_class(text: &str) -> Result<Class, String> {
    [Class::Alarm, Class::Event, Class::Telemetry, Class::Bulk]
        .into_iter()
        .find(|class| class.as_str() == text)
        .ok_or_else(|| {
            "not a class of streams; write \"alarm\", \"event\", \"telemetry\" or \"bulk\"".to_owned()
        })
}

fn full(text: &str) -> Result<Full, String> {
    match text {
        "drop-oldest" => Ok(Full::DropOldest),
        "reject" => Ok(Full::Reject),
        "thin" => Ok(Full::Thin { window: SECOND }),
        _ => Err("not a policy; write \"drop-oldest\", \"reject\" or \"thin\"".to_owned()),
    }
}

pub(super) const fn full_name(full: Full) -> &'static str {
    match full {
        Full::DropOldest => "drop-oldest",
        Full::Reject => "reject",
        Full::Thin { .. } => "thin",
    }
}

fn stream_bytes(text: &str) -> Result<u64, String> {
    const MIN: u64 = 1 << 20;
    match units::size(text)? {
        bytes if bytes >= MIN => Ok(bytes),
        _ => Err(format!("less than {}: a stream holds at least some records", units::show_size(MIN))),
    }
}
