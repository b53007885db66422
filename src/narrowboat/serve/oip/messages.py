"""Message classes of the protocol, in a pool of their own: in the common one ``tritonclient`` has the same names."""

from __future__ import annotations

import base64
from typing import Any

from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass

from narrowboat.serve.oip.descriptor import FILE

_POOL = DescriptorPool()
_POOL.Add(FileDescriptorProto.FromString(base64.b64decode(FILE)))
SERVICE = _POOL.FindServiceByName("inference.GRPCInferenceService")


def message(name: str) -> Any:
    """The class of a message, by its name without the package."""
    return GetMessageClass(_POOL.FindMessageTypeByName(f"inference.{name}"))


ModelInferRequest = message("ModelInferRequest")
ModelInferResponse = message("ModelInferResponse")
