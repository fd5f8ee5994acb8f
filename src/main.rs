//! The `kari` program: arguments, telemetry and signals; nothing else.
fn main() {}
