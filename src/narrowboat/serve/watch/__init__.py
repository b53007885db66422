"""What is seen of the gateway: metrics, traces, spans, and whether the promise stands."""
