//! The cluster side: observe → plan → apply → status, and the look-ups of sources beside it.

pub mod check;
pub mod observed;
pub mod placement;
pub mod plan;
pub mod revision;
pub mod rollout;
pub mod status;
#[cfg(test)]
mod testing;
