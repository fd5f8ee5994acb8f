//! The tools that people apply manifests with: helm, kubectl, and what Argo CD would say.

use std::path::Path;
use std::process::{Command, Output};

use mlua::{Lua, LuaSerdeExt as _};
use serde_json::Value;

use super::Space;

impl Space {
    /// Runs `helm` or `kubectl` in the namespace, as the administrator.
    pub async fn run(&self, program: &str, arguments: &[&str]) -> Output {
        let mut command = Command::new(self.testbed.directory().join("bin").join(program));
        command
            .args(arguments)
            .args(["--namespace", &self.namespace])
            .env("KUBECONFIG", self.testbed.kubeconfig())
            .env("KUBECTL_APPLYSET", "true");
        tokio::task::spawn_blocking(move || command.output())
            .await
            .expect("a task")
            .unwrap_or_else(|e| panic!("{e}"))
    }
}

/// All that a program said.
pub fn said(output: &Output) -> String {
    [&output.stdout, &output.stderr]
        .map(|text| String::from_utf8_lossy(text))
        .concat()
}

/// Makes a folder a chart with one manifest.
pub fn write_chart(folder: &Path, manifest: &Value) {
    let meta = "apiVersion: v2\nname: shop\nversion: 0.1.0\n";
    let manifest = manifest.to_string();
    super::write(
        folder,
        &[("Chart.yaml", meta), ("templates/shop.yaml", &manifest)],
    );
}

/// The status that the health script of docs/gitops.md gives to an object, run as Argo CD runs it.
pub fn argo_health(object: &impl serde::Serialize) -> String {
    let page = include_str!("../../docs/gitops.md");
    let script = page
        .split_once("```lua\n")
        .and_then(|(_, rest)| rest.split_once("```"))
        .map(|(script, _)| script)
        .expect("a script");
    let object: Value = serde_json::to_value(object).expect("JSON");
    let lua = Lua::new();
    let value = lua.to_value(&object).expect("a Lua value");
    lua.globals().set("obj", value).expect("a global");
    let health = lua.load(script).eval::<mlua::Table>();
    let health = health.unwrap_or_else(|e| panic!("{e}"));
    let _: String = health.get("message").expect("a message");
    health.get("status").expect("a status")
}
