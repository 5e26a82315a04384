//! The encoding that KubeEdge puts on its wire, for comparison: JSON as the content of a protobuf message.
//!
//! Fields follow `viaduct`'s `message.proto`; the content is what `json.Marshal` makes of the message's content.

use bytes::Bytes;
use prost::Message as _;
use serde::{Deserialize, Serialize};

/// The protobuf message.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Message {
    /// Ids and times.
    #[prost(message, optional, tag = "1")]
    pub header: Option<Header>,
    /// Where it goes.
    #[prost(message, optional, tag = "2")]
    pub router: Option<Router>,
    /// JSON.
    #[prost(bytes = "bytes", tag = "3")]
    pub content: Bytes,
}

/// See [`Message`].
#[derive(Clone, PartialEq, prost::Message)]
pub struct Header {
    /// A UUID.
    #[prost(string, tag = "1")]
    pub id: String,
    /// A UUID, if it is an answer.
    #[prost(string, tag = "2")]
    pub parent_id: String,
    /// Milliseconds.
    #[prost(int64, tag = "3")]
    pub timestamp: i64,
    /// The sender waits.
    #[prost(bool, tag = "4")]
    pub sync: bool,
}

/// See [`Message`].
#[derive(Clone, PartialEq, prost::Message)]
pub struct Router {
    /// The sending module.
    #[prost(string, tag = "1")]
    pub source: String,
    /// The group of modules.
    #[prost(string, tag = "2")]
    pub group: String,
    /// The resource.
    #[prost(string, tag = "3")]
    pub resource: String,
    /// The verb.
    #[prost(string, tag = "4")]
    pub operation: String,
}

/// A twin update as content: what the JSON holds.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Update {
    /// A UUID.
    pub event_id: String,
    /// Milliseconds.
    pub timestamp: i64,
    /// The reading.
    pub twin: Twin,
}

/// See [`Update`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Twin {
    /// A property.
    pub temperature: Value,
}

/// See [`Update`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Value {
    /// As text.
    pub value: String,
    /// Of the value.
    pub r#type: String,
}

/// A message of about 256 bytes (less than KubeEdge's own, whose ids are UUIDs in full).
///
/// # Panics
/// Never: the update is plain data.
#[must_use]
pub fn message() -> Bytes {
    let update = Update {
        event_id: "3f1c".to_owned(),
        timestamp: 1_700_000_000_000,
        twin: Twin { temperature: Value { value: "71.5".to_owned(), r#type: "float".to_owned() } },
    };
    let message = Message {
        header: Some(Header {
            id: "6f2b1a52-0b0e-4f6e-9d0c-7b7a".to_owned(),
            parent_id: String::new(),
            timestamp: 1_700_000_000_000,
            sync: false,
        }),
        router: Some(Router {
            source: "twin".to_owned(),
            group: "twin".to_owned(),
            resource: "node/plant-1/device/boiler/twin/update".to_owned(),
            operation: "update".to_owned(),
        }),
        content: serde_json::to_vec(&update).expect("plain data").into(),
    };
    message.encode_to_vec().into()
}
