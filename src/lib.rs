//! Kari deploys git repositories onto Linux nodes as native systemd services,
//! declared as Kubernetes custom resources.
//!
//! In reading order: `api` is the contract, `runtime` what both sides need
//! besides kube-rs, `seal` how a secret gets from one side to the other,
//! `controller` the cluster side, `agent` the node side.

pub mod agent;
pub mod api;
pub mod arguments;
pub mod certificate;
pub mod controller;
pub mod git_credential;
pub mod runtime;
pub mod seal;
#[cfg(test)]
mod simulation;
pub mod telemetry;
pub mod uninstall;
