//! Label and field selectors.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::json;

/// Conditions that must all hold.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Labels(Vec<Condition>);

#[derive(Debug, Clone, PartialEq, Eq)]
struct Condition {
    key: String,
    test: Test,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Test {
    In(Vec<String>),
    NotIn(Vec<String>),
    Exists,
    Absent,
    Greater(i64),
    Less(i64),
}

/// A selector cannot be understood.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub(crate) struct SelectorError(String);

impl Labels {
    /// `a=b,c!=d,e in (f,g),!h,i>1`
    pub(crate) fn parse(text: &str) -> Result<Self, SelectorError> {
        let mut conditions = Vec::new();
        for part in split_outside_parentheses(text) {
            let part = part.trim();
            if !part.is_empty() {
                conditions.push(condition(part)?);
            } else if text.trim().contains(',') {
                return Err(SelectorError(format!("found ',', expected: identifier in {text:?}")));
            }
        }
        Ok(Self(conditions))
    }

    /// From a `LabelSelector`; an absent one selects nothing.
    pub(crate) fn of(selector: Option<&Value>) -> Option<Self> {
        let selector = selector?;
        let mut conditions = Vec::new();
        for (key, value) in json::map(selector, "matchLabels").into_iter().flatten() {
            let value = value.as_str().unwrap_or_default().to_owned();
            conditions.push(Condition { key: key.clone(), test: Test::In(vec![value]) });
        }
        for expression in json::list(selector, "matchExpressions") {
            let texts = json::list(expression, "values").iter().filter_map(Value::as_str);
            let values: Vec<String> = texts.map(str::to_owned).collect();
            let number = || values.first().and_then(|value| value.parse().ok());
            let test = match json::text(expression, "operator") {
                "In" => Test::In(values),
                "NotIn" => Test::NotIn(values),
                "Exists" => Test::Exists,
                "DoesNotExist" => Test::Absent,
                "Gt" => Test::Greater(number()?),
                "Lt" => Test::Less(number()?),
                _ => return None,
            };
            conditions.push(Condition { key: json::text(expression, "key").to_owned(), test });
        }
        Some(Self(conditions))
    }

    /// From a map of labels, as services have it.
    pub(crate) fn exactly(labels: &serde_json::Map<String, Value>) -> Self {
        let conditions = labels.iter().map(|(key, value)| Condition {
            key: key.clone(),
            test: Test::In(vec![value.as_str().unwrap_or_default().to_owned()]),
        });
        Self(conditions.collect())
    }

    /// Whether there are no conditions.
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether an object's labels meet all conditions.
    pub(crate) fn select(&self, object: &Value) -> bool {
        self.matches(json::map(object, "metadata.labels"))
    }

