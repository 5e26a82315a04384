//! The health protocol of gRPC.

use std::time::Duration;

use tokio::time::{Instant, timeout_at};
use tonic::{Code, transport::Endpoint};

use self::health::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};
use super::{Outcome, seconds};
use crate::env::quoted;

#[allow(missing_docs, clippy::all, unreachable_pub, unused_qualifications)]
mod health {
    tonic::include_proto!("grpc.health.v1");
}

/// An answer has a number in it.
const ANSWER_MAX: usize = 4 << 10;

pub(super) async fn check(address: &str, service: &str, limit: Duration) -> Outcome {
    let deadline = Instant::now() + limit;
    let within = seconds(limit);
    let endpoint = Endpoint::from_shared(format!("http://{address}"))
        .and_then(|endpoint| endpoint.user_agent("kube-probe/1.33"));
    let endpoint = match endpoint {
        Ok(endpoint) => endpoint,
        Err(error) => return Outcome::Unknown(error.to_string()),
    };
    let channel = match timeout_at(deadline, endpoint.connect()).await {
        Ok(Ok(channel)) => channel,
        Ok(Err(error)) => {
            let why =
                std::error::Error::source(&error).map_or_else(|| error.to_string(), ToString::to_string);
            return Outcome::Failure(format!(
                "error: failed to connect service at {}: {why}",
                quoted(address)
            ));
        }
        Err(_) => {
            return Outcome::Failure(format!(
                "timeout: failed to connect service {} within {within}: context deadline exceeded",
                quoted(address)
            ));
        }
    };
    let mut client = HealthClient::new(channel).max_decoding_message_size(ANSWER_MAX);
    let request = HealthCheckRequest { service: service.to_owned() };
    let answer = match timeout_at(deadline, client.check(request)).await {
        Ok(Ok(answer)) => answer.into_inner(),
        Ok(Err(status)) if status.code() == Code::Unimplemented => {
            return Outcome::Failure(format!(
                "error: this server does not implement the grpc health protocol (grpc.health.v1.Health): {}",
                status.message()
            ));
        }
        Ok(Err(status)) if status.code() != Code::DeadlineExceeded => {
            return Outcome::Failure(format!(
                "error: health rpc failed: rpc error: code = {:?} desc = {}",
                status.code(),
                status.message()
            ));
        }
        Ok(Err(_)) | Err(_) => {
            return Outcome::Failure(format!("timeout: health rpc did not complete within {within}"));
        }
    };
    match answer.status() {
        ServingStatus::Serving => Outcome::Success,
        other => {
            let name = quoted(other.as_str_name());
            Outcome::Failure(format!("service unhealthy (responded with {name})"))
        }
    }
}
