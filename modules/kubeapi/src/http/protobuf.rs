//! Bodies in protobuf that stock kubectl sends whatever the server says it takes: questions, evictions,
//! options of deletions, and what `kubectl create` makes. A body that holds anything not described here is
//! refused as a whole, never read in part; answers are JSON.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde_json::{Map, Value, json};

/// What a field holds.
enum Wire {
    Text,
    Int,
    Bool,
    Texts,
    Message(&'static [Field]),
    Messages(&'static [Field]),
    /// Texts by key.
    TextMap,
    /// Bytes by key: base64 in JSON.
    BytesMap,
}

/// Number, name and content of a field.
type Field = (u64, &'static str, Wire);

const METADATA: &[Field] = &[
    (1, "name", Wire::Text),
    (2, "generateName", Wire::Text),
    (3, "namespace", Wire::Text),
    (4, "selfLink", Wire::Text),
    (5, "uid", Wire::Text),
    (6, "resourceVersion", Wire::Text),
    (7, "generation", Wire::Int),
    (11, "labels", Wire::TextMap),
    (12, "annotations", Wire::TextMap),
];
const RULE: &[Field] = &[
    (1, "verbs", Wire::Texts),
    (2, "apiGroups", Wire::Texts),
    (3, "resources", Wire::Texts),
    (4, "resourceNames", Wire::Texts),
    (5, "nonResourceURLs", Wire::Texts),
];
const ROLE: &[Field] = &[(1, "metadata", Wire::Message(METADATA)), (2, "rules", Wire::Messages(RULE))];
const SUBJECT: &[Field] = &[
    (1, "kind", Wire::Text),
    (2, "apiGroup", Wire::Text),
    (3, "name", Wire::Text),
    (4, "namespace", Wire::Text),
];
const ROLE_REF: &[Field] = &[(1, "apiGroup", Wire::Text), (2, "kind", Wire::Text), (3, "name", Wire::Text)];
const BINDING: &[Field] = &[
    (1, "metadata", Wire::Message(METADATA)),
    (2, "subjects", Wire::Messages(SUBJECT)),
    (3, "roleRef", Wire::Message(ROLE_REF)),
];
const PORT: &[Field] = &[
    (1, "name", Wire::Text),
    (2, "hostPort", Wire::Int),
    (3, "containerPort", Wire::Int),
    (4, "protocol", Wire::Text),
    (5, "hostIP", Wire::Text),
];
const CONTAINER: &[Field] = &[
    (1, "name", Wire::Text),
    (2, "image", Wire::Text),
    (3, "command", Wire::Texts),
    (4, "args", Wire::Texts),
    (5, "workingDir", Wire::Text),
    (6, "ports", Wire::Messages(PORT)),
    (13, "terminationMessagePath", Wire::Text),
    (14, "imagePullPolicy", Wire::Text),
    (16, "stdin", Wire::Bool),
    (17, "stdinOnce", Wire::Bool),
    (18, "tty", Wire::Bool),
    (20, "terminationMessagePolicy", Wire::Text),
];
const POD: &[Field] = &[
    (2, "containers", Wire::Messages(CONTAINER)),
    (3, "restartPolicy", Wire::Text),
    (4, "terminationGracePeriodSeconds", Wire::Int),
    (5, "activeDeadlineSeconds", Wire::Int),
    (6, "dnsPolicy", Wire::Text),
    (7, "nodeSelector", Wire::TextMap),
    (8, "serviceAccountName", Wire::Text),
    (9, "serviceAccount", Wire::Text),
    (10, "nodeName", Wire::Text),
    (11, "hostNetwork", Wire::Bool),
    (12, "hostPID", Wire::Bool),
    (13, "hostIPC", Wire::Bool),
    (16, "hostname", Wire::Text),
    (17, "subdomain", Wire::Text),
    (19, "schedulerName", Wire::Text),
];
const TEMPLATE: &[Field] = &[(1, "metadata", Wire::Message(METADATA)), (2, "spec", Wire::Message(POD))];
const DEPLOYMENT: &[Field] = &[
    (1, "replicas", Wire::Int),
    (2, "selector", Wire::Message(&[(1, "matchLabels", Wire::TextMap)])),
    (3, "template", Wire::Message(TEMPLATE)),
    (5, "minReadySeconds", Wire::Int),
    (7, "paused", Wire::Bool),
];
const RESOURCE: &[Field] = &[
    (1, "namespace", Wire::Text),
    (2, "verb", Wire::Text),
    (3, "group", Wire::Text),
    (4, "version", Wire::Text),
    (5, "resource", Wire::Text),
    (6, "subresource", Wire::Text),
    (7, "name", Wire::Text),
];
const PATH: &[Field] = &[(1, "path", Wire::Text), (2, "verb", Wire::Text)];
const ACCESS: &[Field] =
    &[(1, "resourceAttributes", Wire::Message(RESOURCE)), (2, "nonResourceAttributes", Wire::Message(PATH))];
const BOUND: &[Field] = &[
    (1, "kind", Wire::Text),
    (2, "apiVersion", Wire::Text),
    (3, "name", Wire::Text),
    (4, "uid", Wire::Text),
];
const TOKEN: &[Field] = &[
    (1, "audiences", Wire::Texts),
    (3, "boundObjectRef", Wire::Message(BOUND)),
    (4, "expirationSeconds", Wire::Int),
];
const PRECONDITIONS: &[Field] = &[(1, "uid", Wire::Text), (2, "resourceVersion", Wire::Text)];
const OPTIONS: &[Field] = &[
    (1, "gracePeriodSeconds", Wire::Int),
    (2, "preconditions", Wire::Message(PRECONDITIONS)),
    (3, "orphanDependents", Wire::Bool),
    (4, "propagationPolicy", Wire::Text),
    (5, "dryRun", Wire::Texts),
];

fn fields_of(kind: &str) -> Option<&'static [Field]> {
    Some(match kind {
        "SelfSubjectAccessReview" => {
            &[(1, "metadata", Wire::Message(METADATA)), (2, "spec", Wire::Message(ACCESS))]
        }
        "SelfSubjectRulesReview" => &[
            (1, "metadata", Wire::Message(METADATA)),
            (2, "spec", Wire::Message(&[(1, "namespace", Wire::Text)])),
        ],
        "SelfSubjectReview" => &[(1, "metadata", Wire::Message(METADATA))],
        "TokenRequest" => &[(1, "metadata", Wire::Message(METADATA)), (2, "spec", Wire::Message(TOKEN))],
        "Eviction" => {
            &[(1, "metadata", Wire::Message(METADATA)), (2, "deleteOptions", Wire::Message(OPTIONS))]
        }
        "DeleteOptions" => OPTIONS,
        "Namespace" => &[
            (1, "metadata", Wire::Message(METADATA)),
            (3, "status", Wire::Message(&[(1, "phase", Wire::Text)])),
        ],
        "ConfigMap" => &[
            (1, "metadata", Wire::Message(METADATA)),
            (2, "data", Wire::TextMap),
            (3, "binaryData", Wire::BytesMap),
            (4, "immutable", Wire::Bool),
        ],
        "Secret" => &[
            (1, "metadata", Wire::Message(METADATA)),
            (2, "data", Wire::BytesMap),
            (3, "type", Wire::Text),
            (4, "stringData", Wire::TextMap),
            (5, "immutable", Wire::Bool),
        ],
        "ServiceAccount" => &[(1, "metadata", Wire::Message(METADATA))],
        "Role" | "ClusterRole" => ROLE,
        "RoleBinding" | "ClusterRoleBinding" => BINDING,
        "Deployment" => &[(1, "metadata", Wire::Message(METADATA)), (2, "spec", Wire::Message(DEPLOYMENT))],
        _ => return None,
    })
}

/// Reads a body. `None`: it is malformed, or of a kind that is not read.
pub(super) fn read(bytes: &[u8]) -> Option<Value> {
    let (mut version, mut kind, mut raw) = (String::new(), String::new(), &[][..]);
    let mut envelope = bytes.strip_prefix(b"k8s\0")?;
    while let Some((number, part)) = next(&mut envelope)? {
        match (number, part) {
            (1, Part::Bytes(mut meta)) => {
                while let Some((number, part)) = next(&mut meta)? {
                    match (number, part) {
                        (1, Part::Bytes(text)) => std::str::from_utf8(text).ok()?.clone_into(&mut version),
                        (2, Part::Bytes(text)) => std::str::from_utf8(text).ok()?.clone_into(&mut kind),
                        _ => {}
                    }
                }
            }
            (2, Part::Bytes(bytes)) => raw = bytes,
            _ => {}
        }
    }
    let mut object = message(raw, fields_of(&kind)?)?;
    object.insert("apiVersion".to_owned(), json!(version));
    object.insert("kind".to_owned(), json!(kind));
    Some(Value::Object(object))
}

fn message(mut bytes: &[u8], fields: &[Field]) -> Option<Map<String, Value>> {
    let mut object = Map::new();
    while let Some((number, part)) = next(&mut bytes)? {
        let Some((_, name, wire)) = fields.iter().find(|(held, ..)| *held == number) else {
            // What says nothing can be left out.
            if part.is_empty(HOLLOW_MAX) {
                continue;
            }
            return None;
        };
        let held = |object: &mut Map<String, Value>| object.remove(*name).unwrap_or(Value::Null);
        let value = match (wire, part) {
            (Wire::Text, Part::Bytes(text)) => json!(std::str::from_utf8(text).ok()?),
            (Wire::Int, Part::Number(number)) => json!(number.cast_signed()),
            (Wire::Bool, Part::Number(number)) => json!(number != 0),
            (Wire::Message(fields), Part::Bytes(bytes)) => Value::Object(message(bytes, fields)?),
            (Wire::Messages(fields), Part::Bytes(bytes)) => {
                with(held(&mut object), Value::Object(message(bytes, fields)?))
            }
            (Wire::Texts, Part::Bytes(text)) => {
                with(held(&mut object), json!(std::str::from_utf8(text).ok()?))
            }
            (Wire::TextMap, Part::Bytes(bytes)) => {
                let (key, text) = entry(bytes)?;
                with_entry(held(&mut object), key, json!(std::str::from_utf8(text).ok()?))
            }
            (Wire::BytesMap, Part::Bytes(bytes)) => {
                let (key, bytes) = entry(bytes)?;
                with_entry(held(&mut object), key, json!(STANDARD.encode(bytes)))
            }
            _ => return None,
        };
        object.insert((*name).to_owned(), value);
    }
    Some(object)
}

fn with(list: Value, value: Value) -> Value {
    let mut list = match list {
        Value::Array(list) => list,
        _ => Vec::new(),
    };
    list.push(value);
    Value::Array(list)
}

fn with_entry(map: Value, key: String, value: Value) -> Value {
    let mut map = match map {
        Value::Object(map) => map,
        _ => Map::new(),
    };
    map.insert(key, value);
    Value::Object(map)
}

/// Key and value of a map's entry.
fn entry(mut bytes: &[u8]) -> Option<(String, &[u8])> {
    let (mut key, mut value) = (String::new(), &[][..]);
    while let Some((number, part)) = next(&mut bytes)? {
        match (number, part) {
            (1, Part::Bytes(text)) => std::str::from_utf8(text).ok()?.clone_into(&mut key),
            (2, Part::Bytes(bytes)) => value = bytes,
            _ => return None,
        }
    }
    Some((key, value))
}

enum Part<'a> {
    Number(u64),
    Bytes(&'a [u8]),
}

/// Messages within each other that say nothing: more than any kind has.
const HOLLOW_MAX: usize = 16;

impl Part<'_> {
    /// Nothing, or messages with nothing in them, so deep.
    fn is_empty(&self, levels: usize) -> bool {
        match self {
            Self::Number(number) => *number == 0,
            Self::Bytes(bytes) => {
                let mut rest = *bytes;
                loop {
                    match next(&mut rest) {
                        Some(None) => return true,
                        Some(Some((_, part))) if levels > 0 && part.is_empty(levels - 1) => {}
                        _ => return false,
                    }
                }
            }
        }
    }
}

/// The next field. `Some(None)`: the end; `None`: malformed.
#[allow(clippy::option_option)] // the end is no mistake
fn next<'a>(bytes: &mut &'a [u8]) -> Option<Option<(u64, Part<'a>)>> {
    if bytes.is_empty() {
        return Some(None);
    }
    let tag = varint(bytes)?;
    let part = match tag & 7 {
        0 => Part::Number(varint(bytes)?),
        2 => {
            let length = usize::try_from(varint(bytes)?).ok()?;
            let (part, rest) = bytes.split_at_checked(length)?;
            *bytes = rest;
            Part::Bytes(part)
        }
        _ => return None,
    };
    Some(Some((tag >> 3, part)))
}

