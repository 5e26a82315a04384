//! `[[budget]]`: what a node may spend on the links above it.

use std::sync::Arc;

use broker::core::{Budget, Rate};
use codec::Class;
use toml::{Table, Value};

use super::{layers::Layers, name, units};

/// Least burst: a bucket that holds less than a packet would only add wake-ups.
const BURST_MIN: u64 = 4 << 10;

/// Reads every `[[budget]]` of the file.
pub(super) fn read(layers: &mut Layers) -> Vec<Budget> {
    let read = |layers: &mut Layers, prefix: &str| {
        let name = layers.field(prefix, "name", None, |text| name(text).map(Arc::<str>::from));
        let streams = layers.optional_list_field(prefix, "streams", |text| super::name(text).map(Arc::from));
        let classes = layers.optional_list_field(prefix, "classes", class);
        let size = |text: &str| units::size(text).and_then(positive).map(Some);
        let rate = layers.field(prefix, "rate", Some(None), size);
        let burst = layers.field(prefix, "burst", Some(None), size);
        let windows = layers.optional_list_field(prefix, "windows", window);
        let per_day = layers.field(prefix, "per_day", Some(None), size);
        let per_month = layers.field(prefix, "per_month", Some(None), size);
        let (rate, burst, per_day, per_month) = (rate?, burst?, per_day?, per_month?);
        let (name, windows) = (name?, windows?);
        if burst.is_some() && rate.is_none() {
            layers.mistake(format!("budget {name:?}"), "has a burst without a rate".to_owned());
        }
        if rate.is_none() && windows.is_empty() && per_day.is_none() && per_month.is_none() {
            let what = "limits nothing: give it a rate, windows, per_day or per_month".to_owned();
            layers.mistake(format!("budget {name:?}"), what);
        }
        let rate = rate.map(|bytes| Rate { bytes, burst: burst.unwrap_or(bytes).max(BURST_MIN) });
        Some(Budget { name, streams: streams?, classes: classes?, rate, windows, per_day, per_month })
    };
    let budgets = layers.take_tables("budget", read).unwrap_or_default();
    for at in 1..budgets.len() {
        if budgets[..at].iter().any(|earlier| earlier.name == budgets[at].name) {
            layers.mistake(format!("budget {:?}", budgets[at].name), "is declared twice".to_owned());
        }
    }
    budgets
}

/// As it is read.
pub(super) fn show(budget: &Budget) -> Value {
    let text = |value: String| Value::String(value);
    let list = |values: Vec<String>| Value::Array(values.into_iter().map(Value::String).collect());
    let mut fields = Table::new();
    fields.insert("name".to_owned(), text(budget.name.to_string()));
    fields.insert("streams".to_owned(), list(budget.streams.iter().map(ToString::to_string).collect()));
    fields.insert(
        "classes".to_owned(),
        list(budget.classes.iter().map(|class| class.as_str().to_owned()).collect()),
    );
    let clock = |minute: u16| format!("{:02}:{:02}", minute / 60, minute % 60);
    let window = |(from, to): &(u16, u16)| format!("{}-{}", clock(*from), clock(*to));
    fields.insert("windows".to_owned(), list(budget.windows.iter().map(window).collect()));
    let sizes = [
        ("rate", budget.rate.map(|rate| rate.bytes)),
        ("burst", budget.rate.map(|rate| rate.burst)),
        ("per_day", budget.per_day),
        ("per_month", budget.per_month),
    ];
    for (key, size) in sizes {
        if let Some(size) = size {
            fields.insert(key.to_owned(), text(units::show_size(size)));
        }
    }
    Value::Table(fields)
}

fn positive(bytes: u64) -> Result<u64, String> {
    if bytes > 0 { Ok(bytes) } else { Err("is nothing: leave the stream out of [export] instead".to_owned()) }
}

fn class(text: &str) -> Result<Class, String> {
    [Class::Alarm, Class::State, Class::Event, Class::Telemetry, Class::Bulk]
        .into_iter()
        .find(|class| class.as_str() == text)
        .ok_or_else(|| {
            "not a class that a budget can hold; write \"alarm\", \"state\", \"event\", \"telemetry\" or \"bulk\""
                .to_owned()
        })
}

/// `HH:MM-HH:MM` as minutes of the day.
fn window(text: &str) -> Result<(u16, u16), String> {
    let wrong = || "not a window of the UTC day; write for example \"22:00-06:00\"".to_owned();
    let minute = |text: &str| {
        let (hours, minutes) = text.split_once(':')?;
        let digits = |text: &str| {
            let two = text.len() == 2 && text.bytes().all(|byte| byte.is_ascii_digit());
            two.then(|| text.parse::<u16>().ok()).flatten()
        };
        let (hours, minutes) = (digits(hours)?, digits(minutes)?);
        let valid = minutes < 60 && (hours < 24 || (hours == 24 && minutes == 0));
        valid.then_some(hours * 60 + minutes)
    };
    let (from, to) = text.split_once('-').ok_or_else(wrong)?;
    let (from, to) = (minute(from).ok_or_else(wrong)?, minute(to).ok_or_else(wrong)?);
    if from == to || from == 24 * 60 { Err(wrong()) } else { Ok((from, to)) }
}
