//! What a hub adds to the administration socket: `POST /v1/tokens`.

use std::{sync::Arc, time::Duration};

use axum::{Json, Router, extract::State, http::StatusCode, routing::post};
use ops::admin::Refusal;
use serde::{Deserialize, Serialize};

use crate::{
    ca::Authority,
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

/// The route, to be merged into the administration's.
pub fn router(authority: Arc<Authority>, registry: Registry) -> Router {
    Router::new().route("/v1/tokens", post(create)).with_state((authority, registry))
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
