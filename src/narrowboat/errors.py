"""Every error a user can meet, with what to do about it.

All of them derive from :class:`NarrowboatError`, so one ``except`` catches them. Each message says
what went wrong, where, and what to do. The command line turns ``UsageError`` into exit code 2 and the
rest into exit code 1.
"""

from __future__ import annotations

from typing import Any, TypeVar

_Error = TypeVar("_Error", bound=Exception)


class NarrowboatError(Exception):
    """Base class of every error raised by narrowboat."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Exception's own calls the class with its message alone; some need more.
        return rebuilt, (type(self), self.args, vars(self))


def rebuilt(kind: type[_Error], arguments: tuple[Any, ...], attributes: dict[str, Any]) -> _Error:
    """An error again, in another process.

    Args:
        kind: its class.
        arguments: its message.
        attributes: what it told beside.
    """
    error = kind.__new__(kind, *arguments)
    error.args = arguments
    vars(error).update(attributes)
    return error


class UsageError(NarrowboatError, ValueError):
    """A value the caller passed cannot be used as given (exit code 2)."""


class QuantityError(UsageError):
    """A byte size or a duration that cannot be read, e.g. ``"12 apples"``."""


class BudgetError(NarrowboatError):
    """The budget cannot hold the model.

    Attributes:
        minimum: the smallest budget that can, in bytes.
        limiter: the part of the model that sets the minimum, in words.
    """

    def __init__(self, message: str, *, minimum: int, limiter: str = "") -> None:
        super().__init__(message)
        self.minimum = minimum
        self.limiter = limiter


class ReservationError(NarrowboatError):
    """A call needs a larger key-value cache than the budget reserves; it was refused before it ran."""


class ProfileError(NarrowboatError):
    """A profile file cannot be read, or was measured of something else."""


class WeightsError(NarrowboatError):
    """Something about the weights at rest is wrong; base of the four below."""


class WeightsNotFoundError(WeightsError):
    """There is no such weights file, or no permission to read it."""


class WeightsFormatError(WeightsError):
    """The file is not a weights file that can be read: truncated, malformed, unknown dtype."""


class WeightsMismatchError(WeightsError):
    """The tensors in the file are not the tensors the model has (missing, unexpected, other shape)."""


class WeightsChangedError(WeightsError):
    """The weights file was replaced, truncated or altered after it was opened."""


class DigestError(WeightsError):
    """A tensor's bytes are not the bytes that were packed."""


class StorageError(NarrowboatError):
    """The storage failed: I/O error, device gone, disk full."""


class DeviceError(NarrowboatError):
    """Something about an accelerator; base of those below. What is in host memory and on storage is intact."""


class NoDeviceError(DeviceError):
    """There is no such device: no GPU, no driver, torch built without it, or the bindings are not installed."""


class DriverTooOldError(DeviceError):
    """The device or its driver lacks what is needed (virtual memory management: CUDA 10.2 and later)."""


class DeviceMemoryError(DeviceError):
    """The device has no such memory free: the budget is above it, or another process took it in the meantime."""


class PinnedMemoryError(DeviceError):
    """The system refuses to pin that much host memory."""


class DeviceLostError(DeviceError):
    """The device stopped answering, or a kernel before failed; sessions on it have to be made anew."""


class DeviceOrderError(DeviceError):
    """Bytes would be used before they are ready, or overwritten while in use: a fault of narrowboat's ordering."""


class StreamedModelError(NarrowboatError):
    """An operation that a streamed model cannot do, with what to do instead."""


class TiledWeightError(StreamedModelError):
    """An operator asked for the whole of a weight that is larger than the budget and computed in tiles."""


class GradientError(StreamedModelError):
    """A streamed model was asked for gradients."""


class ForeignHooksError(StreamedModelError):
    """The model already carries the hooks of another offloader."""


class SessionClosedError(StreamedModelError):
    """The session that held the weights is closed."""


