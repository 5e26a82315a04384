//! Reads the descriptions in `kinds/*.types`.
//!
//! ```text
//! type Name [atomic] [retainKeys] [-- doc]
//!   field TYPE[?|!] [-- doc]
//! ```
//! `s` text, `i` 32 bit, `l` 64 bit, `b` bool, `t` time, `u` time with microseconds, `q` quantity, `x` int or
//! text, `y` bytes, `any`; `map:T` values by key, `map!:T` the same replaced as a whole; `Name` a struct that
//! is always there, `*Name` one that may be absent; `[]T` a list replaced as a whole, `[]T@k1,k2` one that
//! merges by keys, `[]T@` a set, `[]T~k` one that only strategic merge patches merge. A trailing `?` keeps an
//! empty value, `!` writes the empty value when the field is absent.

use std::{collections::BTreeMap, sync::Arc};

use super::{Field, Merge, Presence, Scalar, Struct, Type};

/// Something in a description is wrong.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {line}")]
pub(crate) struct ReadError {
    what: &'static str,
    line: String,
}

struct Raw<'a> {
    head: &'a str,
    doc: &'a str,
    fields: Vec<&'a str>,
}

/// Reads descriptions that may name each other's types.
pub(crate) fn read(texts: &[&str]) -> Result<BTreeMap<String, Arc<Struct>>, ReadError> {
    let mut raw: BTreeMap<&str, Raw<'_>> = BTreeMap::new();
    let mut current = None;
    for line in texts.iter().flat_map(|text| text.lines()) {
        let text = line.trim();
        if text.is_empty() || text.starts_with('#') {
            continue;
        }
        if let Some(head) = text.strip_prefix("type ").filter(|_| !line.starts_with(' ')) {
            let (head, doc) = split_doc(head);
            let name = head.split(' ').next().unwrap_or_default();
            raw.insert(name, Raw { head, doc, fields: Vec::new() });
            current = Some(name);
        } else {
            let of = current.and_then(|name| raw.get_mut(name));
            of.ok_or_else(|| error("a field of no type", line))?.fields.push(text);
        }
    }
    let mut reader = Reader { raw: &raw, done: BTreeMap::new() };
    for name in raw.keys() {
        reader.named(name)?;
    }
    Ok(reader.done)
}

struct Reader<'a> {
    raw: &'a BTreeMap<&'a str, Raw<'a>>,
    done: BTreeMap<String, Arc<Struct>>,
}

impl Reader<'_> {
    fn named(&mut self, name: &str) -> Result<Arc<Struct>, ReadError> {
        if let Some(done) = self.done.get(name) {
            return Ok(Arc::clone(done));
        }
        let raw = self.raw.get(name).ok_or_else(|| error("no such type", name))?;
        let mut of = Struct { name: name.to_owned(), doc: raw.doc.to_owned(), ..Struct::default() };
        for flag in raw.head.split(' ').skip(1) {
            match flag {
                "atomic" => of.atomic = true,
                "retainKeys" => of.retain_keys = true,
                _ => return Err(error("no such flag", raw.head)),
            }
        }
        for line in &raw.fields {
            let (text, doc) = split_doc(line);
            let (name, ty) = text.split_once(' ').ok_or_else(|| error("a field without a type", line))?;
            let field = self.field(ty.trim(), doc)?;
            of.fields.insert(name.to_owned(), field);
        }
        let of = Arc::new(of);
        self.done.insert(name.to_owned(), Arc::clone(&of));
        Ok(of)
    }

    fn field(&mut self, text: &str, doc: &str) -> Result<Field, ReadError> {
        let (text, presence) = match text.as_bytes().last() {
            Some(b'?') => (&text[..text.len() - 1], Presence::Keep),
            Some(b'!') => (&text[..text.len() - 1], Presence::Always),
            _ => (text, Presence::Omit),
        };
        let is_struct = text.starts_with(char::is_uppercase);
        let pointer = text.strip_prefix('*');
        let ty = self.ty(pointer.unwrap_or(text))?;
        let presence = if is_struct {
            Presence::Always
        } else if pointer.is_some() || ty == Type::Any {
            Presence::Keep
        } else {
            presence
        };
        Ok(Field { ty, presence, doc: doc.to_owned() })
    }

    fn ty(&mut self, text: &str) -> Result<Type, ReadError> {
        if let Some(of) = text.strip_prefix("[]") {
            let (of, merge) = match (of.split_once('@'), of.split_once('~')) {
                (Some((of, "")), _) => (of, Merge::Set),
                (Some((of, keys)), _) => (of, Merge::Keys(keys.split(',').map(str::to_owned).collect())),
                (None, Some((of, key))) => (of, Merge::PatchKey(key.to_owned())),
                (None, None) => (of, Merge::Atomic),
            };
            return Ok(Type::List { of: Box::new(self.ty(of)?), merge });
        }
        if let Some(of) = text.strip_prefix("map:") {
            return Ok(Type::Map { of: Box::new(self.ty(of)?), atomic: false });
        }
        if let Some(of) = text.strip_prefix("map!:") {
            return Ok(Type::Map { of: Box::new(self.ty(of)?), atomic: true });
        }
        Ok(match text {
            "s" => Type::Scalar(Scalar::Text),
            "i" => Type::Scalar(Scalar::Int32),
            "l" => Type::Scalar(Scalar::Int64),
            "b" => Type::Scalar(Scalar::Bool),
            "t" => Type::Scalar(Scalar::Time),
            "u" => Type::Scalar(Scalar::MicroTime),
            "q" => Type::Scalar(Scalar::Quantity),
            "x" => Type::Scalar(Scalar::IntOrString),
            "y" => Type::Scalar(Scalar::Bytes),
            "any" => Type::Any,
            name => Type::Struct(self.named(name)?),
        })
    }
}

fn split_doc(line: &str) -> (&str, &str) {
    let (text, doc) = line.split_once(" -- ").unwrap_or((line, ""));
    (text.trim(), doc.trim())
}

fn error(what: &'static str, line: &str) -> ReadError {
    ReadError { what, line: line.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_described_kind_can_be_read() {
        let types = &*super::super::BUILT_IN;
        let pod = &types["PodSpec"].fields["containers"];
        assert_eq!(pod.presence, Presence::Always);
        assert!(
            matches!(&pod.ty, Type::List { merge: Merge::Keys(keys), .. } if keys == &["name".to_owned()])
        );
        assert!(types["LabelSelector"].atomic);
    }

    #[test]
    fn a_mistake_in_a_description_is_named() {
        let error = read(&["type A\n  b Nowhere"]).expect_err("no such type");
        assert_eq!(error.to_string(), "no such type: Nowhere");
        assert!(read(&["  b s"]).is_err());
    }
}
