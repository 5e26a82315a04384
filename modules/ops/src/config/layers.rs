//! File, environment and flags as one set of named settings.
//!
//! A reader *takes* each setting it knows; what nobody took is unknown. So there is no second list of
//! keys to keep in step, and every mistake of every layer is found in one pass.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    path::PathBuf,
};

/// A setting's names in the three layers. An empty name: not settable there.
#[derive(Debug, Clone, Copy)]
pub(super) struct Key {
    /// Dotted path in the file.
    pub(super) path: &'static str,
    /// Environment variable.
    pub(super) env: &'static str,
    /// Flag of the command line.
    pub(super) flag: &'static str,
}

/// What the process was given, before it means anything.
#[derive(Debug, Default)]
pub struct Sources {
    /// Name and text of the file.
    pub file: Option<(PathBuf, String)>,
    /// Every variable of the environment; those that do not begin with `OCTOBUS_` are ignored.
    pub env: Vec<(String, String)>,
    /// Flags with their values.
    pub flags: Vec<(&'static str, String)>,
}

/// One mistake: where, what, and what to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mistake {
    /// File and key, variable, or flag.
    pub place: String,
    /// What is wrong there and what to write instead.
    pub what: String,
}

/// Every mistake in the configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigError {
    /// At least one.
    pub mistakes: Vec<Mistake>,
}

impl std::error::Error for ConfigError {}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.mistakes.len() {
            1 => write!(f, "the configuration has a mistake:")?,
            n => write!(f, "the configuration has {n} mistakes:")?,
        }
        for mistake in &self.mistakes {
            write!(f, "\n  {}: {}", mistake.place, mistake.what)?;
        }
        Ok(())
    }
}

/// The layers while they are being read.
#[derive(Debug)]
pub(super) struct Layers {
    file_name: String,
    file: BTreeMap<String, toml::Value>,
    env: BTreeMap<String, String>,
    flags: BTreeMap<&'static str, String>,
    known: Vec<Key>,
    mistakes: Vec<Mistake>,
}

/// A value and the layer that gave it.
struct Given {
    place: String,
    value: Value,
}

enum Value {
    One(String),
    Many(Vec<String>),
    Wrong,
}

impl Layers {
    pub(super) fn new(sources: Sources) -> Self {
        let mut layers = Self {
            file_name: String::new(),
            file: BTreeMap::new(),
            env: sources.env.into_iter().filter(|(name, _)| name.starts_with("OCTOBUS_")).collect(),
            flags: sources.flags.into_iter().collect(),
            known: Vec::new(),
            mistakes: Vec::new(),
        };
        if let Some((name, text)) = sources.file {
            layers.file_name = name.display().to_string();
            match text.parse::<toml::Table>() {
                Ok(table) => flatten("", table, &mut layers.file),
                Err(error) => {
                    layers.mistake(
                        layers.file_name.clone(),
                        format!("not TOML: {}", error.to_string().trim_end()),
                    );
                }
            }
        }
        layers
    }

    pub(super) fn mistake(&mut self, place: String, what: String) {
        self.mistakes.push(Mistake { place, what });
    }

    /// The name under which a person best knows a setting, whichever layer may have set it.
    pub(super) fn name(&self, key: Key) -> String {
        if key.flag.is_empty() {
            format!("key {}", key.path)
        } else {
            format!("key {} ({}, {})", key.path, key.env, key.flag)
        }
    }

    /// Whether this flag was given. Does not take it.
    pub(super) fn has_flag(&self, key: Key) -> bool {
        self.flags.contains_key(key.flag)
    }

    /// The value of a setting, or `None` where no layer gives one or what is given is a mistake.
    pub(super) fn take<T>(&mut self, key: Key, parse: impl Fn(&str) -> Result<T, String>) -> Option<T> {
        let given = self.given(key)?;
        match given.value {
            Value::One(text) => match parse(&text) {
                Ok(value) => return Some(value),
                Err(what) => self.mistake(format!("{} = {text:?}", given.place), what),
            },
            Value::Many(_) | Value::Wrong => {
                self.mistake(given.place, "takes one value, not a list or table".to_owned());
            }
        }
        None
    }

