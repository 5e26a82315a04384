//! [`Runtime`] over the unix socket of a runtime that speaks CRI v1: containerd, CRI-O.
//!
//! One HTTP/2 connection carries all calls. It is made by the first call, and again by the first call after it broke:
//! while the runtime is away calls are [`RuntimeError::Unavailable`], and when it is back they work. No call is
//! repeated here, because only the caller knows what may be done twice.
//!
//! Every call has a deadline by its kind. The runtime is told it, so that it gives up too, and it is kept here, because
//! a runtime that hangs keeps none.

mod hints;

use std::{
    error::Error as _,
    future::Future,
    path::{Path, PathBuf},
    time::Duration,
};

use tokio::{sync::mpsc, time::timeout};
use tonic::{
    Code, Request, Response, Status,
    transport::{Channel, Endpoint},
};

use crate::runtime::{
    Answer, Hint, Runtime, RuntimeError,
    cri::{self, image_service_client::ImageServiceClient, runtime_service_client::RuntimeServiceClient},
};

/// Questions: they touch nothing, but a small machine that starts many pods answers late.
const QUERY: Duration = Duration::from_secs(60);
/// Whatever makes, starts, stops or removes. A sandbox may wait for its network.
const CHANGE: Duration = Duration::from_secs(240);
/// An image may be large and the line slow; the runtime itself gives up a pull that makes no progress.
const PULL: Duration = Duration::from_secs(3600);
/// What the runtime has, beyond the time that the call itself may take, to say how it went.
const MARGIN: Duration = Duration::from_secs(2);
/// The largest answer: what kubelet allows too. A runtime cuts the output of a command to this.
const ANSWER_BYTES_MAX: usize = 16 << 20;
/// gRPC errors come in headers, and runtimes put whole outputs of failed commands there.
const HEADER_BYTES_MAX: u32 = 256 << 10;

/// A runtime behind a socket.
#[derive(Debug, Clone)]
pub struct Socket {
    path: PathBuf,
    runtime: RuntimeServiceClient<Channel>,
    images: ImageServiceClient<Channel>,
    channel: Channel,
}

impl Socket {
    /// The runtime at this path. Nothing is connected yet, and nothing needs to be there. To be called within a tokio
    /// runtime, which carries the connection from then on.
    ///
    /// # Errors
    /// The path cannot be that of a socket.
    pub fn new(path: &Path) -> Result<Self, RuntimeError> {
        let address = path
            .to_str()
            .filter(|_| path.is_absolute())
            .ok_or_else(|| RuntimeError::Refused(format!("{} is no path of a socket", path.display())))?;
        let channel = Endpoint::from_shared(format!("unix://{address}"))
            .map_err(|e| RuntimeError::Refused(format!("{address} is no path of a socket: {e}")))?
            .http2_max_header_list_size(HEADER_BYTES_MAX)
            .connect_lazy();
        Ok(Self {
            path: path.to_owned(),
            runtime: RuntimeServiceClient::new(channel.clone()).max_decoding_message_size(ANSWER_BYTES_MAX),
            images: ImageServiceClient::new(channel.clone()).max_decoding_message_size(ANSWER_BYTES_MAX),
            channel,
        })
    }

