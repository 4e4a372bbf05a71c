//! Compiles the `.proto` files without `protoc`.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files = ["proto/vasto/v1/data.proto", "proto/vasto/v1/control.proto"];
    println!("cargo::rerun-if-changed=proto");
    let descriptors = protox::compile(files, ["proto"])?;
    tonic_prost_build::configure().bytes(".vasto.v1").compile_fds(descriptors)?;
    Ok(())
}
