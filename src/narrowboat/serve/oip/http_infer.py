"""One inference over HTTP: JSON text, with the bytes of binary tensors after it (Triton's binary tensor extension)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import orjson

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
    sooner,
    timeout_of,
)
from narrowboat.serve.oip.codec import check_spec, from_bytes, from_values, to_json
from narrowboat.tasks.tensors import Buffer, RawTensor, TensorSpec

LENGTH_HEADER = "inference-header-content-length"
SLO_HEADER = "x-slo-ttft-ms"


def read_json(body: Buffer) -> Any:
    """Any JSON; ``NaN`` and ``Infinity`` too, which Python's and Triton's clients write.

    Raises:
        BadRequestError: it is none.
    """
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as wrong:
        text = bytes(body)
        if b"NaN" not in text and b"Infinity" not in text:
            raise BadRequestError(f"the request is no JSON: {wrong}") from None
    try:
        return json.loads(text, parse_float=_finite)
    except (ValueError, RecursionError) as wrong:
        raise BadRequestError(f"the request is no JSON: {wrong}") from None


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair, which Python's json lets through
        return False
    return True


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"number {text[:40]} is beyond all floats")
    return number


def read_ask(face: TaskFace, body: bytes, headers: Mapping[str, str]) -> Ask:
    """What a request asks for. Binary inputs are views of its body.

    Args:
        face: of the task.
        body: as it came, decompressed.
        headers: of the request; of these, the length of the JSON text and ``x-slo-ttft-ms`` matter.

    Raises:
        BadRequestError: it cannot be understood, or is not what the task takes.
    """
    specs = asked_of(face)
    slo = _slo(headers.get(SLO_HEADER))
    told_length = headers.get(LENGTH_HEADER)
    if told_length is None:
        told, rest = read_json(body), memoryview(b"")
    else:
        length = _header_length(told_length, len(body))
        view = memoryview(body)
        if not length:
            return _bare(face, view, slo)
        told, rest = read_json(view[:length]), view[length:]
    if type(told) is not dict:
        raise BadRequestError("the request has to be a JSON object")
    parameters = _object(told, "parameters", "the request")
    refuse_unsupported(parameters, "the request")
    name = told.get("id", "")
    if type(name) is not str or not (name.isascii() or _is_unicode(name)):
        raise BadRequestError("id has to be a text")
    return Ask(
        inputs=_inputs(face, specs, told.get("inputs"), rest),
        wanted=_wanted(face, told.get("outputs"), _flag(parameters, "binary_data_output", "the request")),
        id=name,
        timeout=sooner(timeout_of(parameters), slo),
        priority=priority_of(parameters),
    )


def write_answer(face: TaskFace, ask: Ask, reply: Reply) -> tuple[bytes, int | None]:
    """The body of an answer, put together once.

    Returns:
        It, and the length of its JSON text where bytes follow.
    """
    head: dict[str, Any] = {"model_name": face.name, "model_version": VERSION}
    if ask.id:
        head["id"] = ask.id
    head["parameters"] = reply.parameters()
    outputs, binaries = [], []
    for want in ask.wanted:
        spec, tensor = reply.outputs[want.place]
        told: dict[str, Any] = {"name": spec.name, "datatype": tensor.datatype, "shape": tensor.shape}
        if want.binary:
            binaries.append(tensor.data)
            told["parameters"] = {"binary_data_size": memoryview(tensor.data).nbytes}
        else:
            told["data"] = orjson.Fragment(to_json(tensor))
        outputs.append(told)
    head["outputs"] = outputs
    text = orjson.dumps(head)
    return (b"".join((text, *binaries)), len(text)) if binaries else (text, None)


def _inputs(face: TaskFace, specs: Mapping[str, TensorSpec], told: Any, rest: memoryview) -> dict[str, RawTensor]:
    if type(told) is not list:
        raise BadRequestError("inputs has to be a list of tensors")
    inputs: dict[str, RawTensor] = {}
    offset = 0
    for index, tensor in enumerate(told):
        if type(tensor) is not dict:
            raise BadRequestError(f"inputs[{index}] has to be an object")
        name = tensor.get("name")
        spec = specs.get(name) if isinstance(name, str) else None
        if spec is None or not isinstance(name, str):
            raise BadRequestError(
                f"inputs[{index}]: task {face.name!r} has no input {str(name)[:80]!r}; it takes {', '.join(specs)}"
            )
        where = f"input {name!r}"
        if name in inputs:
            raise BadRequestError(f"{where} is given twice")
        check_spec(tensor.get("datatype"), tensor.get("shape"), spec, where)
        parameters = _object(tensor, "parameters", where) if "parameters" in tensor else {}
        refuse_unsupported(parameters, where)
        size = parameters.get("binary_data_size")
        if size is None:
            if "data" not in tensor:
                raise BadRequestError(f"{where}: there is neither data nor binary_data_size")
            inputs[name] = from_values(tensor["data"], spec, where)
            continue
        if "data" in tensor:
            raise BadRequestError(f"{where}: data and binary_data_size exclude each other")
        if type(size) is not int or size < 0:
            raise BadRequestError(f"{where}: binary_data_size has to be a number of bytes, not {str(size)[:80]!r}")
        if size > len(rest) - offset:
            raise BadRequestError(f"{where}: binary_data_size is {size}, but {len(rest) - offset} bytes are left")
        inputs[name] = from_bytes(rest[offset : offset + size], spec, where)
        offset += size
    if offset != len(rest):
        raise BadRequestError(f"{len(rest) - offset} bytes after the JSON text belong to no input")
    check_names(face, inputs)
    return inputs


def _wanted(face: TaskFace, told: Any, binary: bool) -> tuple[Wanted, ...]:
    if told is None or told == []:
        return _all(face, binary)
    if type(told) is not list:
        raise BadRequestError("outputs has to be a list")
    wanted: list[Wanted] = []
    for index, each in enumerate(told):
        if type(each) is not dict:
            raise BadRequestError(f"outputs[{index}] has to be an object")
        where = f"outputs[{index}]"
        parameters = _object(each, "parameters", where)
        refuse_unsupported(parameters, where)
        place = find_output(face, each.get("name"), wanted)
        wanted.append(Wanted(place, _flag(parameters, "binary_data", where, binary)))
    return tuple(wanted)


def _all(face: TaskFace, binary: bool) -> tuple[Wanted, ...]:
    return tuple(Wanted(place, binary) for place in range(len(face.outputs)))


def _bare(face: TaskFace, body: memoryview, slo: int | None) -> Ask:
    # Triton's "raw binary request": no JSON at all, the bytes of the only input.
    if len(face.inputs) != 1:
        raise BadRequestError(
            f"a request without JSON text is for one input; task {face.name!r} has {len(face.inputs)}"
        )
    (spec,) = face.inputs
    return Ask({spec.name: from_bytes(body, spec, f"input {spec.name!r}")}, _all(face, True), "", slo, 0)


def _header_length(told: str, nbytes: int) -> int:
    if not (told.isascii() and told.isdigit() and len(told) <= 18):
        raise BadRequestError(f"Inference-Header-Content-Length has to be a number of bytes, not {told[:80]!r}")
    if int(told) > nbytes:
        raise BadRequestError(f"Inference-Header-Content-Length is {int(told)}, but the body has {nbytes} bytes")
    return int(told)


def _slo(told: str | None) -> int | None:
    if told is None:
        return None
    try:
        milliseconds = float(told)
    except ValueError:
        milliseconds = math.nan
    if not 0 < milliseconds < 1e12:
        raise BadRequestError(f"{SLO_HEADER} has to be milliseconds above 0, not {told[:80]!r}")
    return max(1, int(milliseconds * 1000))


def _object(told: Mapping[str, Any], name: str, where: str) -> dict[str, Any]:
    found = told.get(name)
    if found is None:
        return {}
    if type(found) is not dict:
        raise BadRequestError(f"{where}: {name} has to be an object")
    return found


def _flag(parameters: Mapping[str, Any], name: str, where: str, default: bool = False) -> bool:
    value = parameters.get(name, default)
    if type(value) is not bool:
        raise BadRequestError(f"{where}: {name} has to be true or false, not {str(value)[:80]!r}")
    return value
