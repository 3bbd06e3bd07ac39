"""What a device's process runs: models, the work on them, and the scheduler that brings it together."""
