"""The tiny network behind LitServe.

python benchmarks/serving_kit/litserve_child.py tiny.safetensors PORT
"""

from __future__ import annotations

import sys
from typing import Any

import litserve
import torch
from safetensors.torch import load_file
from serve_nets import tiny


class Tiny(litserve.LitAPI):
    """JSON in, JSON out."""

    def setup(self, device: str) -> None:
        """In the worker's process."""
        torch.set_num_threads(1)
        state = load_file(sys.argv[1])
        self.module = tiny()
        self.module.load_state_dict({name: tensor for name, tensor in state.items() if "narrowboat" not in name})
        self.module.eval()

    def decode_request(self, request, **_: Any) -> torch.Tensor:  # type: ignore[no-untyped-def]
        """A row. LitServe takes an annotation for what FastAPI should look for: without one it is the body."""
        return torch.tensor([request["x"]])

    def predict(self, x: torch.Tensor, **_: Any) -> torch.Tensor:
        """One pass."""
        with torch.inference_mode():
            return self.module(x)

    def encode_response(self, output: torch.Tensor, **_: Any) -> dict[str, Any]:
        """Numbers."""
        return {"y": output[0].tolist()}


if __name__ == "__main__":
    server = litserve.LitServer(Tiny(), accelerator="cpu", workers_per_device=1, fast_queue=True)
    server.run(
        host="127.0.0.1", port=int(sys.argv[2]), num_api_servers=1, log_level="warning", generate_client_file=False
    )