    /// Where the socket is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// What a status of gRPC means. One with a source was made on this side: the connection broke, and nobody knows how
/// far the runtime came.
fn error(status: &Status) -> RuntimeError {
    if let Some(cause) = status.source() {
        let mut root = cause;
        while let Some(deeper) = root.source() {
            root = deeper;
        }
        return RuntimeError::Unavailable(root.to_string());
    }
    let message = match status.message() {
        "" => status.code().to_string(),
        message => message.to_owned(),
    };
    match status.code() {
        Code::NotFound => RuntimeError::NotFound(message),
        Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled => RuntimeError::Unavailable(message),
        // What containerd says, with no code of its own, from when its socket is there until it knows its containers.
        _ if message.contains("server is not initialized yet") => RuntimeError::Unavailable(message),
        _ => RuntimeError::Refused(message),
    }
}

/// One call with its deadline, on this side and at the runtime.
async fn ask<Q, A, F>(
    limit: Duration,
    message: Q,
    call: impl FnOnce(Request<Q>) -> F,
) -> Result<A, RuntimeError>
where
    F: Future<Output = Result<Response<A>, Status>>,
{
    let mut request = Request::new(message);
    request.set_timeout(limit);
    match timeout(limit, call(request)).await {
        Ok(Ok(answer)) => Ok(answer.into_inner()),
        Ok(Err(status)) => Err(error(&status)),
        Err(_) => Err(RuntimeError::Unavailable(format!("no answer within {} s", limit.as_secs()))),
    }
}

/// A call of one of the socket's clients. A client is a handle to the channel: each call has its own.
macro_rules! ask {
    ($client:expr, $method:ident, $limit:expr, $message:expr) => {{
        let mut client = $client.clone();
        ask($limit, $message, move |request| async move { client.$method(request).await })
    }};
}

/// Of what is not there, stopping and removing succeed.
fn gone_is_done<A>(answer: Result<A, RuntimeError>) -> Result<(), RuntimeError> {
    match answer {
        Ok(_) | Err(RuntimeError::NotFound(_)) => Ok(()),
        Err(e) => Err(e),
    }
}

/// Runtimes may leave out what the answer is about; then there is no such thing.
fn present<A>(answer: Option<A>, id: &str) -> Result<A, RuntimeError> {
    answer.ok_or_else(|| RuntimeError::NotFound(format!("the runtime says nothing about {id}")))
}

/// CRI counts in whole seconds; 0 would mean without a limit, or at once.
fn whole_seconds(time: Duration) -> i64 {
    let seconds = time.as_secs().saturating_add(u64::from(time.subsec_nanos() > 0));
    i64::try_from(seconds).unwrap_or(i64::MAX)
}

impl Runtime for Socket {
    fn version(&self) -> Answer<'_, cri::VersionResponse> {
        let request = cri::VersionRequest { version: "0.1.0".to_owned() };
        Box::pin(ask!(self.runtime, version, QUERY, request))
    }

