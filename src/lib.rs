//! Kari deploys git repositories onto Linux nodes as native systemd services,
//! declared as Kubernetes custom resources.
//!
//! In reading order: `api` is the contract.

pub mod api;
pub mod controller;
