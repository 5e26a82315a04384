//! What a hub adds to the administration socket: `POST /v1/tokens`, and `POST /v1/identities` for whoever
//! issues certificates with the tier's own CA.

use std::{sync::Arc, time::Duration};

use axum::{Json, Router, extract::State, http::StatusCode, routing::post};
use ops::admin::Refusal;
use serde::{Deserialize, Serialize};

use crate::{
    ca::Authority,
    enrol::{self, EnrolError},
    registry::Registry,
    token::{self, CreateError, TokenRequest},
};

/// Body of `POST /v1/tokens`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenOrder {
    /// The node that may join with it.
    pub node: String,
    /// May take over a name that is enrolled.
    #[serde(default)]
    pub replace: bool,
    /// Good for this many seconds; [`token::DEFAULT_TTL`] if left out.
    #[serde(default)]
    pub ttl_s: Option<u64>,
    /// The node becomes a relay, which may forward for these names.
    #[serde(default)]
    pub forwards: Vec<String>,
}

/// Its answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenRow {
    /// The text to paste. It is not shown again.
    pub token: String,
    /// Under which the hub keeps it.
    pub id: String,
    /// The node that may join with it.
    pub node: String,
    /// Good for this many seconds from now.
    pub ttl_s: u64,
}

/// Body of `POST /v1/identities`: nodes whose certificates, of generation 1, were issued with the tier's CA by
/// whoever holds it. All are enrolled with this one key, or none is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IdentityOrder {
    /// SHA-256 of the key's SubjectPublicKeyInfo, in hex.
    pub key: String,
    /// At most [`enrol::NODES_MAX`] names.
    pub nodes: Vec<String>,
}

/// Its answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdentityRow {
    /// So many are new; the others were enrolled with this key already.
    pub enrolled: usize,
}

/// The routes, to be merged into the administration's.
pub fn router(authority: Arc<Authority>, registry: Registry) -> Router {
    Router::new()
        .route("/v1/tokens", post(create))
        .route("/v1/identities", post(enrol_many))
        .with_state((authority, registry))
}

async fn enrol_many(
    State((_authority, registry)): State<(Arc<Authority>, Registry)>,
    Json(order): Json<IdentityOrder>,
) -> Result<Json<IdentityRow>, Refusal> {
    let enrolled = enrol::enrol(&registry, &order.nodes, &order.key).await.map_err(|error| {
        let status = match &error {
            EnrolError::Name(_) | EnrolError::Key | EnrolError::TooMany => StatusCode::BAD_REQUEST,
            EnrolError::Taken(_) => StatusCode::CONFLICT,
            EnrolError::Registry(_) => StatusCode::SERVICE_UNAVAILABLE,
        };
        Refusal::new(status, error.to_string())
    })?;
    Ok(Json(IdentityRow { enrolled }))
}

async fn create(
    State((authority, registry)): State<(Arc<Authority>, Registry)>,
    Json(order): Json<TokenOrder>,
) -> Result<Json<TokenRow>, Refusal> {
    let ttl = order.ttl_s.map_or(token::DEFAULT_TTL, Duration::from_secs);
    let request = TokenRequest { node: order.node, replace: order.replace, ttl, forwards: order.forwards };
    let token = token::create(&registry, &authority, &request).await.map_err(|error| {
        let status = match &error {
            CreateError::Name(_) | CreateError::Ttl | CreateError::Forwards => StatusCode::BAD_REQUEST,
            CreateError::NameTaken(_) => StatusCode::CONFLICT,
            CreateError::Random(_) | CreateError::Registry(_) => StatusCode::SERVICE_UNAVAILABLE,
        };
        Refusal::new(status, error.to_string())
    })?;
    Ok(Json(TokenRow {
        token: token.to_string(),
        id: token.id.to_string(),
        node: request.node,
        ttl_s: ttl.as_secs(),
    }))
}
