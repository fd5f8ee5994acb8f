//! The host: systemd units, files, users and jails of one node.
//!
//! Nothing here decides anything and nothing here talks to Kubernetes: each
//! module is one mechanism with typed input, typed errors and a bound on
//! everything.

// What is remembered, and where.
pub mod keys;
pub mod records;
pub mod seal;
pub mod store;
mod tree;
pub mod users;

// What systemd is told (pure), and telling it.
pub mod jail;
pub mod quote;
pub mod slices;
pub mod systemd;
pub mod unit;

// Who may do what when.
pub mod turns;

// Whether it does what it was told.
pub mod limits;
pub mod port;
pub mod probe;
pub mod programs;

// Where the code comes from, and how requests come in.
pub mod mirror;
pub mod proxy;