    /// Whether labels meet all conditions.
    pub(crate) fn matches(&self, labels: Option<&serde_json::Map<String, Value>>) -> bool {
        self.0.iter().all(|condition| {
            let value = labels.and_then(|labels| labels.get(&condition.key)).and_then(Value::as_str);
            condition.test.holds(value)
        })
    }
}

impl Test {
    fn holds(&self, value: Option<&str>) -> bool {
        let number = || value.and_then(|value| value.parse::<i64>().ok());
        match self {
            Self::In(values) => value.is_some_and(|value| values.iter().any(|wanted| wanted == value)),
            Self::NotIn(values) => value.is_none_or(|value| values.iter().all(|refused| refused != value)),
            Self::Exists => value.is_some(),
            Self::Absent => value.is_none(),
            Self::Greater(than) => number().is_some_and(|number| number > *than),
            Self::Less(than) => number().is_some_and(|number| number < *than),
        }
    }
}

fn condition(part: &str) -> Result<Condition, SelectorError> {
    let made = |key: &str, test| {
        let key = key.trim();
        if is_label_key(key) {
            Ok(Condition { key: key.to_owned(), test })
        } else {
            Err(SelectorError(format!("unable to parse requirement: invalid label key {key:?}")))
        }
    };
    let value = |text: &str| {
        let text = text.trim();
        if is_label_value(text) {
            Ok(text.to_owned())
        } else {
            Err(SelectorError(format!("unable to parse requirement: invalid label value {text:?}")))
        }
    };
    if let Some(key) = part.strip_prefix('!') {
        return made(key, Test::Absent);
    }
    if let Some((left, values)) = part.strip_suffix(')').and_then(|part| part.split_once('(')) {
        let values: Result<Vec<String>, _> = values.split(',').map(value).collect();
        let mut words = left.split_whitespace();
        return match (words.next(), words.next(), words.next()) {
            (Some(key), Some("in"), None) => made(key, Test::In(values?)),
            (Some(key), Some("notin"), None) => made(key, Test::NotIn(values?)),
            _ => Err(SelectorError(format!("unable to parse requirement: {part:?}"))),
        };
    }
    if let Some((key, wanted)) = part.split_once("!=") {
        return made(key, Test::NotIn(vec![value(wanted)?]));
    }
    if let Some((key, wanted)) = part.split_once("==").or_else(|| part.split_once('=')) {
        return made(key, Test::In(vec![value(wanted)?]));
    }
    let number = |text: &str| {
        text.trim().parse().map_err(|_| SelectorError(format!("{text:?} must be an integer in {part:?}")))
    };
    if let Some((key, than)) = part.split_once('>') {
        return made(key, Test::Greater(number(than)?));
    }
    if let Some((key, than)) = part.split_once('<') {
        return made(key, Test::Less(number(than)?));
    }
    made(part, Test::Exists)
}

fn split_outside_parentheses(text: &str) -> Vec<&str> {
    let (mut parts, mut start, mut depth) = (Vec::new(), 0, 0_i32);
    for (at, c) in text.char_indices() {
        match c {
            '(' => depth += 1,
            ')' => depth -= 1,
            ',' if depth == 0 => {
                parts.push(&text[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    parts.push(&text[start..]);
    parts
}

/// `[prefix/]name` of a label, annotation, taint or finalizer.
pub(crate) fn is_label_key(key: &str) -> bool {
    let (prefix, name) = match key.split_once('/') {
        Some((prefix, name)) => (Some(prefix), name),
        None => (None, key),
    };
    !name.is_empty() && is_label_value(name) && prefix.is_none_or(crate::names::is_subdomain)
}

/// A label's value.
pub(crate) fn is_label_value(value: &str) -> bool {
    let inner = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    let outer = |byte: Option<&u8>| byte.is_none_or(u8::is_ascii_alphanumeric);
    let bytes = value.as_bytes();
    bytes.len() <= 63 && bytes.iter().all(|byte| inner(*byte)) && outer(bytes.first()) && outer(bytes.last())
}

/// Field conditions that must all hold.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Fields(Vec<(String, bool, String)>);

impl Fields {
    /// `metadata.name=a,spec.nodeName!=b`, of fields that the resource selects by.
    pub(crate) fn parse(text: &str, known: &[&str]) -> Result<Self, SelectorError> {
        let mut conditions = Vec::new();
        for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
            let split = match part.split_once("!=") {
                Some((field, value)) => Some((field, false, value)),
                None => part
                    .split_once("==")
                    .or_else(|| part.split_once('='))
                    .map(|(field, value)| (field, true, value)),
            };
            let Some((field, equal, value)) = split else {
                return Err(SelectorError(format!("invalid selector: '{text}'; can't understand '{part}'")));
            };
            if !known.contains(&field) {
                let listed: Vec<String> = known.iter().map(|known| format!("\"{known}\"")).collect();
                return Err(SelectorError(format!(
                    "\"{field}\" is not a known field selector: only {}",
                    listed.join(", ")
                )));
            }
            conditions.push((field.to_owned(), equal, value.to_owned()));
        }
        Ok(Self(conditions))
    }

    /// The one name that objects can have, if the selector says it.
    pub(crate) fn name(&self) -> Option<&str> {
        let name = self.0.iter().find(|(field, equal, _)| field == "metadata.name" && *equal);
        name.map(|(_, _, value)| value.as_str())
    }

    /// Whether an object meets all conditions.
    pub(crate) fn select(&self, object: &Value) -> bool {
        self.0.iter().all(|(field, equal, wanted)| (field_text(object, field) == *wanted) == *equal)
    }
}

fn field_text(object: &Value, field: &str) -> String {
    match json::at(object, field) {
        Some(Value::String(text)) => text.clone(),
        Some(Value::Bool(truth)) => truth.to_string(),
        Some(Value::Number(number)) => number.to_string(),
        // What is left out when false or 0 is compared as such.
        _ if field == "spec.unschedulable" || field == "spec.hostNetwork" => "false".to_owned(),
        _ if field == "status.successful" => json::int(object, "status.succeeded").to_string(),
        _ if field == "source" => json::text(object, "reportingComponent").to_owned(),
        _ => String::new(),
    }
}

/// A map of labels as the text of a selector, in order.
pub(crate) fn written(labels: &BTreeMap<String, String>) -> String {
    let pairs: Vec<String> = labels.iter().map(|(key, value)| format!("{key}={value}")).collect();
    pairs.join(",")
}

/// A `LabelSelector` as text.
pub(crate) fn selector_text(selector: Option<&Value>) -> String {
    let Some(selector) = selector else { return String::new() };
    let labels = json::map(selector, "matchLabels").into_iter().flatten();
    let labels: BTreeMap<String, String> =
        labels.map(|(key, value)| (key.clone(), value.as_str().unwrap_or_default().to_owned())).collect();
    let mut parts: Vec<String> = if labels.is_empty() { Vec::new() } else { vec![written(&labels)] };
    for expression in json::list(selector, "matchExpressions") {
        let key = json::text(expression, "key");
        let values: Vec<&str> = json::list(expression, "values").iter().filter_map(Value::as_str).collect();
        parts.push(match json::text(expression, "operator") {
            "In" => format!("{key} in ({})", values.join(",")),
            "NotIn" => format!("{key} notin ({})", values.join(",")),
            "DoesNotExist" => format!("!{key}"),
            _ => key.to_owned(),
        });
    }
    parts.join(",")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn selects(text: &str, labels: &Value) -> bool {
        Labels::parse(text).unwrap().select(&json!({"metadata": {"labels": labels}}))
    }

    #[test]
    fn every_form_of_a_condition_is_understood() {
        let labels = json!({"app": "web", "n": "5", "example.com/x": ""});
        for yes in [
            "app=web",
            "app==web",
            "app!=db",
            "app in (web,db)",
            "app notin (db)",
            "app",
            "!zone",
            "zone!=a",
            "n>4,n<6",
            "",
            "example.com/x",
            "example.com/x=",
        ] {
            assert!(selects(yes, &labels), "{yes}");
        }
        for no in ["app=db", "zone", "!app", "app in (db)", "zone in (a)", "n>5", "app=web,zone"] {
            assert!(!selects(no, &labels), "{no}");
        }
        for wrong in ["=a", "app=a b", "app in web)", "a,,b", "n>x", "-a"] {
            assert!(Labels::parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_field_that_nobody_selects_by_is_named() {
        let error = Fields::parse("data.x=1", &["metadata.name", "metadata.namespace"]).unwrap_err();
        let wanted =
            "\"data.x\" is not a known field selector: only \"metadata.name\", \"metadata.namespace\"";
        assert_eq!(error.to_string(), wanted);
        let node = Fields::parse("spec.unschedulable=false", &["spec.unschedulable"]).unwrap();
        assert!(node.select(&json!({"spec": {}})));
    }
}
