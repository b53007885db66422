"""The random streams that a step may draw from."""

from __future__ import annotations

import random

import numpy as np
import torch


class RandomState:
    """The states of torch's, numpy's and Python's generators when it was made."""

    def __init__(self) -> None:
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        self._python = random.getstate()
        self._numpy = np.random.get_state()

    def restore(self) -> None:
        """Set the generators back."""
        torch.set_rng_state(self._cpu)
        if self._cuda:
            torch.cuda.set_rng_state_all(self._cuda)
        self.restore_python()

    def restore_python(self) -> None:
        """Set back Python's and numpy's, which draw for real beside fake tensors too."""
        random.setstate(self._python)
        np.random.set_state(self._numpy)
