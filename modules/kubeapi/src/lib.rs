//! Our own Kubernetes API server, for one machine or one site: generic resources over a State space with a
//! change window, where revision is resourceVersion.
//!
//! ```text
//! http      TLS, requests, forms of answers          ─┐
//! auth      who asks          authz  may they         │  a request, from top to bottom
//! api       verbs over objects                        │
//! kinds, admission, crd   what kinds have of their own│
//! store     objects in the broker's space `k8s`      ─┘
//! nodes     logs, exec, attach, port-forward: over Streams to nodes
//! metrics   what nodes and pods use, asked of the nodes
//! cache     all objects in memory, by one watch: for the authorizer and the controllers
//! schema    one description of each kind: reading, merging, applying, OpenAPI
//! ```
//!
//! **Invariants.** A write names the revision it has seen; an object enters a namespace in one group with the
//! check that the namespace is not ending. Every page of a list is of one revision; a watch shows every change
//! once, in order, or says *too old*. Nothing of a client is parsed before its size, depth and number of values
//! are bounded. Every error is a `metav1.Status`.
//!
//! **Not served:** protobuf (406 and 415; clients fall back to JSON) but for what kubectl asks and creates in it
//! without looking, several versions of a custom resource
//! with conversion, CEL rules, webhooks, aggregated API servers, StatefulSet and CronJob controllers,
//! proxies to pods and services, quotas and limit ranges (objects alone).

mod admission;
mod api;
mod audit;
mod auth;
mod authz;
mod cache;
mod clock;
mod controllers;
mod crd;
mod discovery;
mod http;
mod json;
mod kinds;
mod limits;
mod local;
mod managed;
mod metrics;
mod names;
pub mod nodes;
mod normal;
mod openapi;
mod patch;
mod pki;
mod quantity;
mod registry;
mod reviews;
mod schema;
mod selector;
mod serve;
mod status;
mod store;
mod table;
mod user;

pub use http::Front;
pub use local::{KUBERNETES, LocalApi, LocalOptions, LocalServing, serve_local};
pub use pki::PkiError;
pub use serve::{Options, ServeError, Serving, StaticToken, serve};
