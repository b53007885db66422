"""What a model costs: skeleton, parameter-use trace, blocks, timings, activation peaks."""

from narrowboat.profile.order import execution_order
from narrowboat.profile.skeleton import build_skeleton, no_storage
from narrowboat.profile.use_trace import TraceError, UseTrace, trace_uses

__all__ = ["TraceError", "UseTrace", "build_skeleton", "execution_order", "no_storage", "trace_uses"]