    /// A list: an array in the file, separated by commas elsewhere.
    pub(super) fn take_list<T>(
        &mut self,
        key: Key,
        parse: impl Fn(&str) -> Result<T, String>,
    ) -> Option<Vec<T>> {
        let given = self.given(key)?;
        let texts = match given.value {
            Value::Many(texts) => texts,
            Value::One(text) => {
                text.split(',').map(str::trim).filter(|part| !part.is_empty()).map(str::to_owned).collect()
            }
            Value::Wrong => {
                self.mistake(given.place, "takes a list of texts".to_owned());
                return None;
            }
        };
        let mut values = Vec::with_capacity(texts.len());
        for text in &texts {
            match parse(text) {
                Ok(value) => values.push(value),
                Err(what) => self.mistake(format!("{} {text:?}", given.place), what),
            }
        }
        Some(values)
    }

    /// An array of tables, which only the file can give. `read` takes each table's fields.
    pub(super) fn take_tables<T>(
        &mut self,
        path: &'static str,
        read: impl Fn(&mut Self, &str) -> Option<T>,
    ) -> Option<Vec<T>> {
        self.known.push(Key { path, env: "", flag: "" });
        let place = format!("{}, key {path}", self.file_name);
        let array = match self.file.remove(path)? {
            toml::Value::Array(array) => array,
            _other => {
                self.mistake(place, format!("write [[{path}]] above each"));
                return None;
            }
        };
        let mut values = Vec::with_capacity(array.len());
        for (index, item) in array.into_iter().enumerate() {
            let prefix = format!("{path}[{index}]");
            if let toml::Value::Table(table) = item {
                flatten(&prefix, table, &mut self.file);
                values.extend(read(self, &prefix));
            } else {
                self.mistake(place.clone(), format!("write [[{path}]] above each"));
            }
        }
        Some(values)
    }

    /// A field of a table of [`take_tables`](Self::take_tables), required unless there is a default.
    pub(super) fn field<T>(
        &mut self,
        prefix: &str,
        name: &str,
        default: Option<T>,
        parse: impl Fn(&str) -> Result<T, String>,
    ) -> Option<T> {
        let place = format!("{}, key {prefix}.{name}", self.file_name);
        let what = match self.file.remove(&format!("{prefix}.{name}")).map(Value::from) {
            Some(Value::One(text)) => match parse(&text) {
                Ok(value) => return Some(value),
                Err(what) => format!("{text:?} is {what}"),
            },
            Some(_) => "takes one value".to_owned(),
            None if default.is_some() => return default,
            None => "is missing".to_owned(),
        };
        self.mistake(place, what);
        None
    }

    /// A list field of a table of [`take_tables`](Self::take_tables); required.
    pub(super) fn list_field<T>(
        &mut self,
        prefix: &str,
        name: &str,
        parse: impl Fn(&str) -> Result<T, String>,
    ) -> Option<Vec<T>> {
        let place = format!("{}, key {prefix}.{name}", self.file_name);
        let Some(Value::Many(texts)) = self.file.remove(&format!("{prefix}.{name}")).map(Value::from) else {
            self.mistake(place, "is missing or not a list of texts".to_owned());
            return None;
        };
        let mut values = Vec::with_capacity(texts.len());
        for text in &texts {
            match parse(text) {
                Ok(value) => values.push(value),
                Err(what) => self.mistake(format!("{place} {text:?}"), what),
            }
        }
        Some(values)
    }

