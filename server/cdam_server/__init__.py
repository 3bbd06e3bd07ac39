"""The service: gRPC in front of the engine."""
