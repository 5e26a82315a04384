//! Compiles the schema with protox, so that no protoc has to be installed.

fn main() {
    println!("cargo:rerun-if-changed=proto");
    let files = protox::compile(["proto/octobus.proto"], ["proto"]).expect("octobus.proto compiles");
    prost_build::Config::new().bytes(["."]).compile_fds(files).expect("prost generates code for the schema");
}