    /// As [`list_field`](Self::list_field); a list that is left out is empty.
    pub(super) fn optional_list_field<T>(
        &mut self,
        prefix: &str,
        name: &str,
        parse: impl Fn(&str) -> Result<T, String>,
    ) -> Option<Vec<T>> {
        if self.file.contains_key(&format!("{prefix}.{name}")) {
            self.list_field(prefix, name, parse)
        } else {
            Some(Vec::new())
        }
    }

    /// Ends the reading: what nobody took is unknown.
    pub(super) fn finish(mut self) -> Result<(), ConfigError> {
        let paths: BTreeSet<&str> = self.known.iter().map(|key| key.path).collect();
        for path in std::mem::take(&mut self.file).into_keys() {
            let place = format!("{}, key {path}", self.file_name);
            let what = format!("there is no such key{}", suggestion(&path, paths.iter().copied()));
            self.mistakes.push(Mistake { place, what });
        }
        let names: Vec<&str> = self.known.iter().map(|key| key.env).filter(|env| !env.is_empty()).collect();
        for name in std::mem::take(&mut self.env).into_keys() {
            let what = format!("there is no such setting{}", suggestion(&name, names.iter().copied()));
            self.mistakes.push(Mistake { place: format!("{name} (environment)"), what });
        }
        for flag in std::mem::take(&mut self.flags).into_keys() {
            self.mistakes.push(Mistake { place: flag.to_owned(), what: "has no meaning here".to_owned() });
        }
        if self.mistakes.is_empty() { Ok(()) } else { Err(ConfigError { mistakes: self.mistakes }) }
    }

    /// Takes a setting out of every layer; the highest that has it wins.
    fn given(&mut self, key: Key) -> Option<Given> {
        self.known.push(key);
        let file = self.file.remove(key.path).map(|value| Given {
            place: format!("{}, key {}", self.file_name, key.path),
            value: Value::from(value),
        });
        let env = self
            .env
            .remove(key.env)
            .map(|text| Given { place: format!("{} (environment)", key.env), value: Value::One(text) });
        let flag = self
            .flags
            .remove(key.flag)
            .map(|text| Given { place: key.flag.to_owned(), value: Value::One(text) });
        flag.or(env).or(file)
    }
}

impl From<toml::Value> for Value {
    fn from(value: toml::Value) -> Self {
        match value {
            toml::Value::String(text) => Self::One(text),
            toml::Value::Integer(number) => Self::One(number.to_string()),
            toml::Value::Boolean(flag) => Self::One(flag.to_string()),
            toml::Value::Array(items) => items
                .into_iter()
                .map(|item| match item {
                    toml::Value::String(text) => Some(text),
                    _other => None,
                })
                .collect::<Option<Vec<_>>>()
                .map_or(Self::Wrong, Self::Many),
            _other => Self::Wrong,
        }
    }
}

fn flatten(prefix: &str, table: toml::Table, into: &mut BTreeMap<String, toml::Value>) {
    for (name, value) in table {
        let path = if prefix.is_empty() { name } else { format!("{prefix}.{name}") };
        match value {
            toml::Value::Table(inner) => flatten(&path, inner, into),
            value => {
                into.insert(path, value);
            }
        }
    }
}

/// `; did you mean X?` for the nearest known name, if one is near.
fn suggestion<'a>(wrong: &str, known: impl Iterator<Item = &'a str>) -> String {
    let last = |path: &str| path.rsplit('.').next().unwrap_or_default().to_owned();
    known
        .map(|name| (distance(wrong, name).min(1 + distance(&last(wrong), &last(name))), name))
        .filter(|(far, _)| *far <= 3)
        .min()
        .map(|(_, name)| format!("; did you mean {name}?"))
        .unwrap_or_default()
}

/// Levenshtein distance; both texts are short.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().take(128).collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, from) in a.chars().take(128).enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, to) in b.iter().enumerate() {
            let replace = diagonal + usize::from(from != *to);
            diagonal = row[j + 1];
            row[j + 1] = replace.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}
