//! A node in one process: composition root.
//!
//! The node serves its devices as soon as its store is open; the hub is nowhere on that path. Whether it
//! has joined, whether a hub answers, whether the certificate has expired: devices do not notice.
//!
//! Start: lock and open the store, load the identity, **bind every socket**, then start tasks. Stop in the
//! opposite order: sessions are told and drained, fronts and link end, driver and store end.

use std::{io, net::SocketAddr, path::Path, sync::Arc, time::Duration};

use broker::{
    Handle, Tasks, core, driver,
    event::{Command, Response},
    front::{
        auth::{Auth, Users, UsersError},
        mqtt, nats,
    },
    instance::{Instance, InstanceError},
    link::{
        Counters, Links, Params,
        dial::{Dialler, Status},
        quic::{BindError, QuicListener},
    },
    store::{self, OpenError, lmdb::backup::Copier},
    tasks::Drained,
};
use codec::Class;
use edged::{Choice, Edged, Options};
use ops::{
    admin::{self, Admin, AdminError, AdminSocket, backup::Backups, pipe::Pipes},
    config::{Config, edged::Runtime},
    endpoints::Endpoints,
    metrics::{self, Exporter, Readiness},
    parts,
};
use tokio::{net::TcpListener, sync::watch, time::timeout};

use crate::{
    downlink::{self, Downlink},
    identity::{Identity, IdentityError},
    join,
    local::{AtTheMachine, LocalApi},
    uplink::Uplink,
};

