//! The contract `kari.dev/v1alpha1`: the custom resources, their conditions and
//! reasons, and the names that everything else is told apart by.
//!
//! Invariants: no I/O and no client here; what a schema can say (patterns,
//! bounds, defaults, CEL) is said here, so that the API server refuses it at
//! `kubectl apply`; a field enters the schema when it works, not before.
//!
//! Deliberately absent: decisions. What follows from a spec is planned in
//! `controller` and `agent`.

pub mod conditions;
pub mod definitions;
pub mod deployment;
pub mod names;
pub mod quantity;
pub mod reasons;
pub mod release;

pub use definitions::{definitions, definitions_as_yaml};
pub use deployment::{Deployment, DeploymentSpec, DeploymentStatus};
pub use release::{Release, ReleaseSpec, ReleaseStatus};

/// The API group of every kind of Kari.
pub const GROUP: &str = "kari.dev";
/// The only version so far.
pub const VERSION: &str = "v1alpha1";
/// On every Release from its creation on; taken away by the controller when the
/// node has reported `Removed`, or when its Node object is gone.
pub const RELEASE_FINALIZER: &str = "kari.dev/agent";
/// Look at the source now; any value that differs from the last one handled.
pub const ANNOTATION_REQUESTED_AT: &str = "kari.dev/requestedAt";
/// Try blocked or failed revisions again, once for each value.
pub const ANNOTATION_RETRY: &str = "kari.dev/retry";
/// On the Lease of a node's agent: the public key that values for the node are sealed to, in base64.
pub const ANNOTATION_PUBLIC_KEY: &str = "kari.dev/public-key";
/// On the Lease of a node's agent: the id of that key, for people.
pub const ANNOTATION_KEY_ID: &str = "kari.dev/key-id";
/// On a Node: `true` puts it first in every rollout.
pub const LABEL_CANARY: &str = "kari.dev/canary";
/// On Releases and ControllerRevisions: the name of the Deployment they belong to.
pub const LABEL_DEPLOYMENT: &str = "kari.dev/deployment";
