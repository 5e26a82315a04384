//! Sets of field paths, and their form in `metadata.managedFields`.
//!
//! A path is a sequence of elements: `f:` a field, `k:` an element of a list by its keys, `v:` an element of
//! a set by its value. They are held in the form in which they are written, so that what cannot be
//! interpreted is still kept.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

/// A set of paths.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Set {
    /// The path that ends here belongs to the set.
    pub(crate) member: bool,
    /// What goes on from here. None of them is empty.
    pub(crate) children: BTreeMap<String, Self>,
}

impl Set {
    /// The path that ends here, and nothing below it.
    pub(crate) fn leaf() -> Self {
        Self { member: true, children: BTreeMap::new() }
    }

    pub(crate) fn is_empty(&self) -> bool {
        !self.member && self.children.is_empty()
    }

    /// Adds what goes on by an element, if it is anything.
    pub(crate) fn add(&mut self, element: String, child: Self) {
        if !child.is_empty() {
            self.children.insert(element, child);
        }
    }

    #[must_use]
    pub(crate) fn union(&self, other: &Self) -> Self {
        let mut all = self.clone();
        all.member |= other.member;
        for (element, child) in &other.children {
            let held = all.children.remove(element).unwrap_or_default();
            all.children.insert(element.clone(), held.union(child));
        }
        all
    }

    #[must_use]
    pub(crate) fn difference(&self, other: &Self) -> Self {
        let mut rest = Self { member: self.member && !other.member, children: BTreeMap::new() };
        for (element, child) in &self.children {
            let child = match other.children.get(element) {
                Some(minus) => child.difference(minus),
                None => child.clone(),
            };
            rest.add(element.clone(), child);
        }
        rest
    }

    #[must_use]
    pub(crate) fn intersection(&self, other: &Self) -> Self {
        let mut both = Self { member: self.member && other.member, children: BTreeMap::new() };
        for (element, child) in &self.children {
            if let Some(with) = other.children.get(element) {
                both.add(element.clone(), child.intersection(with));
            }
        }
        both
    }

    /// With every field on the way to a member a member too.
    #[must_use]
    pub(crate) fn with_parents(&self) -> Self {
        let children = self.children.iter().map(|(element, child)| {
            let mut child = child.with_parents();
            child.member |= element.starts_with("f:") && !child.children.is_empty();
            (element.clone(), child)
        });
        Self { member: self.member, children: children.collect() }
    }

    /// Without the path of these fields and everything below it.
    pub(crate) fn remove(&mut self, path: &[&str]) {
        let Some((first, rest)) = path.split_first() else { return };
        let element = format!("f:{first}");
        if rest.is_empty() {
            self.children.remove(&element);
        } else if let Some(child) = self.children.get_mut(&element) {
            child.remove(rest);
            if child.is_empty() {
                self.children.remove(&element);
            }
        }
    }

    /// The members as people read them: `.spec.containers[name="web"].image`.
    pub(crate) fn paths(&self) -> Vec<String> {
        let mut found = Vec::new();
        self.collect_paths(&mut String::new(), &mut found);
        found
    }

    fn collect_paths(&self, path: &mut String, found: &mut Vec<String>) {
        if self.member {
            found.push(path.clone());
        }
        for (element, child) in &self.children {
            let length = path.len();
            path.push_str(&shown(element));
            child.collect_paths(path, found);
            path.truncate(length);
        }
    }

    /// As `fieldsV1`.
    pub(crate) fn encode(&self) -> Value {
        let mut map = Map::new();
        for (element, child) in &self.children {
            let mut below = child.encode();
            if child.member
                && !child.children.is_empty()
                && let Some(below) = below.as_object_mut()
            {
                below.insert(".".to_owned(), Value::Object(Map::new()));
            }
            map.insert(element.clone(), below);
        }
        Value::Object(map)
    }

    /// From `fieldsV1`; `None` if it is not of that form.
    pub(crate) fn decode(value: &Value) -> Option<Self> {
        let mut set = Self::default();
        for (element, below) in value.as_object()? {
            if element == "." {
                set.member = true;
                continue;
            }
            let known = ["f:", "k:", "v:", "i:"].iter().any(|form| element.starts_with(form));
            let mut child = Self::decode(below).filter(|_| known)?;
            child.member |= child.children.is_empty();
            set.children.insert(element.clone(), child);
        }
        Some(set)
    }
}

fn shown(element: &str) -> String {
    let Some((form, rest)) = element.split_once(':') else { return element.to_owned() };
    match form {
        "f" => format!(".{rest}"),
        "k" => {
            let keys: Map<String, Value> = serde_json::from_str(rest).unwrap_or_default();
            let keys: Vec<String> = keys.iter().map(|(key, value)| format!("{key}={value}")).collect();
            format!("[{}]", keys.join(","))
        }
        "v" => format!("[={rest}]"),
        _ => format!("[{rest}]"),
    }
}
