"""One gRPC client, one request after another, every answer checked.

    python benchmarks/serving_kit/grpc_client.py < plan.json > figures.json

The plan: ``target``, ``task``, ``input``, ``count``, ``pairs`` of base64: elements of the input, of the right answer.
"""

from __future__ import annotations

import base64
import json
import sys
import time
from pathlib import Path

import grpc
from tritonclient.grpc import service_pb2

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from serving_kit.spread import spread


def main() -> None:
    """Read a plan, write its figures."""
    plan = json.loads(sys.stdin.read())
    pairs = []
    for given, answer in plan["pairs"]:
        data = base64.b64decode(given)
        request = service_pb2.ModelInferRequest(model_name=plan["task"], raw_input_contents=[data])
        request.inputs.add(name=plan["input"], datatype="FP32", shape=[1, len(data) // 4])
        pairs.append((request.SerializeToString(), base64.b64decode(answer)))
    latencies, beside, wrong, failed = [], [], 0, 0
    with grpc.insecure_channel(plan["target"]) as channel:
        call = channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer",
            request_serializer=None,
            response_deserializer=service_pb2.ModelInferResponse.FromString,
        )
        for number in range(plan["count"]):
            request, answer = pairs[number % len(pairs)]
            begin = time.perf_counter()
            try:
                reply = call(request, timeout=30)
            except grpc.RpcError:
                failed += 1
                continue
            took = (time.perf_counter() - begin) * 1e6
            wrong += list(reply.raw_output_contents) != [answer]
            latencies.append(took)
            beside.append(took - reply.parameters["response_us"].int64_param)
    told = {"wrong": wrong, "failed": failed, "latency_us": spread(latencies), "beside_response_us": spread(beside)}
    sys.stdout.write(json.dumps(told))


if __name__ == "__main__":
    main()
