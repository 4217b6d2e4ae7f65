"""Everything that knows Ray or vLLM: config, the node-initialization path, other nodes."""
