//! Kari deploys git repositories onto Linux nodes as native systemd services,
//! declared as Kubernetes custom resources.
//!
//! In reading order: `api` is the contract, `runtime` what both sides need
//! besides kube-rs, `controller` the cluster side, `agent` the node side.

pub mod agent;
pub mod api;
pub mod arguments;
pub mod certificate;
pub mod controller;
pub mod git_credential;
pub mod runtime;
#[cfg(test)]
mod simulation;
pub mod telemetry;
