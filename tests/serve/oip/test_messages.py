"""The messages are the public protocol's, and live beside a stock client's."""

from __future__ import annotations

import subprocess
import sys

import pytest
from tritonclient.grpc import model_config_pb2, service_pb2

from narrowboat.serve.oip import generate
from narrowboat.serve.oip.messages import SERVICE

MESSAGES = sorted(SERVICE.file.message_types_by_name)


def theirs(name: str):
    for file in (service_pb2.DESCRIPTOR, model_config_pb2.DESCRIPTOR):
        if name in file.message_types_by_name:
            return file.message_types_by_name[name]
    raise AssertionError(f"{name} is not of the protocol")


def same(ours, other) -> None:
    for field in ours.fields:
        known = other.fields_by_name[field.name]
        assert (field.number, field.type, field.is_repeated) == (known.number, known.type, known.is_repeated), field
    for inner in ours.nested_types:
        same(inner, other.nested_types_by_name[inner.name])


@pytest.mark.parametrize("name", MESSAGES)
def test_names_numbers_and_types_are_tritons(name: str) -> None:
    same(SERVICE.file.message_types_by_name[name], theirs(name))


def test_the_service_is_tritons() -> None:
    known = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]
    for method in SERVICE.methods:
        other = known.methods_by_name[method.name]
        assert method.input_type.name == other.input_type.name
        assert method.output_type.name == other.output_type.name
        assert (method.client_streaming, method.server_streaming) == (other.client_streaming, other.server_streaming)


def test_datatypes_are_tritons() -> None:
    ours = SERVICE.file.enum_types_by_name["DataType"].values_by_name
    known = model_config_pb2.DESCRIPTOR.enum_types_by_name["DataType"].values_by_name
    assert {name: value.number for name, value in ours.items()} == {
        name: value.number for name, value in known.items()
    }


def test_the_descriptor_is_of_the_proto_file() -> None:
    assert generate.TARGET.read_text() == generate.made()


@pytest.mark.parametrize(
    "order", [("narrowboat.serve.oip.grpc", "tritonclient.grpc"), ("tritonclient.grpc", "narrowboat.serve.oip.grpc")]
)
def test_both_can_be_imported_in_either_order_and_no_torch_comes_along(order: tuple[str, str]) -> None:
    code = f"import {order[0]}, {order[1]}, narrowboat.serve.oip.routes, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
