//! Kari deploys git repositories onto Linux nodes as native systemd services.
