//! Making a cluster ready for a hub: its namespace, its account, its rights.

use std::path::{Path, PathBuf};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use hyper::Request;
use kube::{
    Client, Config, Error,
    config::{KubeConfigOptions, Kubeconfig},
};
use serde_json::{Value, json};

use super::access::{ACCOUNT, NAMESPACE, objects};

/// The hub's token lasts a year, or as long as the cluster permits.
const TOKEN_SECONDS: u64 = 365 * 24 * 60 * 60;

/// Why a cluster was not made ready. What was applied before stays; it can be done again.
#[derive(Debug, thiserror::Error)]
pub enum InitError {
    /// The administrator's kubeconfig.
    #[error("{path}: {why}")]
    Kubeconfig {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// The cluster refused, or does not answer.
    #[error("{path}: {why}")]
    Refused {
        /// What was to be made.
        path: String,
        /// Why it was not.
        why: String,
    },
    /// The hub's kubeconfig cannot be written.
    #[error(transparent)]
    Write(#[from] broker::private::PrivateError),
}

/// A cluster, as its administrator.
pub struct Administrator {
    client: Client,
    server: String,
    /// PEM.
    ca: Option<String>,
}

impl std::fmt::Debug for Administrator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Administrator").field("server", &self.server).finish_non_exhaustive()
    }
}

impl Administrator {
    /// By a kubeconfig.
    ///
    /// # Errors
    /// See [`InitError`].
    pub async fn open(path: &Path) -> Result<Self, InitError> {
        let wrong = |error: &dyn std::fmt::Display| InitError::Kubeconfig {
            path: path.to_owned(),
            why: error.to_string(),
        };
        let file = Kubeconfig::read_from(path).map_err(|error| wrong(&error))?;
        let config = Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await;
        let config = config.map_err(|error| wrong(&error))?;
        let server = config.cluster_url.to_string().trim_end_matches('/').to_owned();
        let ca = config.root_cert.as_ref().map(|chain| chain.iter().map(|der| pem(der)).collect());
        let client = Client::try_from(config).map_err(|error| wrong(&error))?;
        Ok(Self { client, server, ca })
    }

    /// Applies what a hub needs; says what there is now.
    ///
    /// # Errors
    /// See [`InitError`].
    pub async fn apply(&self) -> Result<Vec<String>, InitError> {
        let mut applied = Vec::new();
        for (path, object) in objects() {
            let uri = format!("{path}?fieldManager=octobus-init&force=true");
            self.ask("PATCH", &uri, "application/apply-patch+yaml", &object).await?;
            let of = |field: &str| object[field].as_str().unwrap_or_default().to_owned();
            let name = object["metadata"]["name"].as_str().unwrap_or_default();
            applied.push(format!("{} {name}", of("kind")));
        }
        Ok(applied)
    }

    /// Writes a kubeconfig of the hub's account, mode 0600; until when it is good.
    ///
    /// # Errors
    /// See [`InitError`].
    pub async fn write_kubeconfig(&self, path: &Path) -> Result<String, InitError> {
        let uri = format!("/api/v1/namespaces/{NAMESPACE}/serviceaccounts/{ACCOUNT}/token");
        let request = json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest",
            "spec": {"expirationSeconds": TOKEN_SECONDS}});
        let answer = self.ask("POST", &uri, "application/json", &request).await?;
        let token = answer["status"]["token"].as_str().unwrap_or_default();
        let mut cluster = json!({"server": self.server});
        if let Some(ca) = &self.ca {
            cluster["certificate-authority-data"] = STANDARD.encode(ca).into();
        }
        let config = json!({"apiVersion": "v1", "kind": "Config", "current-context": "octobus",
            "clusters": [{"name": "octobus", "cluster": cluster}],
            "users": [{"name": ACCOUNT, "user": {"token": token}}],
            "contexts": [{"name": "octobus", "context": {"cluster": "octobus", "user": ACCOUNT}}]});
        broker::private::write(path, config.to_string().as_bytes())?;
        Ok(answer["status"]["expirationTimestamp"].as_str().unwrap_or_default().to_owned())
    }

    async fn ask(&self, method: &str, uri: &str, media: &str, body: &Value) -> Result<Value, InitError> {
        let refused = |why: String| InitError::Refused { path: uri.to_owned(), why };
        let request = Request::builder().method(method).uri(uri).header("content-type", media);
        let request =
            request.body(body.to_string().into_bytes()).map_err(|error| refused(error.to_string()))?;
        self.client.request::<Value>(request).await.map_err(|error| match error {
            Error::Api(status) => refused(status.message),
            other => refused(other.to_string()),
        })
    }
}

fn pem(der: &[u8]) -> String {
    let text = STANDARD.encode(der);
    let lines = text.as_bytes().chunks(64).map(|line| String::from_utf8_lossy(line).into_owned() + "\n");
    format!("-----BEGIN CERTIFICATE-----\n{}-----END CERTIFICATE-----\n", lines.collect::<String>())
}
