//! A node's own API: what the node has, for clients on its machine, with or without a hub.
//!
//! ```text
//! node's replica of `fleet` ──┐ mirror    in memory: broker, space `k8s`
//! its own space `status` ─────┴──────────> revision = local resourceVersion ──> get, list, watch
//! everything else, every write ──────────> Stream of kind `kubernetes` to the hub's API
//! ```
//!
//! **Invariants.** What is read here is what stands in the node's store, merged with what the node itself knows
//! better than any hub: statuses of its pods and of itself. One client's path is served either here or by the
//! hub, whether that is in reach or not, so that resourceVersions of the two never meet in a list and its watch.
//! A write is the hub's: it decides, as it does for any client; without a hub it is refused, never kept.
//!
//! The objects are in memory alone, in a broker of their own. They are made anew of durable State at each start,
//! so writing them once more would only wear out the flash; secrets are on no disk by this. Revisions go on where
//! those of an earlier start cannot have been ([`life`]), so that a watch from before gets *410 Gone*. A node
//! whose API nobody asks has only the socket: everything else is made for the first connection.
//!
//! **Who may what.** The administrator of this machine (the kubeconfig in the API's folder) may read all that is
//! here, and writes as the node: what the hub permits to `system:node:<name>`. A pod shows the token of its service
//! account, which is accepted as long as the pod is to run here, expired or not: the node was given it for that
//! pod. Roles are not at the node. So a pod reads here the pods and config maps of its own namespace and the node;
//! everything else, secrets before all, is asked of the hub with the pod's token. Nobody else is let in.

mod accounts;
mod cloud;
mod life;
mod merge;
mod mirror;

use std::{
    collections::BTreeMap,
    fmt,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    sync::Arc,
};

use broker::{Handle, Tasks, core, driver, seal::SealKey, store::mem::MemStore};
use hyper::HeaderMap;
use tokio::{
    net::TcpListener,
    sync::{OnceCell, watch},
};

pub(crate) use self::cloud::Known;
use self::{accounts::Accounts, mirror::Mirror};
use crate::{
    api::Api,
    audit::Audit,
    auth::{self, Authenticator},
    authz::Attributes,
    cache::Cache,
    http::{self, Front, route::Server},
    nodes::{NodeStreams, forward::Forwarder},
    pki::{Pki, PkiError},
    registry::Registry,
    status::Status,
    store::Store,
    user::{AUTHENTICATED, MASTERS, User},
};

/// The kind of Stream on which a hub is the API server, and the node at the other end a client of it.
pub const KUBERNETES: &str = "kubernetes";

/// What a node's API needs.
#[derive(Clone)]
pub struct LocalOptions {
    /// The node's name.
    pub node: Arc<str>,
    /// Folder for its authority and the kubeconfig; made if it is missing.
    pub folder: PathBuf,
    /// The node's broker.
    pub broker: Handle,
    /// Its tasks run in this group and end with it.
    pub tasks: Tasks,
    /// The tier's key of secrets as it is now.
    pub secrets: Arc<dyn Fn() -> Option<SealKey> + Send + Sync>,
    /// Opens Streams of kind [`KUBERNETES`] to the hub, whatever name it is asked for.
    pub hub: Arc<dyn NodeStreams>,
    /// The way to the containers of this node.
    pub containers: Option<Arc<dyn NodeStreams>>,
}

impl fmt::Debug for LocalOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LocalOptions").field("node", &self.node).finish_non_exhaustive()
    }
}

/// A node's API, whether anybody has asked it yet or not. Cloning shares it.
#[derive(Debug, Clone)]
pub struct LocalApi {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    options: LocalOptions,
    address: Option<SocketAddr>,
    made: OnceCell<Front>,
}

/// How clients on this machine reach the API.
#[derive(Debug, Clone)]
pub struct LocalServing {
    /// The API, for those in the same process.
    pub api: LocalApi,
    /// The kubeconfig of this machine's administrator, if it listens anywhere.
    pub kubeconfig: Option<PathBuf>,
    /// The certificate of the CA that signs the server's, PEM. Pods find it in `kube-root-ca.crt`, behind that of
    /// the cluster: a client takes either.
    pub ca: String,
}

/// Serves at this socket, if there is one, until the tasks are asked to stop.
///
/// # Errors
/// The authority cannot be opened or written.
pub fn serve_local(options: LocalOptions, listener: Option<TcpListener>) -> Result<LocalServing, PkiError> {
    let pki = Pki::open(&options.folder)?;
    let address = listener.as_ref().and_then(|listener| listener.local_addr().ok());
    let kubeconfig = address.map(|address| pki.kubeconfig(address)).transpose()?;
    let ca = pki.ca_pem().to_owned();
    let tasks = options.tasks.clone();
    let api = LocalApi { inner: Arc::new(Inner { options, address, made: OnceCell::new() }) };
    if let Some(listener) = listener {
        tasks.spawn("local api", api.clone().listen(listener, tasks.clone()));
    }
    Ok(LocalServing { api, kubeconfig, ca })
}

