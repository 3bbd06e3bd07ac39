"""What operators see: health, metrics, traces, logs, and who notices that nothing moves."""
