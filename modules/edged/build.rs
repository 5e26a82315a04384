//! Compiles the runtime's interface with protox, so that no protoc has to be installed.

fn main() {
    println!("cargo:rerun-if-changed=proto");
    let files = protox::compile(["proto/cri.proto"], ["proto"]).expect("cri.proto compiles");
    tonic_prost_build::configure()
        .build_server(false)
        .compile_fds(files)
        .expect("tonic generates code for the interface");
}
