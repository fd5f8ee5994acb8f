//! The `kari` program: arguments, telemetry and signals; nothing else.
fn main() {
    for (_, text) in kari::api::definitions_as_yaml().unwrap_or_default() {
        println!("---\n{text}");
    }
}