    fn status(&self) -> Answer<'_, cri::RuntimeStatus> {
        let answer = ask!(self.runtime, status, QUERY, cri::StatusRequest { verbose: false });
        Box::pin(async { present(answer.await?.status, "itself") })
    }

    fn run_sandbox(&self, config: cri::PodSandboxConfig) -> Answer<'_, String> {
        let request = cri::RunPodSandboxRequest { config: Some(config), runtime_handler: String::new() };
        let answer = ask!(self.runtime, run_pod_sandbox, CHANGE, request);
        Box::pin(async { Ok(answer.await?.pod_sandbox_id) })
    }

    fn stop_sandbox<'a>(&'a self, id: &'a str) -> Answer<'a, ()> {
        let request = cri::StopPodSandboxRequest { pod_sandbox_id: id.to_owned() };
        let answer = ask!(self.runtime, stop_pod_sandbox, CHANGE, request);
        Box::pin(async { gone_is_done(answer.await) })
    }

    fn remove_sandbox<'a>(&'a self, id: &'a str) -> Answer<'a, ()> {
        let request = cri::RemovePodSandboxRequest { pod_sandbox_id: id.to_owned() };
        let answer = ask!(self.runtime, remove_pod_sandbox, CHANGE, request);
        Box::pin(async { gone_is_done(answer.await) })
    }

    fn sandbox_status<'a>(&'a self, id: &'a str) -> Answer<'a, cri::PodSandboxStatus> {
        let request = cri::PodSandboxStatusRequest { pod_sandbox_id: id.to_owned(), verbose: false };
        let answer = ask!(self.runtime, pod_sandbox_status, QUERY, request);
        Box::pin(async move { present(answer.await?.status, id) })
    }

    fn sandboxes(&self) -> Answer<'_, Vec<cri::PodSandbox>> {
        let request = cri::ListPodSandboxRequest { filter: None };
        let answer = ask!(self.runtime, list_pod_sandbox, QUERY, request);
        Box::pin(async { Ok(answer.await?.items) })
    }

    fn create_container<'a>(
        &'a self,
        sandbox: &'a str,
        config: cri::ContainerConfig,
        sandbox_config: cri::PodSandboxConfig,
    ) -> Answer<'a, String> {
        let request = cri::CreateContainerRequest {
            pod_sandbox_id: sandbox.to_owned(),
            config: Some(config),
            sandbox_config: Some(sandbox_config),
        };
        let answer = Box::pin(ask!(self.runtime, create_container, CHANGE, request));
        Box::pin(async { Ok(answer.await?.container_id) })
    }

    fn start_container<'a>(&'a self, id: &'a str) -> Answer<'a, ()> {
        let request = cri::StartContainerRequest { container_id: id.to_owned() };
        let answer = ask!(self.runtime, start_container, CHANGE, request);
        Box::pin(async { answer.await.map(|_| ()) })
    }

    fn stop_container<'a>(&'a self, id: &'a str, grace: Duration) -> Answer<'a, ()> {
        let request =
            cri::StopContainerRequest { container_id: id.to_owned(), timeout: whole_seconds(grace) };
        let answer = ask!(self.runtime, stop_container, grace.saturating_add(CHANGE), request);
        Box::pin(async { gone_is_done(answer.await) })
    }

    fn remove_container<'a>(&'a self, id: &'a str) -> Answer<'a, ()> {
        let request = cri::RemoveContainerRequest { container_id: id.to_owned() };
        let answer = ask!(self.runtime, remove_container, CHANGE, request);
        Box::pin(async { gone_is_done(answer.await) })
    }

    fn container_status<'a>(&'a self, id: &'a str) -> Answer<'a, cri::ContainerStatus> {
        let request = cri::ContainerStatusRequest { container_id: id.to_owned(), verbose: false };
        let answer = ask!(self.runtime, container_status, QUERY, request);
        Box::pin(async move { present(answer.await?.status, id) })
    }

    fn containers(&self) -> Answer<'_, Vec<cri::Container>> {
        let request = cri::ListContainersRequest { filter: None };
        let answer = ask!(self.runtime, list_containers, QUERY, request);
        Box::pin(async { Ok(answer.await?.containers) })
    }

    fn reopen_log<'a>(&'a self, id: &'a str) -> Answer<'a, ()> {
        let request = cri::ReopenContainerLogRequest { container_id: id.to_owned() };
        let answer = ask!(self.runtime, reopen_container_log, QUERY, request);
        Box::pin(async { answer.await.map(|_| ()) })
    }

    fn exec_sync<'a>(
        &'a self,
        id: &'a str,
        command: Vec<String>,
        limit: Duration,
    ) -> Answer<'a, cri::ExecSyncResponse> {
        let request = cri::ExecSyncRequest {
            container_id: id.to_owned(),
            cmd: command,
            timeout: whole_seconds(limit).max(1),
        };
        let limit = limit.max(Duration::from_secs(1)).saturating_add(MARGIN);
        Box::pin(ask!(self.runtime, exec_sync, limit, request))
    }

    fn exec(&self, request: cri::ExecRequest) -> Answer<'_, String> {
        let answer = ask!(self.runtime, exec, QUERY, request);
        Box::pin(async { Ok(answer.await?.url) })
    }

    fn attach(&self, request: cri::AttachRequest) -> Answer<'_, String> {
        let answer = ask!(self.runtime, attach, QUERY, request);
        Box::pin(async { Ok(answer.await?.url) })
    }

    fn port_forward(&self, request: cri::PortForwardRequest) -> Answer<'_, String> {
        let answer = ask!(self.runtime, port_forward, QUERY, request);
        Box::pin(async { Ok(answer.await?.url) })
    }

    fn container_stats(&self) -> Answer<'_, Vec<cri::ContainerStats>> {
        let request = cri::ListContainerStatsRequest { filter: None };
        let answer = ask!(self.runtime, list_container_stats, QUERY, request);
        Box::pin(async { Ok(answer.await?.stats) })
    }

    fn hints(&self) -> Answer<'_, mpsc::Receiver<Hint>> {
        Box::pin(hints::subscribe(self))
    }

    fn images(&self) -> Answer<'_, Vec<cri::Image>> {
        let answer = ask!(self.images, list_images, QUERY, cri::ListImagesRequest { filter: None });
        Box::pin(async { Ok(answer.await?.images) })
    }

    fn image<'a>(&'a self, name: &'a str) -> Answer<'a, Option<cri::Image>> {
        let request = cri::ImageStatusRequest { image: Some(image_spec(name)), verbose: false };
        let answer = ask!(self.images, image_status, QUERY, request);
        Box::pin(async {
            match answer.await {
                Ok(answer) => Ok(answer.image),
                Err(RuntimeError::NotFound(_)) => Ok(None),
                Err(e) => Err(e),
            }
        })
    }

    fn pull_image<'a>(&'a self, name: &'a str, auth: Option<cri::AuthConfig>) -> Answer<'a, String> {
        let request = cri::PullImageRequest { image: Some(image_spec(name)), auth, sandbox_config: None };
        let answer = ask!(self.images, pull_image, PULL, request);
        Box::pin(async { Ok(answer.await?.image_ref) })
    }

    fn remove_image<'a>(&'a self, name: &'a str) -> Answer<'a, ()> {
        let request = cri::RemoveImageRequest { image: Some(image_spec(name)) };
        let answer = ask!(self.images, remove_image, CHANGE, request);
        Box::pin(async { gone_is_done(answer.await) })
    }

    fn image_disks(&self) -> Answer<'_, Vec<cri::FilesystemUsage>> {
        let answer = ask!(self.images, image_fs_info, QUERY, cri::ImageFsInfoRequest {});
        Box::pin(async { Ok(answer.await?.image_filesystems) })
    }
}

