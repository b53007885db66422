"""The Open Inference Protocol v2 (KServe, Triton) over HTTP and gRPC, with Triton's binary tensors and repository."""
