//! Compiles the runtimes' interfaces with protox, so that no protoc has to be installed.

fn main() {
    println!("cargo:rerun-if-changed=proto");
    let files =
        protox::compile(["proto/cri.proto", "proto/containerd.proto", "proto/health.proto"], ["proto"])
            .expect("the interfaces compile");
    tonic_prost_build::configure()
        .build_server(false)
        .compile_fds(files)
        .expect("tonic generates code for the interfaces");
}
