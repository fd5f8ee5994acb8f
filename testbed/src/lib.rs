//! A real control plane, real nodes and real git servers on one machine.
//!
//! For Kari's demo, tests and benches, as a library and as the command
//! `testbed`: etcd, kube-apiserver and kube-controller-manager; nodes that are
//! real systemd in namespaces; git over smart http. Nothing in it is a mock.
//! There is no daemon: what is up is in the testbed's folder ([`state`]).
//!
//! It is deliberately no cluster unless asked for one: there is no kubelet, no
//! scheduler and no container, and Node and Pod objects are written by
//! [`cluster`], for their identities. With [`Options::kubelet`] nodes have a
//! kubelet, containerd and kube-proxy, and Kari is installed by its chart.
//!
//! In reading order: [`testbed`] and [`node_handle`] are what callers use,
//! [`lifecycle`] is how it comes up and goes down. [`state`], [`process`] and
//! [`wait`] are its ground; [`program`], [`prerequisites`] and [`toolchains`]
//! are what it finds on the machine; [`network`], [`pki`], [`plane`], [`node`],
//! [`git`], [`cluster`] and [`kari`] are its parts; [`kubelet`], [`images`] and
//! [`pods`] what nodes with a kubelet have beyond that.

pub mod cluster;
pub mod error;
pub mod git;
pub mod images;
pub mod kari;
pub mod kubelet;
pub mod lifecycle;
pub mod network;
pub mod node;
pub mod node_handle;
pub mod pki;
pub mod plane;
pub mod pods;
pub mod prerequisites;
pub mod process;
pub mod program;
pub mod state;
pub mod testbed;
pub mod toolchains;
pub mod wait;

pub use error::{Error, Result};
pub use git::Repository;
pub use node_handle::NodeHandle;
pub use rustix::process::Signal;
pub use state::{Network, NodeName, Part};
pub use testbed::{Options, Status, Testbed};
