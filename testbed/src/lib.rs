//! A real control plane, real nodes and real git servers on one machine.
