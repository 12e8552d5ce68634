"""Room: a WebSocket between its two ends, once both have agreed to it."""