impl LocalApi {
    /// The server, made if this is the first to ask.
    ///
    /// # Errors
    /// Keys or files cannot be used.
    pub async fn front(&self) -> Result<&Front, PkiError> {
        let Inner { options, address, made } = &*self.inner;
        made.get_or_try_init(|| make(options, *address)).await
    }

    /// Waits for the first connection with nothing made; then serves like any API server.
    async fn listen(self, listener: TcpListener, tasks: Tasks) {
        let stop = tasks.stopped();
        let first = tokio::select! {
            biased;
            () = stop.cancelled() => return,
            accepted = http::accept(&listener) => accepted,
        };
        let front = match self.front().await {
            Ok(front) => front.clone(),
            Err(error) => return tracing::error!(%error, "the node's API does not serve"),
        };
        http::serve(listener, Some(first), front, tasks).await;
    }
}

async fn make(options: &LocalOptions, address: Option<SocketAddr>) -> Result<Front, PkiError> {
    let pki = Pki::open(&options.folder)?;
    let at: Vec<IpAddr> = address.iter().map(SocketAddr::ip).collect();
    let tls = pki.tls(&at)?;
    let life = life::next(&options.folder)?;
    let mem = MemStore::of_logs();
    let config = core::Config::hub("local", "local", [0; 16], life);
    let broker = driver::start(config, mem, life::recovered(life), &options.tasks);
    let api = Arc::new(Api {
        store: Store::new(broker, "k8s".into(), pki.secrets_key()?),
        cache: Cache::new(),
        registry: Arc::new(Registry::new()),
        authenticator: Authenticator::new(pki.token_key()?, BTreeMap::new(), false),
        ca_pem: pki.ca_pem().to_owned(),
    });
    let forwarder = |nodes: &Arc<dyn NodeStreams>| Forwarder::new(Arc::clone(nodes), options.tasks.clone());
    let local = Arc::new(Local {
        accounts: Accounts::default(),
        known: Known::new(life),
        hub: forwarder(&options.hub),
        ready: watch::Sender::new(false),
    });
    let mirror = Mirror::new(options, &api, &local);
    let stop = options.tasks.stopped();
    options.tasks.spawn("local api mirror", async move {
        tokio::select! {
            biased;
            () = stop.cancelled() => {}
            () = mirror.run() => {}
        }
    });
    let containers = options.containers.as_ref().map(forwarder);
    let server = Server::new(api, Audit::default(), containers, options.tasks.clone()).with_local(local);
    Ok(Front::new(tls, Arc::new(server)))
}

/// What makes an API server a node's.
#[derive(Debug)]
pub(crate) struct Local {
    accounts: Accounts,
    pub(crate) known: Known,
    pub(crate) hub: Forwarder,
    /// Everything that stood in the node's store when this began is shown.
    ready: watch::Sender<bool>,
}

impl Local {
    /// Who asks: the administrator by certificate, a pod by its token.
    pub(crate) fn user(&self, certificate: Option<&User>, headers: &HeaderMap) -> Result<User, Status> {
        let mut user = match (certificate, auth::bearer(headers)) {
            (Some(user), _) => user.clone(),
            (None, Some(token)) => self.accounts.user(token).ok_or_else(Status::unauthorized)?,
            (None, None) => return Err(Status::unauthorized()),
        };
        if !user.is_in(AUTHENTICATED) {
            user.groups.push(AUTHENTICATED.to_owned());
        }
        Ok(user)
    }

    /// Whether this is answered from what the node has. Everything else is for the hub to answer, or refuse.
    pub(crate) fn is_here(&self, user: &User, wanted: &Attributes) -> bool {
        if !wanted.path.is_empty() {
            return true; // discovery, health
        }
        let reads = ["get", "list", "watch"].contains(&wanted.verb.as_str());
        let whole = wanted.subresource.is_empty() || wanted.subresource == "status";
        let resource = wanted.resource.as_str();
        if user.is_in(MASTERS) {
            let held = ["pods", "nodes", "configmaps", "secrets", "serviceaccounts"].contains(&resource);
            let of_containers = resource == "pods"
                && ["log", "exec", "attach", "portforward"].contains(&wanted.subresource.as_str())
                || resource == "nodes" && wanted.subresource == "proxy";
            return wanted.group.is_empty() && (held && reads && whole || of_containers);
        }
        let own = namespace_of(user).is_some_and(|own| own == wanted.namespace);
        let held = own && ["pods", "configmaps"].contains(&resource) || resource == "nodes";
        wanted.group.is_empty() && held && reads && whole
    }

    /// Waits until what is shown is whole. Cancel safe.
    pub(crate) async fn ready(&self) {
        // The sender is this: it cannot end while this waits.
        drop(self.ready.subscribe().wait_for(|ready| *ready).await);
    }
}

/// Of a service account.
fn namespace_of(user: &User) -> Option<&str> {
    Some(user.name.strip_prefix("system:serviceaccount:")?.split_once(':')?.0)
}
