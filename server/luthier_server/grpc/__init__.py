"""The gRPC face: thin, and the only place that knows protos of services and status codes."""
