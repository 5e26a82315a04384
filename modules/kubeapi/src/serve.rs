//! Starting it: authority, first objects, controllers, the listener.

use std::{
    collections::BTreeMap,
    io,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
};

use broker::{Handle, Tasks};
use tokio::net::TcpListener;

use crate::{
    api::Api,
    audit::Audit,
    auth::{Authenticator, token},
    authz::bootstrap,
    cache::Cache,
    controllers,
    http::{self, Front, route::Server},
    nodes::{NodeStreams, forward::Forwarder},
    pki::{Pki, PkiError},
    registry::Registry,
    store::Store,
    user::User,
};

/// What an API server needs.
#[derive(Debug)]
pub struct Options<'a> {
    /// Where it listens, bound already.
    pub listener: TcpListener,
    /// Folder for keys, certificates, the kubeconfig and the audit log; made if it is missing.
    pub folder: &'a Path,
    /// The broker that owns space `k8s`, which must keep a change window.
    pub broker: Handle,
    /// Its tasks run in this group and end with it.
    pub tasks: Tasks,
    /// Tokens that count besides those of service accounts.
    pub tokens: Vec<StaticToken>,
    /// Whether clients without credentials are `system:anonymous` or refused.
    pub anonymous: bool,
    /// The way to nodes, for logs, exec, attach and port-forward.
    pub nodes: Option<Arc<dyn NodeStreams>>,
    /// Whether it runs the controllers and the scheduler. Without them it is a store of objects.
    pub controllers: bool,
}

/// A token and whose it is.
#[derive(Debug, Clone)]
pub struct StaticToken {
    /// The token.
    pub token: String,
    /// Name of the user.
    pub user: String,
    /// Uid of the user.
    pub uid: String,
    /// Groups of the user.
    pub groups: Vec<String>,
}

/// Why it does not start.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// Keys and certificates.
    #[error(transparent)]
    Pki(#[from] PkiError),
    /// The socket.
    #[error("the Kubernetes API has no address: {0}")]
    Address(io::Error),
    /// The audit log.
    #[error("cannot write {path}: {source}")]
    Audit {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The key of secrets is not the one that they were sealed with.
    #[error(
        "{unreadable} secrets are sealed with another key than that in {path}: restore this file from the backup \
         that the store is of"
    )]
    OtherKey {
        /// The file of the key.
        path: PathBuf,
        /// How many.
        unreadable: usize,
    },
    /// The first objects cannot be written.
    #[error("cannot write the first objects of the Kubernetes API: {0}")]
    Bootstrap(String),
}

/// A server that runs.
#[derive(Debug, Clone)]
pub struct Serving {
    /// Where it listens.
    pub address: SocketAddr,
    /// The kubeconfig of its administrator.
    pub kubeconfig: PathBuf,
    /// Serves who does not come by that address: nodes, by Streams of kind [`KUBERNETES`](crate::KUBERNETES).
    pub front: Front,
}

/// Starts an API server. When this returns, it serves, until its tasks are asked to stop.
///
/// # Errors
/// See [`ServeError`].
pub async fn serve(options: Options<'_>) -> Result<Serving, ServeError> {
    let address = options.listener.local_addr().map_err(ServeError::Address)?;
    let pki = Pki::open(options.folder)?;
    let tls = pki.tls(&[address.ip()])?;
    let kubeconfig = pki.kubeconfig(address)?;
    let path = options.folder.join("audit.log");
    let audit = Audit::open(&path).map_err(|source| ServeError::Audit { path, source })?;
    let tokens = options.tokens.into_iter().map(|held| {
        let user = User { name: held.user, uid: held.uid, groups: held.groups, ..User::default() };
        (token::digest(&held.token), user)
    });
    let store = Store::new(options.broker, "k8s".into(), pki.secrets_key()?);
    let unreadable = store.unreadable().await.map_err(|error| ServeError::Bootstrap(error.to_string()))?;
    if unreadable > 0 {
        return Err(ServeError::OtherKey { path: pki.secrets_path(), unreadable });
    }
    let authenticator =
        Authenticator::new(pki.token_key()?, tokens.collect::<BTreeMap<_, _>>(), options.anonymous);
    let api = Arc::new(Api {
        store,
        cache: Cache::new(),
        registry: Arc::new(Registry::new()),
        authenticator,
        ca_pem: pki.ca_pem().to_owned(),
    });
    bootstrap::ensure(&api).await.map_err(|status| ServeError::Bootstrap(status.message))?;
    controllers::start(&api, &options.tasks, options.controllers);
    let written = api.store.revision().await.map_err(|error| ServeError::Bootstrap(error.to_string()))?;
    let stop = options.tasks.stopped();
    tokio::select! {
        biased;
        () = stop.cancelled() => {}
        () = api.cache.reaches(written) => {}
    }
    // What was defined before is served from the first request on.
    controllers::serve_definitions(&api);
    let nodes = options.nodes.map(|nodes| Forwarder::new(nodes, options.tasks.clone()));
    let server = Arc::new(Server::new(api, audit, nodes, options.tasks.clone()));
    let front = Front::new(tls, server);
    let serving = http::serve(options.listener, None, front.clone(), options.tasks.clone());
    options.tasks.spawn("kubernetes api", serving);
    Ok(Serving { address, kubeconfig, front })
}
