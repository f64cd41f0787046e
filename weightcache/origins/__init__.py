"""Where a model's bytes are born: one protocol, its concrete origins, and wrappers that add behaviour."""
