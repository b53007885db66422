"""One inference over gRPC: messages to and from what the gateway takes and gives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from narrowboat.errors import BadRequestError
from narrowboat.serve.interface import Reply, TaskFace
from narrowboat.serve.oip.ask import (
    VERSION,
    Ask,
    Wanted,
    asked_of,
    check_names,
    find_output,
    priority_of,
    refuse_unsupported,
    timeout_of,
)
from narrowboat.serve.oip.codec import check_spec, from_bytes, from_values
from narrowboat.serve.oip.messages import ModelInferResponse
from narrowboat.tasks.tensors import RawTensor, TensorSpec

FINAL_ASKED, FINAL = "triton_enable_empty_final_response", "triton_final_response"
_CONTENTS = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
}


def values(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of a message as plain values."""
    found = {}
    for name, parameter in parameters.items():
        choice = parameter.WhichOneof("parameter_choice")
        found[name] = getattr(parameter, choice) if choice else None
    return found


def read_ask(face: TaskFace, request: Any) -> Ask:
    """What a ``ModelInferRequest`` asks for.

    Raises:
        BadRequestError: it is not what the task takes.
    """
    specs = asked_of(face)
    parameters = values(request.parameters) if request.parameters else {}
    refuse_unsupported(parameters, "the request")
    wanted: list[Wanted] = []
    for output in request.outputs:
        if output.parameters:
            refuse_unsupported(values(output.parameters), f"output {output.name!r}")
        wanted.append(Wanted(find_output(face, output.name, wanted), True))
    return Ask(
        inputs=_inputs(face, specs, request),
        wanted=tuple(wanted) or tuple(Wanted(place, True) for place in range(len(face.outputs))),
        id=request.id,
        timeout=timeout_of(parameters),
        priority=priority_of(parameters),
    )


def write_answer(face: TaskFace, ask: Ask, reply: Reply) -> Any:
    """A ``ModelInferResponse``, its outputs as raw bytes."""
    answer = ModelInferResponse(model_name=face.name, model_version=VERSION, id=ask.id)
    for name, value in reply.parameters().items():
        parameter = answer.parameters[name]
        if isinstance(value, bool):
            parameter.bool_param = value
        else:
            parameter.int64_param = value
    for want in ask.wanted:
        spec, tensor = reply.outputs[want.place]
        answer.outputs.add(name=spec.name, datatype=tensor.datatype, shape=tensor.shape)
        answer.raw_output_contents.append(bytes(tensor.data))
    return answer


def _inputs(face: TaskFace, specs: Mapping[str, TensorSpec], request: Any) -> dict[str, RawTensor]:
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise BadRequestError(f"raw_input_contents has {len(raw)} entries, but there are {len(request.inputs)} inputs")
    inputs: dict[str, RawTensor] = {}
    for index, tensor in enumerate(request.inputs):
        name = tensor.name
        spec = specs.get(name)
        if spec is None:
            raise BadRequestError(
                f"inputs[{index}]: task {face.name!r} has no input {name[:80]!r}; it takes {', '.join(specs)}"
            )
        where = f"input {name!r}"
        if name in inputs:
            raise BadRequestError(f"{where} is given twice")
        check_spec(tensor.datatype, tuple(tensor.shape), spec, where)
        if tensor.parameters:
            refuse_unsupported(values(tensor.parameters), where)
        if raw:
            if tensor.HasField("contents"):
                raise BadRequestError(f"{where}: contents and raw_input_contents exclude each other")
            inputs[name] = from_bytes(raw[index], spec, where)
        else:
            inputs[name] = _typed(tensor.contents, spec, where)
    check_names(face, inputs)
    return inputs


def _typed(contents: Any, spec: TensorSpec, where: str) -> RawTensor:
    field = _CONTENTS.get(spec.datatype)
    if field is None:
        raise BadRequestError(f"{where}: {spec.datatype} travels in raw_input_contents only")
    given = [each.name for each, _ in contents.ListFields()]
    if given and given != [field]:
        raise BadRequestError(f"{where}: {spec.datatype} travels in {field}, not in {', '.join(given)}")
    return from_values(list(getattr(contents, field)), spec, where)
