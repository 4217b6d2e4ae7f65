"""The default download: one model to one node, complete or absent."""
