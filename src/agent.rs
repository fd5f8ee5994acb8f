//! The node side: everything that happens on one node.
//!
//! [`host`] is the thin, typed layer over systemd, the disk and the proxy of
//! the node. It knows nothing of Kubernetes.

pub mod host;
mod plan;
mod view;
