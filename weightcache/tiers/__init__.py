"""Places on this node that hold chunks."""