fn image_spec(name: &str) -> cri::ImageSpec {
    cri::ImageSpec { image: name.to_owned(), ..cri::ImageSpec::default() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_says_whether_it_may_have_happened() {
        let of = |status: Status| error(&status);
        assert!(matches!(of(Status::not_found("no such sandbox")), RuntimeError::NotFound(_)));
        assert!(matches!(of(Status::deadline_exceeded("")), RuntimeError::Unavailable(_)));
        assert!(matches!(of(Status::unavailable("starting")), RuntimeError::Unavailable(_)));
        assert!(matches!(of(Status::unknown("runc: no such file")), RuntimeError::Refused(_)));
        assert!(matches!(of(Status::internal("oci")), RuntimeError::Refused(_)));
        let starting = of(Status::unknown("server is not initialized yet"));
        assert!(matches!(starting, RuntimeError::Unavailable(_)), "{starting:?}");
        let broken = std::io::Error::from(std::io::ErrorKind::BrokenPipe);
        let of_transport = Status::from_error(Box::new(broken));
        assert_eq!(of_transport.code(), Code::Unknown);
        assert!(matches!(of(of_transport), RuntimeError::Unavailable(_)));
    }

    #[test]
    fn times_are_never_rounded_down_to_none() {
        assert_eq!(whole_seconds(Duration::ZERO), 0);
        assert_eq!(whole_seconds(Duration::from_millis(1)), 1);
        assert_eq!(whole_seconds(Duration::from_secs(30)), 30);
        assert_eq!(whole_seconds(Duration::MAX), i64::MAX);
    }

    #[tokio::test]
    async fn a_socket_that_is_not_there_is_unavailable() {
        let folder = tempfile::tempdir().expect("a folder");
        let socket = Socket::new(&folder.path().join("none.sock")).expect("a path");
        for _ in 0..2 {
            let answer = socket.version().await;
            assert!(matches!(answer, Err(RuntimeError::Unavailable(_))), "{answer:?}");
        }
        assert!(socket.hints().await.is_err());
        assert!(Socket::new(Path::new("run/containerd.sock")).is_err());
    }
}
