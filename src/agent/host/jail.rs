//! OUTLINE: property lists of both jails
/// Part of every build key: another jail is another build.
pub const JAIL_VERSION: u32 = 1;
/// Where the tree is inside every jail.
pub const APP_PATH: &str = "/var/lib/kari/app";
/// Where a service's state is inside its jail.
pub const STATE_PATH: &str = "/var/lib/kari/state";
/// Where a step finds the mirror it may read (build) or write (fetch).
pub const MIRROR_PATH: &str = "/var/lib/kari/mirror";
