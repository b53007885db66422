"""What crosses between ingress and node comes out as it went in."""

from __future__ import annotations

import pickle

import pytest

from narrowboat import errors
from narrowboat.cluster.link import Failure, pack_inputs, pack_reply, unpack_inputs, unpack_reply
from narrowboat.errors import BeyondContractError, BudgetError, ClusterError, NarrowboatError
from narrowboat.serve.interface import Reply
from narrowboat.tasks.tensors import RawTensor, TensorSpec


@pytest.mark.parametrize(
    "error",
    [
        BeyondContractError("too many", retry_after=0.25, details={"why": "burst"}),
        errors.NotServingError("no"),
        errors.WeightsNotFoundError("weights file not found: x"),
        errors.NodeVersionError("other"),
    ],
)
def test_errors_keep_class_message_and_what_clients_are_told(error: NarrowboatError) -> None:
    back = pickle.loads(pickle.dumps(Failure.of(error))).error()
    assert type(back) is type(error) and str(back) == str(error)
    for name in ("retry_after", "details"):
        assert getattr(back, name, None) == getattr(error, name, None)


def test_an_error_that_needs_more_than_a_message_keeps_what_it_told() -> None:
    back = Failure.of(BudgetError("too small", minimum=5, limiter="head")).error()
    assert isinstance(back, BudgetError) and (str(back), back.minimum, back.limiter) == ("too small", 5, "head")


def test_an_unknown_name_is_never_looked_up_beyond_our_errors() -> None:
    assert isinstance(Failure("annotations", "x").error(), ClusterError)
    assert isinstance(Failure("SystemExit", "x").error(), ClusterError)


def test_tensors_and_replies_cross_whole() -> None:
    raw = RawTensor("FP32", (2, 1), memoryview(b"abcdefgh"))
    inputs = unpack_inputs(pickle.loads(pickle.dumps(pack_inputs({"x": raw}))))
    assert inputs["x"] == RawTensor("FP32", (2, 1), b"abcdefgh")
    reply = Reply(((TensorSpec("y", "FP32", (2, 1)), raw),), True, None, 5, 4, True)
    back = unpack_reply(pickle.loads(pickle.dumps(pack_reply(reply))))
    assert bytes(back.outputs[0][1].data) == b"abcdefgh" and back.outputs[0][0] == reply.outputs[0][0]
    assert (back.admitted, back.bound, back.deadline, back.response, back.met) == (True, None, 5, 4, True)
