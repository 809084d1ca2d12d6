"""The command `luthier`. Its commands load grpc, rich and yaml only when they run."""