/// Why a node does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The store.
    #[error(transparent)]
    Store(#[from] OpenError),
    /// The identity.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// Nobody has said who this is.
    #[error("this node has no name: join a hub with `octobus join`, or name it with --node to work alone")]
    NoName,
    /// Two have said it, differently.
    #[error(
        "this folder is node {joined}'s, which joined a hub, but --node says {configured}: leave --node out"
    )]
    OtherName { joined: Arc<str>, configured: Arc<str> },
    /// It is to be a relay, and may not.
    #[error(
        "others cannot link here (listen.quic): this node {0}; make a token with `octobus token create --node \
         NAME --forwards NAME,...` at the hub and join with it, or leave listen.quic out"
    )]
    NoRelay(&'static str),
    /// The QUIC port of a relay.
    #[error("QUIC: {0}")]
    Quic(#[from] BindError),
    /// The instance.
    #[error(transparent)]
    Instance(#[from] InstanceError),
    /// The user file.
    #[error(transparent)]
    Users(#[from] UsersError),
    /// A TCP port.
    #[error(
        "cannot listen at {address} ({what}): {source}; is something else running there? port 0 picks a free one"
    )]
    Listen { what: &'static str, address: SocketAddr, source: io::Error },
    /// The authority of the node's own API.
    #[error(transparent)]
    Api(#[from] kubeapi::PkiError),
    /// The admin socket.
    #[error(transparent)]
    Admin(#[from] AdminError),
    /// No randomness.
    #[error("the system gives no random bytes: {0}")]
    Random(#[from] getrandom::Error),
}

/// A running node.
#[derive(Debug)]
pub struct Edge {
    name: Arc<str>,
    handle: Handle,
    endpoints: Endpoints,
    link: watch::Receiver<Status>,
    links: Arc<Links>,
    pods: Option<Edged>,
    /// Fronts, link, admin: everything that talks to somebody.
    fronts: Tasks,
    /// The driver and its store.
    engine: Tasks,
}

impl Edge {
    /// Starts a node. When this returns, every endpoint serves; the link comes when it comes.
    ///
    /// # Errors
    /// See [`StartError`]; nothing is left running.
    pub async fn start(config: &Config) -> Result<Self, StartError> {
        let (store, recovered) = store::lmdb::open(&config.data, store::lmdb::Options::node())?;
        let identity = Identity::load(&config.data)?;
        let name = name(config, identity.as_ref())?;
        let instance = Instance::open(&config.data)?;
        let auth = auth(config)?;
        let sockets = Sockets::bind(config, identity.as_ref()).await?;
        let endpoints = sockets.endpoints(config);

        let (copier, written) = (store.copier(), store.written());
        let (fronts, engine) = (Tasks::new(), Tasks::new());
        let core = core_config(config, &name, identity.as_ref(), &instance, getrandom::u64()?);
        let handle = driver::start(core, store, recovered, &engine);
        let (status, link) = Dialler::status();
        let links = Arc::<Links>::default();
        let mut edge = Self { name, handle, endpoints, link, links, pods: None, fronts, engine };
        let exporter = Exporter::new(Some(edge.handle.clone()), Readiness::default());
        exporter.register(metrics::store(written));
        let mut sockets = sockets;
        let identity = edge.keep_linked(config, identity, sockets.quic.take(), status, &exporter);
        edge.run_pods(config, identity.clone());
        let started = match edge.serve_api(config, sockets.api.take(), identity) {
            Ok(api) => edge.serve(config, auth, sockets, api, exporter, copier).await,
            Err(error) => Err(error),
        };
        match started.and_then(|()| Ok(instance.confirm(&config.data)?)) {
            Ok(()) => Ok(edge),
            Err(error) => {
                edge.stop(START_FAILED).await;
                Err(error)
            }
        }
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where it serves.
    #[must_use]
    pub fn endpoints(&self) -> &Endpoints {
        &self.endpoints
    }

    /// Its broker.
    #[must_use]
    pub fn handle(&self) -> &Handle {
        &self.handle
    }

    /// Where its dialling stands. A node that has not joined stays at `Dialing`, with no hub.
    #[must_use]
    pub fn link(&self) -> watch::Receiver<Status> {
        self.link.clone()
    }

    /// Its link, and its Streams.
    #[must_use]
    pub fn links(&self) -> &Arc<Links> {
        &self.links
    }

    /// Stops in order, within the deadline. Clean: every task ended by itself and all is on disk.
    ///
    /// Pods run on, unless their runtime is one of the node's own: they end first, within a deadline of their own.
    pub async fn stop(mut self, deadline: Duration) -> Drained {
        if let Some(pods) = self.pods.take() {
            pods.stop(PODS_END).await;
        }
        let share = deadline / 3;
        // The core keeps to its time; beyond, its store does not answer.
        let within = share.saturating_sub(share / 8);
        match timeout(share, self.handle.call(Command::Drain { within })).await {
            Ok(Ok(Response::Drained { clean, forced })) => tracing::info!(clean, forced, "links drained"),
            Ok(Ok(other)) => tracing::error!(?other, "the broker's answer to a drain is none"),
            Ok(Err(stopped)) => tracing::warn!(%stopped, "the broker ended before it was drained"),
            Err(_elapsed) => tracing::warn!("sessions did not end in time"),
        }
        let fronts = self.fronts.drain(share).await;
        drop(self.handle);
        let engine = self.engine.drain(share).await;
        match (fronts, engine) {
            (Drained::Clean, engine) => engine,
            (Drained::Forced(fronts), Drained::Clean) => Drained::Forced(fronts),
            (Drained::Forced(fronts), Drained::Forced(engine)) => Drained::Forced(fronts + engine),
        }
    }

    fn keep_linked(
        &self,
        config: &Config,
        identity: Option<Identity>,
        listener: Option<QuicListener>,
        status: watch::Sender<Status>,
        exporter: &Exporter,
    ) -> watch::Receiver<Option<Arc<Identity>>> {
        if identity.is_none() {
            tracing::info!(node = %self.name, "not joined: serving devices alone until `octobus join`");
        }
        let (current, identity) = watch::channel(identity.map(Arc::new));
        let data: Arc<Path> = Arc::from(config.data.as_path());
        let keeping = join::keep_current(data, Arc::clone(&self.name), current, self.fronts.clone());
        self.fronts.spawn("identity", keeping);
        let counters = Arc::<Counters>::default();
        exporter.register(metrics::links(Arc::clone(&counters)));
        let uplink = Uplink {
            data: config.data.clone(),
            hubs: config.hubs.clone(),
            relay: config.relay.clone(),
            proxy: config.proxy.clone(),
            broker: self.handle.clone(),
            params: Arc::new(link_params(config)),
            counters: Arc::clone(&counters),
            links: Arc::clone(&self.links),
        };
        if let (Some(listener), Some(address)) = (listener, self.endpoints.quic) {
            let downlink = Downlink {
                address,
                broker: self.handle.clone(),
                params: Arc::new(link_params(config)),
                counters,
                links_max: config.limits.links,
            };
            let running = downlink.run(listener, identity.clone(), self.fronts.clone());
            self.fronts.spawn("downlink", running);
        }
        self.fronts.spawn("uplink", uplink.run(identity.clone(), status, self.fronts.clone()));
        identity
    }

    /// Pods come up beside the node, when there is a runtime for them.
    fn run_pods(&mut self, config: &Config, identity: watch::Receiver<Option<Arc<Identity>>>) {
        let runtime = match &config.edged.runtime {
            Runtime::Off => return,
            Runtime::Auto => Choice::Auto,
            Runtime::Socket(path) => Choice::Socket(path.clone()),
        };
        let options = Options {
            node: Arc::clone(&self.name),
            data: config.data.clone(),
            runtime,
            private: config.edged.private,
            images: config.edged.images.clone(),
            static_pods: config.edged.static_pods.clone(),
            max_pods: config.edged.max_pods,
            sandbox_image: config.edged.sandbox_image.clone(),
            cluster_dns: config.edged.cluster_dns.clone(),
            cluster_domain: config.edged.cluster_domain.clone(),
            api: self.endpoints.api.map(|address| (address.ip().to_string(), address.port())),
            secrets: Arc::new(move || identity.borrow().as_deref().and_then(Identity::secrets_key)),
        };
        self.pods = Some(Edged::start(options, self.handle.clone(), Arc::clone(&self.links)));
    }

    fn serve_api(
        &mut self,
        config: &Config,
        listener: Option<TcpListener>,
        identity: watch::Receiver<Option<Arc<Identity>>>,
    ) -> Result<Arc<dyn Pipes>, StartError> {
        let api = LocalApi {
            node: Arc::clone(&self.name),
            data: &config.data,
            broker: self.handle.clone(),
            links: Arc::clone(&self.links),
            identity,
            tasks: self.fronts.clone(),
        };
        let serving = api.serve(listener)?;
        self.endpoints.api_kubeconfig = serving.kubeconfig;
        Ok(Arc::new(AtTheMachine(serving.api)))
    }

    async fn serve(
        &mut self,
        config: &Config,
        auth: Auth,
        sockets: Sockets,
        api: Arc<dyn Pipes>,
        exporter: Exporter,
        copier: Copier,
    ) -> Result<(), StartError> {
        if let Some(address) = config.listen.metrics {
            let listening = metrics::serve(address, &exporter, &self.fronts).await;
            let bound =
                listening.map_err(|source| StartError::Listen { what: "metrics", address, source })?;
            self.endpoints.metrics = Some(bound);
        }
        let Sockets { mqtt: mqtt_listener, nats: nats_listener, admin: admin_socket, .. } = sockets;
        if let Some(listener) = mqtt_listener {
            let mut front = mqtt::Config::new(auth.clone());
            front.packet_max = config.limits.mqtt_packet;
            front.session_expiry_max =
                u32::try_from(config.limits.session_expiry.as_secs()).unwrap_or(u32::MAX);
            front.connections_max = config.limits.mqtt_connections;
            front.connect_timeout = config.limits.connect_timeout;
            parts::register_mqtt(&exporter, &front.counters);
            let serving = mqtt::serve(listener, Arc::new(front), self.handle.clone(), self.fronts.clone());
            self.fronts.spawn("mqtt front", serving);
        }
        if let Some(listener) = nats_listener {
            let mut front = nats::Config::new(nats::Side::Node, format!("octobus-{}", self.name), auth);
            front.max_payload = config.limits.nats_payload;
            front.max_connections = config.limits.nats_connections;
            front.connect_timeout = config.limits.connect_timeout;
            parts::register_nats(&exporter, &front.counters);
            let serving = nats::serve(listener, Arc::new(front), self.handle.clone(), self.fronts.clone());
            self.fronts.spawn("nats front", serving);
        }
        let (broker, tasks) = (self.handle.clone(), self.fronts.clone());
        let routes =
            admin::router(Admin { broker, tasks, exporter, links: Arc::clone(&self.links), tier: None });
        let backups = Backups { copier, data: config.data.clone(), tasks: self.fronts.clone() };
        let routes = routes.merge(admin::backup::router(backups));
        admin_socket.serve(routes.merge(admin::pipe::router(api, self.fronts.clone())), &self.fronts);
        Ok(())
    }
}

/// The stream of what happens to pods, and what is kept of it while no hub takes it.
const EVENTS: &str = "events";
const EVENTS_BYTES: u64 = 16 << 20;
/// How long pods have to end whose runtime ends with the node.
const PODS_END: Duration = Duration::from_secs(40);
/// How long the parts that did start have to end when another did not.
const START_FAILED: Duration = Duration::from_secs(3);

/// The sockets that clients reach, bound before anything serves. (The metrics port follows: it shows a
/// broker that runs.)
struct Sockets {
    mqtt: Option<TcpListener>,
    nats: Option<TcpListener>,
    api: Option<TcpListener>,
    admin: AdminSocket,
    /// Of a relay.
    quic: Option<QuicListener>,
}

impl Sockets {
    async fn bind(config: &Config, identity: Option<&Identity>) -> Result<Self, StartError> {
        let quic = match (config.listen.quic, identity) {
            (None, _) => None,
            (Some(_), None) => return Err(StartError::NoRelay("has not joined a hub")),
            (Some(_), Some(identity)) if !identity.is_relay() => {
                return Err(StartError::NoRelay("has a certificate that does not permit it"));
            }
            (Some(address), Some(identity)) => Some(downlink::bind(address, identity, &link_params(config))?),
        };
        Ok(Self {
            quic,
            mqtt: listen_tcp("MQTT", config.listen.mqtt).await?,
            nats: listen_tcp("NATS", config.listen.nats).await?,
            api: listen_tcp("the node's API", config.listen.api).await?,
            admin: AdminSocket::bind(&config.listen.admin)?,
        })
    }

    fn endpoints(&self, config: &Config) -> Endpoints {
        let tcp = |listener: &TcpListener| listener.local_addr().ok();
        Endpoints {
            mqtt: self.mqtt.as_ref().and_then(tcp),
            nats: self.nats.as_ref().and_then(tcp),
            api: self.api.as_ref().and_then(tcp),
            quic: self.quic.as_ref().and_then(|listener| listener.local_addr().ok()),
            admin: Some(config.listen.admin.clone()),
            ..Endpoints::default()
        }
    }
}

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

/// The name in the certificate; without one, the configured name. They never differ.
fn name(config: &Config, identity: Option<&Identity>) -> Result<Arc<str>, StartError> {
    match (identity.map(Identity::name), config.node.clone()) {
        (Some(joined), Some(configured)) if joined != configured => {
            Err(StartError::OtherName { joined, configured })
        }
        (Some(name), _) | (None, Some(name)) => Ok(name),
        (None, None) => Err(StartError::NoName),
    }
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

fn link_params(config: &Config) -> Params {
    Params { heartbeat: config.limits.heartbeat, ..Params::default() }
}

fn core_config(
    config: &Config,
    name: &str,
    identity: Option<&Identity>,
    instance: &Instance,
    seed: u64,
) -> core::Config {
    let mut core = core::Config::node(name, instance.id, seed);
    core.mint = instance.minted;
    core.relay = config.listen.quic.is_some();
    core.tier = identity.map_or("", Identity::tier).into();
    let (streams, default) = ops::config::streams::for_core(&config.streams);
    // Before all others, whatever their filters: what happens to pods.
    core.streams = streams;
    let filters = vec![codec::Filter::parse(edged::EVENT_TOPIC).expect("a topic is a filter")];
    match core.streams.iter_mut().find(|stream| &*stream.name == EVENTS) {
        Some(events) => events.filters.extend(filters),
        None => {
            let policy = core::Policy::of_class(Class::Event, EVENTS_BYTES);
            let events = core::StreamConfig { name: EVENTS.into(), filters, class: Class::Event, policy };
            core.streams.insert(0, events);
        }
    }
    if let Some(default) = default {
        core.default_stream = default;
    }
    core.budgets = config.budgets.clone();
    core.exports = config.export.policy();
    core.imports = config.import.policy();
    core
}
