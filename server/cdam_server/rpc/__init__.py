"""The gRPC face: decode, one call, encode."""
