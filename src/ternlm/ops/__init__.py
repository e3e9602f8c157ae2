"""Pure tensor functions. A plain reference stands beside every fast path."""
