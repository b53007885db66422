"""Make ``descriptor.py`` of ``open_inference.proto``: ``python -m narrowboat.serve.oip.generate``, with grpcio-tools.

Not the usual ``_pb2`` module: that one registers its messages for the whole process, where ``tritonclient`` has
registered messages of the same names, and works with some versions of protobuf only. A descriptor does neither.
"""

from __future__ import annotations

import base64
import tempfile
import textwrap
from pathlib import Path

HERE = Path(__file__).parent
PROTO = "open_inference.proto"
TARGET = HERE / "descriptor.py"
_TEXT = '''"""Made of ``open_inference.proto`` by ``narrowboat.serve.oip.generate``; do not edit."""

FILE = """
{lines}
"""  # a FileDescriptorProto in base64
'''


def made() -> str:
    """The text of ``descriptor.py`` as the proto file is now."""
    from google.protobuf.descriptor_pb2 import FileDescriptorSet
    from grpc_tools import protoc

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "set"
        if protoc.main(["protoc", f"-I{HERE}", f"--descriptor_set_out={out}", PROTO]):
            raise SystemExit(f"protoc does not take {PROTO}")
        (file,) = FileDescriptorSet.FromString(out.read_bytes()).file
    text = base64.b64encode(file.SerializeToString(deterministic=True)).decode()
    return _TEXT.format(lines="\n".join(textwrap.wrap(text, 110)))


if __name__ == "__main__":
    TARGET.write_text(made())
