//! What runs containers: the seam to it, in its own words.
//!
//! The interface is CRI's ([`cri`]), so that nothing has to be mapped twice; what the agent does not use is not
//! there. Two implementations: a socket of containerd or CRI-O, and a fake with faults, for tests and simulation.
//!
//! Stopping and removing are idempotent: of what is not there they succeed. Everything else that names what is
//! not there fails with [`RuntimeError::NotFound`].

use std::{fmt, future::Future, pin::Pin, time::Duration};

use tokio::sync::mpsc;

/// The messages of the Container Runtime Interface, version v1.
#[allow(missing_docs, clippy::all, unreachable_pub, unused_qualifications)]
pub mod cri {
    tonic::include_proto!("runtime.v1");
}

/// An answer of the runtime. Dropping it leaves open whether what was asked for happened.
pub type Answer<'a, T> = Pin<Box<dyn Future<Output = Result<T, RuntimeError>> + Send + 'a>>;

/// Why the runtime did not do it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RuntimeError {
    /// There is no such sandbox, container or image.
    #[error("{0}")]
    NotFound(String),
    /// It cannot be reached, or did not answer in time: it may have happened.
    #[error("the container runtime does not answer: {0}")]
    Unavailable(String),
    /// It said no, and why.
    #[error("{0}")]
    Refused(String),
}

/// Something may have become of a container or sandbox: look at it. Lost hints are found by listing, which the
/// agent does from time to time anyway.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hint {
    /// Id of a container or of a sandbox; empty: anything may have changed.
    pub id: String,
}

/// See the module's documentation.
pub trait Runtime: fmt::Debug + Send + Sync {
    /// Name and version.
    fn version(&self) -> Answer<'_, cri::VersionResponse>;
    /// Its conditions: whether it is ready, and whether its network is.
    fn status(&self) -> Answer<'_, cri::RuntimeStatus>;

    /// Makes a sandbox and its network; its id.
    fn run_sandbox(&self, config: cri::PodSandboxConfig) -> Answer<'_, String>;
    /// Ends all that runs in it, and its network.
    fn stop_sandbox<'a>(&'a self, id: &'a str) -> Answer<'a, ()>;
    /// Removes it and its containers.
    fn remove_sandbox<'a>(&'a self, id: &'a str) -> Answer<'a, ()>;
    /// What it is now.
    fn sandbox_status<'a>(&'a self, id: &'a str) -> Answer<'a, cri::PodSandboxStatus>;
    /// All sandboxes, of this agent or not.
    fn sandboxes(&self) -> Answer<'_, Vec<cri::PodSandbox>>;

    /// Makes a container in a sandbox; its id.
    fn create_container<'a>(
        &'a self,
        sandbox: &'a str,
        config: cri::ContainerConfig,
        sandbox_config: cri::PodSandboxConfig,
    ) -> Answer<'a, String>;
    /// Starts it.
    fn start_container<'a>(&'a self, id: &'a str) -> Answer<'a, ()>;
    /// Asks it to end, and kills it after the grace period.
    fn stop_container<'a>(&'a self, id: &'a str, grace: Duration) -> Answer<'a, ()>;
    /// Removes it, running or not.
    fn remove_container<'a>(&'a self, id: &'a str) -> Answer<'a, ()>;
    /// What it is now.
    fn container_status<'a>(&'a self, id: &'a str) -> Answer<'a, cri::ContainerStatus>;
    /// All containers, of this agent or not.
    fn containers(&self) -> Answer<'_, Vec<cri::Container>>;
    /// Its log file was moved away: open it anew.
    fn reopen_log<'a>(&'a self, id: &'a str) -> Answer<'a, ()>;

    /// Runs a command in a container to its end. A command that exceeds the time limit is
    /// [`RuntimeError::Unavailable`].
    fn exec_sync<'a>(
        &'a self,
        id: &'a str,
        command: Vec<String>,
        limit: Duration,
    ) -> Answer<'a, cri::ExecSyncResponse>;
    /// URL of the runtime's streaming server, at which one exec session waits.
    fn exec(&self, request: cri::ExecRequest) -> Answer<'_, String>;
    /// As [`Runtime::exec`], for the container's own process.
    fn attach(&self, request: cri::AttachRequest) -> Answer<'_, String>;
    /// As [`Runtime::exec`], for ports of a sandbox.
    fn port_forward(&self, request: cri::PortForwardRequest) -> Answer<'_, String>;

    /// Memory, processor and disk that running containers use.
    fn container_stats(&self) -> Answer<'_, Vec<cri::ContainerStats>>;
    /// Hints from now on. The channel ends with the runtime's connection; take another then, and list.
    fn hints(&self) -> Answer<'_, mpsc::Receiver<Hint>>;

    /// All images.
    fn images(&self) -> Answer<'_, Vec<cri::Image>>;
    /// The image of this name, if it is here.
    fn image<'a>(&'a self, name: &'a str) -> Answer<'a, Option<cri::Image>>;
    /// Gets an image from its registry; its id.
    fn pull_image<'a>(&'a self, name: &'a str, auth: Option<cri::AuthConfig>) -> Answer<'a, String>;
    /// Removes an image with all its names.
    fn remove_image<'a>(&'a self, name: &'a str) -> Answer<'a, ()>;
    /// How full the disks of images are.
    fn image_disks(&self) -> Answer<'_, Vec<cri::FilesystemUsage>>;
}
