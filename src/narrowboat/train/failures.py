"""A model or a loss that fails by itself: its own error in one line, and what to do where that is known."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from narrowboat.errors import NarrowboatError, TrainingError
from narrowboat.machine.data_limit import is_out_of_memory

# What torch says where a pass sends something backwards before its own end.
_DIFFERENTIATES = (
    "saved tensor hooks",  # torch.func refuses the hooks that see what autograd saves
    "unpack_hook",  # a backward in the middle of a pass that keeps nothing
)
_ADVICE = {
    "Expected more than 1 value per channel": "BatchNorm in train mode needs more than one value per channel: give a "
    "larger batch (the last one of an epoch too), or batch_norm='frozen' (eval mode)",
}


def failure_of(error: Exception, tried: str = "") -> TrainingError:
    """The named error for one that model or loss raised; the caller sets it as the cause.

    Args:
        error: what was raised.
        tried: on what, where it was not the whole batch.
    """
    lines = str(error).strip().splitlines()
    own = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    if any(saying in str(error) for saying in _DIFFERENTIATES):
        return TrainingError(
            f"a training pass of this model cannot be measured ({own}): losses that differentiate inside (gradient "
            "penalties, torch.func) cannot be planned; run such a step in plain PyTorch"
        )
    advice = next((f"; {advice}" for saying, advice in _ADVICE.items() if saying in str(error)), "")
    return TrainingError(f"the model (or loss) fails on this batch{tried and f' ({tried})'}: {own}{advice}")


@contextmanager
def failures_named(tried: str = "") -> Iterator[None]:
    """Give what model or loss raise inside its name. Errors with a name, and those for want of memory, go through.

    Raises:
        TrainingError: see :func:`failure_of`.
    """
    try:
        yield
    except NarrowboatError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise failure_of(error, tried) from error
