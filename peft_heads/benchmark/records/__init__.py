"""Results as files: what was set, on which machine, and what came out."""