class MapError(NarrowboatError):
    """An input of ``Session.map`` failed; ``__cause__`` is what its pass raised.

    Attributes:
        index: the input's place in the order of inputs, from 0.
        indices: all inputs of its group that failed, this one first.
    """

    def __init__(self, message: str, *, index: int, indices: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.index = index
        self.indices = indices or (index,)


class RowError(MapError):
    """A row of a data set cannot be mapped; the message names it, its column, and the node where it was tried.

    Attributes:
        index: the row's place in the batch that its worker was given, from 0.
    """


class ModelError(NarrowboatError):
    """The model cannot be built or traced: bad factory, wrong example inputs."""


class TaskSpecError(UsageError):
    """A description of tasks cannot be used: which line, which field, and what is allowed there."""


class TraceFormatError(NarrowboatError):
    """A file is no trace of a run of tasks, or not a whole one."""


class AdmissionError(NarrowboatError):
    """The tasks do not fit the budget, or a deadline could be missed; nothing was changed.

    Attributes:
        verdict: the whole answer, with its reasons.
    """

    def __init__(self, message: str, verdict: object = None) -> None:
        super().__init__(message)
        self.verdict = verdict


class ExecutorError(NarrowboatError):
    """The process that runs the tasks ended by itself, or could not be started."""


class ServeError(NarrowboatError):
    """The gateway cannot be started, or cannot go on; base of those below that are no client's."""


class PortInUseError(ServeError):
    """Another program listens on the address."""


class CertificateError(ServeError):
    """A certificate or its key is missing, unreadable, expired, or not of one another."""


class TokenFileError(ServeError):
    """A file of bearer tokens is missing, can be read by others, or is not written as it should be."""


class InsecureAddressError(ServeError, UsageError):
    """An address that others can reach was asked for without tokens or without TLS."""


class RequestError(ServeError):
    """What one client asked was refused; base of those below.

    Attributes:
        status: of HTTP.
        grpc: name of the gRPC status code.
        retry_after: seconds after which to try again; None where that would not help.
        details: for machines, beside the message.
    """

    status = 400
    grpc = "INVALID_ARGUMENT"

    def __init__(
        self, message: str, *, retry_after: float | None = None, details: dict[str, object] | None = None
    ) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        self.details = details or {}


class BadRequestError(RequestError):
    """A request that cannot be understood: no JSON, wrong shape, wrong data type, missing tensors."""


class ProtocolVersionError(RequestError):
    """A client speaks another protocol, or an older one."""


class UnauthorizedError(RequestError):
    """No bearer token, or one that is not known."""

    status, grpc = 401, "UNAUTHENTICATED"


class ForbiddenError(RequestError):
    """The token lacks the right; or a path, host or origin that is not allowed."""

    status, grpc = 403, "PERMISSION_DENIED"


class NoSuchTaskError(RequestError):
    """There is no such task, version or path."""

    status, grpc = 404, "NOT_FOUND"


class RequestTimeoutError(RequestError):
    """The client sent its request too slowly."""

    status, grpc = 408, "DEADLINE_EXCEEDED"


class ConflictError(RequestError):
    """A change was refused; nothing was changed. ``details`` holds the reasons and what would help."""

    status, grpc = 409, "FAILED_PRECONDITION"


class TasksChangedError(ConflictError):
    """The file of tasks is not the one that was read when the gateway started."""


class TooLargeError(RequestError):
    """A body or a tensor above the limit."""

    status, grpc = 413, "RESOURCE_EXHAUSTED"


class BeyondContractError(RequestError):
    """More than the task's contract, or the client's rate or concurrency, allows; ``retry_after`` says when."""

    status, grpc = 429, "RESOURCE_EXHAUSTED"


class JobFailedError(RequestError):
    """The network failed on this input."""

    status, grpc = 500, "INTERNAL"


class NotServingError(RequestError):
    """Nothing is let in now: starting, restarting after a crash, draining, or the task is not admitted."""

    status, grpc = 503, "UNAVAILABLE"


class ExpiredError(RequestError):
    """The request's deadline passed before its work began, or at a boundary; it was dropped."""

    status, grpc = 504, "DEADLINE_EXCEEDED"


class ClusterError(NarrowboatError):
    """Several machines cannot do together what was asked for; base of those below."""


class NoClusterError(ClusterError):
    """Ray is not installed, no cluster is running, or none of its nodes offers memory to narrowboat."""


class PlacementError(ClusterError):
    """No node has room, or time, for a task that has to run.

    Attributes:
        refusals: by task, the reasons of every node.
    """

    def __init__(self, message: str, refusals: dict[str, dict[str, str]] | None = None) -> None:
        super().__init__(message)
        self.refusals = refusals or {}


class NodeVersionError(ClusterError):
    """A node runs another version of what decides about bits or costs."""


class NodeLostError(ClusterError):
    """A node died, or has not been heard of for too long, before it answered."""


class TrainingError(NarrowboatError):
    """A training step cannot be made, or could not be carried out; the model is as it was before the step."""


class LossError(TrainingError):
    """The loss cannot be used: not a scalar, not finite, or no mean over samples where the batch has to be split."""


class ReplayError(TrainingError):
    """An activation that was dropped could not be computed again as it was."""


class SpillError(StorageError):
    """The folder for activations, gradients or optimizer state cannot be used: full, gone, or not writable."""
