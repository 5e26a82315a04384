//! A hub in one process: composition root.
//!
//! Start: open the authority, the store or the tier (`engine`), **bind every socket**, then start tasks: a port
//! that is taken is an error of the start and never of a task. Stop, each with its share of the deadline:
//!
//! ```text
//! core drains (no new sessions, the others are told, all is durable)
//!   ──> fronts and links end ──> of a replica: its lease ends ──> driver and store end, checkpoint written
//! ```

use std::{io, net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use broker::{
    Handle, Tasks,
    event::{Command, Response},
    front::{
        auth::{Auth, Users, UsersError},
        nats,
    },
    instance::InstanceError,
    link::{
        Counters, Links, Params,
        accept::{Acceptor, Admission},
        identity::PeerCertificate,
        quic::{BindError, QuicAddress, QuicDialler, Shape},
        replicas::Replicas,
        tls::{self, Credentials, TierSecret, TlsError},
        websocket::WebSocketListener,
    },
    store::OpenError,
    tasks::Drained,
};
use kubeapi::nodes::forward::Forwarder;
use ops::{
    admin::{Admin, AdminError, AdminSocket, backup::Backups},
    config::{Config, kubernetes},
    endpoints::Endpoints,
    metrics::{self, Exporter, Readiness},
    parts,
};
use tokio::{net::TcpListener, time::timeout};

mod engine;

use self::engine::Engine;
use crate::{
    admin,
    authorizer::Authorizer,
    bootstrap::{self, Bootstrap},
    bridge::{self, Cluster},
    ca::{Authority, AuthorityError, IssueError},
    fabric::{self, Administered},
    kubelet::{self, Access, Kubelet, KubeletError, Places},
    nodes::{self, NodeLinks},
    registry::Registry,
    token::{self, CreateError, TokenRequest},
};

/// Why a hub does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The store.
    #[error(transparent)]
    Store(#[from] OpenError),
    /// The tier's NATS servers.
    #[error(transparent)]
    Fabric(#[from] fabric::nats::OpenError),
    /// The CA.
    #[error(transparent)]
    Authority(#[from] AuthorityError),
    /// The own certificate.
    #[error(transparent)]
    Issue(#[from] IssueError),
    /// The instance.
    #[error(transparent)]
    Instance(#[from] InstanceError),
    /// The user file.
    #[error(transparent)]
    Users(#[from] UsersError),
    /// TLS.
    #[error("TLS: {0}")]
    Tls(#[from] TlsError),
    /// TLS of the bootstrap port.
    #[error("TLS: {0}")]
    Rustls(#[from] rustls::Error),
    /// The QUIC port.
    #[error("QUIC: {0}")]
    Quic(#[from] BindError),
    /// A TCP port.
    #[error(
        "cannot listen at {address} ({what}): {source}; is something else running there? port 0 picks a free one"
    )]
    Listen { what: &'static str, address: SocketAddr, source: io::Error },
    /// The Kubernetes API.
    #[error(transparent)]
    Kubernetes(#[from] kubeapi::ServeError),
    /// The way to it.
    #[error(transparent)]
    Bridge(#[from] bridge::ClusterError),
    /// The kubelet endpoint.
    #[error(transparent)]
    Kubelet(#[from] KubeletError),
    /// The admin socket.
    #[error(transparent)]
    Admin(#[from] AdminError),
    /// No thread for links.
    #[error("cannot start a thread for links: {0}")]
    Thread(io::Error),
    /// No randomness.
    #[error("the system gives no random bytes: {0}")]
    Random(#[from] getrandom::Error),
}

/// A running hub.
#[derive(Debug)]
pub struct Hub {
    engine: Engine,
    authority: Arc<Authority>,
    registry: Registry,
    endpoints: Endpoints,
    links: Arc<Links>,
    readiness: Readiness,
    /// Fronts, links, bootstrap, admin: everything that talks to somebody.
    fronts: Tasks,
    /// What follows the tier and holds this replica's lease: to the end of every session.
    following: Tasks,
    /// The driver and its store.
    driving: Tasks,
}

impl Hub {
    /// Starts a hub. When this returns, every endpoint serves.
    ///
    /// # Errors
    /// See [`StartError`]; nothing is left running.
    pub async fn start(config: &Config) -> Result<Self, StartError> {
        let authority = match config.fabric.as_ref().and_then(|fabric| fabric.authority.as_deref()) {
            Some(mounted) => Authority::mounted(mounted, config.tier.as_deref())?,
            None => Authority::open(&config.data, config.tier.as_deref())?,
        };
        let authority = Arc::new(authority);
        let auth = auth(config)?;
        let (fronts, following, driving) = (Tasks::new(), Tasks::new(), Tasks::new());
        let engine = Engine::start(config, &authority, &driving).await?;
        let sockets = match Sockets::bind(config, &authority, &fronts).await {
            Ok(sockets) => sockets,
            Err(error) => {
                drop(engine);
                driving.drain(START_FAILED).await;
                return Err(error);
            }
        };
        let endpoints = sockets.endpoints(config);
        let registry = Registry::new(Arc::clone(&engine.fabric), engine.handle.clone());
        let links = Arc::<Links>::default();
        let readiness = Readiness::default();
        let mut hub =
            Self { engine, authority, registry, endpoints, links, readiness, fronts, following, driving };
        let started = Box::pin(hub.serve(config, auth, sockets)).await;
        let confirmed = started.and_then(|()| match &hub.engine.own {
            Some(own) => Ok(own.instance.confirm(&config.data)?),
            None => Ok(()),
        });
        match confirmed {
            Ok(()) => Ok(hub),
            Err(error) => {
                hub.stop(START_FAILED).await;
                Err(error)
            }
        }
    }

    /// Where it serves.
    #[must_use]
    pub fn endpoints(&self) -> &Endpoints {
        &self.endpoints
    }

    /// Its broker.
    #[must_use]
    pub fn handle(&self) -> &Handle {
        &self.engine.handle
    }

    /// What its tier knows of nodes.
    #[must_use]
    pub const fn registry(&self) -> &Registry {
        &self.registry
    }

    /// Its links, and their Streams.
    #[must_use]
    pub fn links(&self) -> &Arc<Links> {
        &self.links
    }

    /// The tier's id.
    #[must_use]
    pub fn tier(&self) -> &str {
        self.authority.tier()
    }

    /// Makes a join token. Its text is a secret.
    ///
    /// # Errors
    /// See [`CreateError`].
    pub async fn create_token(&self, request: &TokenRequest) -> Result<String, CreateError> {
        Ok(token::create(&self.registry, &self.authority, request).await?.to_string())
    }

    /// Stops in order, within the deadline: not ready from now on, nodes are told to go elsewhere in waves. Clean:
    /// every task ended by itself and all is on disk.
    pub async fn stop(self, deadline: Duration) -> Drained {
        let _not_ready = self.readiness.register("draining");
        let share = deadline / 4;
        // The core keeps to its time; beyond, its store does not answer.
        let within = share.saturating_sub(share / 8);
        match timeout(share, self.engine.handle.call(Command::Drain { within })).await {
            Ok(Ok(Response::Drained { clean, forced })) => tracing::info!(clean, forced, "links drained"),
            Ok(Ok(other)) => tracing::error!(?other, "the broker's answer to a drain is none"),
            Ok(Err(stopped)) => tracing::warn!(%stopped, "the broker ended before it was drained"),
            Err(_elapsed) => tracing::warn!("sessions did not end in time"),
        }
        let fronts = self.fronts.drain(share).await;
        let following = self.following.drain(share).await;
        drop((self.engine, self.registry));
        let driving = self.driving.drain(share).await;
        let forced: usize = [fronts, following, driving]
            .into_iter()
            .map(|drained| match drained {
                Drained::Clean => 0,
                Drained::Forced(tasks) => tasks,
            })
            .sum();
        if forced == 0 { Drained::Clean } else { Drained::Forced(forced) }
    }

    async fn serve(&mut self, config: &Config, auth: Auth, sockets: Sockets) -> Result<(), StartError> {
        let Sockets { nats, quic, websocket, bootstrap, kubernetes, kubelet, admin } = sockets;
        let readiness = self.readiness.clone();
        let exporter = Exporter::new(Some(self.engine.handle.clone()), readiness.clone())
            .with_durability(engine::durability(config));
        let nodes = self.nodes(config)?;
        self.engine.join(&self.following, &exporter, &readiness).await?;
        if let Some(own) = &self.engine.own {
            exporter.register(metrics::store(Arc::clone(&own.written)));
        }
        if let Some(listener) = nats {
            self.serve_nats(config, auth, listener, &exporter);
        }
        self.serve_links(config, quic, websocket, &exporter)?;
        if let Some((listener, tls)) = bootstrap {
            let at = |listening: Option<SocketAddr>| {
                listening.iter().map(|at| format!(":{}", at.port())).collect()
            };
            let (quic, websocket) = (at(self.endpoints.quic), at(self.endpoints.websocket));
            let bootstrap =
                Bootstrap::new(Arc::clone(&self.authority), self.registry.clone(), quic, websocket);
            let serving = bootstrap::serve(listener, tls, Arc::new(bootstrap), self.fronts.clone());
            self.fronts.spawn("bootstrap", serving);
        }
        if let Some(listener) = kubernetes {
            let options = kubeapi::Options {
                listener,
                folder: &config.data.join("kubernetes"),
                broker: self.engine.handle.clone(),
                tasks: self.fronts.clone(),
                tokens: Vec::new(),
                anonymous: false,
                nodes: Some(Arc::new(nodes.clone())),
                controllers: true,
            };
            let serving = Box::pin(kubeapi::serve(options)).await?;
            self.fronts.spawn("kubernetes of nodes", nodes::serve(&self.links, serving.front, &self.fronts));
            self.endpoints.kubernetes = Some(serving.address);
            self.endpoints.kubeconfig = Some(serving.kubeconfig);
        }
        if let Some(kubelet) = kubelet {
            Box::pin(self.serve_kubelet(config, nodes.clone(), kubelet)).await?;
        }
        self.serve_bridge(config, &exporter).await?;
        if let Some(address) = config.listen.metrics {
            let listening = metrics::serve(address, &exporter, &self.fronts).await;
            let bound =
                listening.map_err(|source| StartError::Listen { what: "metrics", address, source })?;
            self.endpoints.metrics = Some(bound);
        }
        let mut routes = ops::admin::router(Admin {
            broker: self.engine.handle.clone(),
            tasks: self.fronts.clone(),
            exporter,
            links: Arc::clone(&self.links),
            tier: Some(Arc::new(Administered { fabric: Arc::clone(&self.engine.fabric), nodes })),
        });
        if let Some(own) = &self.engine.own {
            let copier = own.copier.clone();
            let backups = Backups { copier, data: config.data.clone(), tasks: self.fronts.clone() };
            routes = routes.merge(ops::admin::backup::router(backups));
        }
        admin.serve(
            routes.merge(admin::router(Arc::clone(&self.authority), self.registry.clone())),
            &self.fronts,
        );
        Ok(())
    }

    /// The API server whose pods the nodes run.
    fn api_server(&self, config: &Config) -> Option<bridge::Source> {
        match (&config.kubernetes.cluster, &self.endpoints.kubeconfig) {
            (Some(kubernetes::Cluster::Kubeconfig(path)), _) => Some(bridge::Source::File(path.clone())),
            (Some(kubernetes::Cluster::Within), _) => Some(bridge::Source::InCluster),
            (None, Some(own)) => Some(bridge::Source::File(own.clone())),
            (None, None) => None,
        }
    }

    /// What a kubelet serves, for all nodes.
    async fn serve_kubelet(
        &self,
        config: &Config,
        nodes: NodeLinks,
        (listener, tls): (TcpListener, Arc<rustls::ServerConfig>),
    ) -> Result<(), StartError> {
        let Some(source) = self.api_server(config) else { return Ok(()) };
        let kubelet = Kubelet {
            access: Access::new(Cluster::open(&source, 1).await?),
            places: Places { fabric: Arc::clone(&self.engine.fabric), registry: self.registry.clone() },
            nodes: Forwarder::new(Arc::new(nodes), self.fronts.clone()),
        };
        self.fronts.spawn("kubelet endpoint", kubelet::serve(listener, tls, kubelet, self.fronts.clone()));
        Ok(())
    }

    /// The bridge to the hub's own API server, or to a cluster.
    async fn serve_bridge(&self, config: &Config, exporter: &Exporter) -> Result<(), StartError> {
        let Some(source) = self.api_server(config) else { return Ok(()) };
        let options = bridge::Options {
            source,
            leases: config.kubernetes.cluster.is_some(),
            addresses: config.kubernetes.addresses.clone(),
            port: self.endpoints.kubelet.map(|at| at.port()),
            writes_per_second: config.kubernetes.writes_per_second,
            seal: Some(self.authority.secrets_key()),
            links: Arc::clone(&self.links),
            tier: self.tier().to_owned(),
            broker: self.engine.handle.clone(),
            fabric: Arc::clone(&self.engine.fabric),
            tasks: self.fronts.clone(),
        };
        Ok(Box::pin(bridge::start(options, exporter)).await?)
    }

    /// The way to every node of the tier. Of a replica: others know from its lease where to dial it.
    fn nodes(&self, config: &Config) -> Result<NodeLinks, StartError> {
        let replicas = match &config.fabric {
            None => None,
            Some(fabric) => {
                let here = || self.endpoints.quic.map(advertised);
                if let Some(address) = fabric.advertise.clone().or_else(here) {
                    self.engine.advertise(address);
                }
                let credentials = credentials(&self.authority, engine::replica(config))?;
                let tls = Arc::new(tls::dialler(credentials, self.tier())?);
                let quic = QuicDialler::new(tls, Shape::HUB.with_heartbeat(config.limits.heartbeat))?;
                Some(Replicas::new(quic, Arc::new(link_params(config)), self.fronts.clone()))
            }
        };
        let (links, fabric) = (Arc::clone(&self.links), Arc::clone(&self.engine.fabric));
        Ok(NodeLinks { links, fabric, replicas })
    }

    fn serve_nats(&self, config: &Config, auth: Auth, listener: TcpListener, exporter: &Exporter) {
        let mut front = nats::Config::new(nats::Side::Hub, format!("octobus-{}", self.tier()), auth);
        front.max_payload = config.limits.nats_payload;
        front.max_connections = config.limits.nats_connections;
        front.connect_timeout = config.limits.connect_timeout;
        parts::register_nats(exporter, &front.counters);
        let serving = nats::serve(listener, Arc::new(front), self.engine.handle.clone(), self.fronts.clone());
        self.fronts.spawn("nats front", serving);
    }

    /// One acceptor at all ports: links are the same whichever they come by. Those by QUIC live on threads of their
    /// own, one for each processor, with everything but the core.
    fn serve_links(
        &self,
        config: &Config,
        quic: Option<QuicAddress>,
        websocket: Option<WebSocketListener>,
        exporter: &Exporter,
    ) -> Result<(), StartError> {
        let counters = Arc::<Counters>::default();
        exporter.register(metrics::links(Arc::clone(&counters)));
        let acceptor = Acceptor {
            broker: self.engine.handle.clone(),
            params: Arc::new(link_params(config)),
            admission: Admission::with_connections(config.limits.links),
            counters,
            links: Arc::clone(&self.links),
            tasks: self.fronts.clone(),
        };
        let authorizer =
            Authorizer::new(self.registry.clone(), self.tier()).with_replicas(config.fabric.is_some());
        let authorize = move |certificate: PeerCertificate| {
            let authorizer = authorizer.clone();
            async move { authorizer.authorize(certificate).await }
        };
        let ports = quic.map(QuicAddress::into_ports).unwrap_or_default();
        let admission = acceptor.admission.of_ports(ports.len());
        for port in ports {
            let acceptor = Acceptor { admission: admission.clone(), ..acceptor.clone() };
            let authorize = authorize.clone();
            let serving = move || async move {
                match port.listen() {
                    Ok(listener) => acceptor.run(listener, authorize).await,
                    Err(error) => tracing::error!(%error, "a thread of links does not serve"),
                }
            };
            self.fronts.spawn_thread("links", serving).map_err(StartError::Thread)?;
        }
        if let Some(listener) = websocket {
            self.fronts.spawn("WebSocket acceptor", acceptor.run(listener, authorize));
        }
        Ok(())
    }
}

/// How long the parts that did start have to end when another did not.
const START_FAILED: Duration = Duration::from_secs(3);

/// The sockets that peers and clients reach, bound before anything serves. (The metrics port follows: it
/// shows a broker that runs.)
struct Sockets {
    nats: Option<TcpListener>,
    quic: Option<QuicAddress>,
    websocket: Option<WebSocketListener>,
    bootstrap: Option<(TcpListener, Arc<rustls::ServerConfig>)>,
    kubernetes: Option<TcpListener>,
    kubelet: Option<(TcpListener, Arc<rustls::ServerConfig>)>,
    admin: AdminSocket,
}

impl Sockets {
    async fn bind(config: &Config, authority: &Authority, tasks: &Tasks) -> Result<Self, StartError> {
        let listen = &config.listen;
        let nats = listen_tcp("NATS", listen.nats).await?;
        let secret = TierSecret::new(authority.secret());
        let replica = engine::replica(config);
        let tls = Arc::new(link_tls(authority, replica, &secret)?);
        let shape = Shape::HUB.with_heartbeat(config.limits.heartbeat);
        let bind_quic =
            |address| QuicAddress::bind(address, Arc::clone(&tls), &secret, shape, link_threads());
        let quic = listen.quic.map(bind_quic).transpose()?;
        let websocket = listen.websocket.map(|address| {
            WebSocketListener::bind(address, &tls, tasks.clone()).map_err(|source| StartError::Listen {
                what: "WebSocket",
                address,
                source,
            })
        });
        let websocket = websocket.transpose()?;
        let bootstrap = match listen_tcp("bootstrap", listen.bootstrap).await? {
            Some(listener) => {
                let identity = authority.issue_hub(replica, &names(listen.bootstrap))?;
                Some((listener, bootstrap::tls(identity)?))
            }
            None => None,
        };
        let kubernetes = listen_tcp("Kubernetes API", listen.kubernetes).await?;
        let kubelet = match listen_tcp("kubelet", listen.kubelet).await? {
            Some(listener) => {
                let mut names = names(listen.kubelet);
                names.extend(config.kubernetes.addresses.iter().cloned());
                let identity = authority.issue_hub(replica, &names)?;
                Some((listener, kubelet::tls(identity, config.kubernetes.client_ca.as_ref())?))
            }
            None => None,
        };
        let admin = AdminSocket::bind(&listen.admin)?;
        Ok(Self { nats, quic, websocket, bootstrap, kubernetes, kubelet, admin })
    }

    fn endpoints(&self, config: &Config) -> Endpoints {
        let tcp = |listener: &TcpListener| listener.local_addr().ok();
        Endpoints {
            nats: self.nats.as_ref().and_then(tcp),
            quic: self.quic.as_ref().and_then(|listener| listener.local_addr().ok()),
            websocket: self.websocket.as_ref().and_then(|listener| listener.local_addr().ok()),
            bootstrap: self.bootstrap.as_ref().and_then(|(listener, _tls)| tcp(listener)),
            kubelet: self.kubelet.as_ref().and_then(|(listener, _tls)| tcp(listener)),
            admin: Some(PathBuf::from(&config.listen.admin)),
            ..Endpoints::default()
        }
    }
}

/// Threads of links by QUIC: more than processors only hand datagrams around.
fn link_threads() -> usize {
    std::thread::available_parallelism().map_or(1, |processors| processors.get().min(LINK_THREADS_MAX))
}

/// There is one core for all of them.
const LINK_THREADS_MAX: usize = 16;

async fn listen_tcp(
    what: &'static str,
    address: Option<SocketAddr>,
) -> Result<Option<TcpListener>, StartError> {
    let Some(address) = address else { return Ok(None) };
    match TcpListener::bind(address).await {
        Ok(listener) => Ok(Some(listener)),
        Err(source) => Err(StartError::Listen { what, address, source }),
    }
}

/// What both kinds of link present and verify.
fn link_tls(
    authority: &Authority,
    replica: &str,
    secret: &TierSecret,
) -> Result<rustls::ServerConfig, StartError> {
    Ok(tls::acceptor(credentials(authority, replica)?, secret)?)
}

/// What this hub shows peers, and whom it believes.
fn credentials(authority: &Authority, replica: &str) -> Result<Credentials, StartError> {
    let identity = authority.issue_hub(replica, &[])?;
    Ok(Credentials { ca: vec![authority.certificate().clone()], chain: identity.chain, key: identity.key })
}

fn link_params(config: &Config) -> Params {
    Params { heartbeat: config.limits.heartbeat, ..Params::default() }
}

/// Where other replicas dial a port that listens here: by the machine's name, if it listens everywhere.
fn advertised(listening: SocketAddr) -> String {
    if !listening.ip().is_unspecified() {
        return listening.to_string();
    }
    let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
    format!("{host}:{}", listening.port())
}

/// Under which names HTTPS clients that check names may reach the bootstrap port. Nodes check the CA.
fn names(address: Option<SocketAddr>) -> Vec<String> {
    let mut names = vec!["localhost".to_owned(), "127.0.0.1".to_owned(), "::1".to_owned()];
    if let Some(ip) =
        address.map(|address| address.ip()).filter(|ip| !ip.is_unspecified() && !ip.is_loopback())
    {
        names.push(ip.to_string());
    }
    let host = rustix::system::uname().nodename().to_string_lossy().to_ascii_lowercase();
    if codec::topic::validate_node_name(&host).is_ok() && !names.contains(&host) {
        names.push(host);
    }
    names
}

fn auth(config: &Config) -> Result<Auth, StartError> {
    if config.auth.refuses_everybody() {
        tracing::warn!("no client can get in: name a file of users (auth.users, --users)");
    }
    Ok(match &config.auth.users {
        Some(path) => Auth::Users(Arc::new(Users::load(path)?)),
        None if config.auth.anonymous => Auth::Anonymous,
        None => Auth::Users(Arc::new(Users::parse("")?)),
    })
}