fn varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0_u64;
    for shift in (0..64).step_by(7) {
        let (byte, rest) = bytes.split_first()?;
        *bytes = rest;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_question_of_kubectl_is_read_and_what_is_cut_off_is_refused() {
        let part = |tag: u8, inner: &[u8]| [&[tag, u8::try_from(inner.len()).unwrap()], inner].concat();
        let about = [part(0x0a, b"authorization.k8s.io/v1"), part(0x12, b"SelfSubjectAccessReview")].concat();
        let asked = part(0x0a, &[part(0x12, b"list"), part(0x2a, b"pod")].concat());
        let body = [b"k8s\0".to_vec(), part(0x0a, &about), part(0x12, &part(0x12, &asked))].concat();
        let wanted = json!({"apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectAccessReview",
            "spec": {"resourceAttributes": {"verb": "list", "resource": "pod"}}});
        assert_eq!(read(&body), Some(wanted));
        for end in 0..body.len() - 1 {
            // Whatever it is taken for, it is no panic.
            drop(read(&body[..end]));
        }
        assert_eq!(read(&body[..body.len() - 1]), None);
        assert_eq!(read(b"k8s\0\x0a\x05\x12\x03Pod"), None);
        // A field that is not known says something: the whole is refused.
        let about = part(0x0a, &part(0x12, b"ConfigMap"));
        let map = part(0x12, &[part(0x0a, b"k"), part(0x12, b"v")].concat());
        let more = part(0x7a, b"x");
        let body = |raw: &[u8]| [b"k8s\0".to_vec(), about.clone(), part(0x12, raw)].concat();
        assert_eq!(read(&body(&map)).unwrap()["data"], json!({"k": "v"}));
        assert_eq!(read(&body(&[map.clone(), more].concat())), None);
        assert!(read(&body(&[map, part(0x7a, b"")].concat())).is_some());
    }
}
