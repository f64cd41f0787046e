"""Own the node daemon: one process a node that keeps models in host memory for all others."""
