"""Stands in for grpcurl where it is not installed: the same command line, carried out by `buf curl`.

Understands what the README uses: -plaintext, -d, list, describe and a method. LUTHIER_ENDPOINT takes the place of the
address, so that a page that names the default port can be tried on any.
"""

import os
import sys
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

BUF = [str(Path(sys.executable).parent / "buf"), "curl", "--protocol", "grpc", "--http2-prior-knowledge"]


def describe(address: str, symbol: str) -> str:
    """A service as the server's reflection tells it. Raises SystemExit when there is none of that name."""
    with grpc.insecure_channel(address) as channel:
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
        request = reflection_pb2.ServerReflectionRequest(file_containing_symbol=symbol)
        (answer,) = stub.ServerReflectionInfo(iter([request]))
    for content in answer.file_descriptor_response.file_descriptor_proto:
        file = FileDescriptorProto.FromString(content)
        for service in file.service:
            if f"{file.package}.{service.name}" == symbol:
                methods = [f"  rpc {each.name} ( {each.input_type} )" for each in service.method]
                return "\n".join([f"{symbol} is a service:", f"service {service.name} {{", *methods, "}"])
    raise SystemExit(f'Symbol not found: "{symbol}"')


def main(arguments: list[str]) -> None:
    """Carries one command line out; the exit code is that of `buf curl`."""
    data: list[str] = []
    if arguments[0] != "-plaintext":
        raise SystemExit("without -plaintext there would be TLS")
    words = arguments[1:]
    if words[0] == "-d":
        data = ["-d", "@-" if words[1] == "@" else words[1]]
        words = words[2:]
    written, what, *rest = words
    if written != "127.0.0.1:50051":
        raise SystemExit(f"the README speaks of 127.0.0.1:50051, not of {written}")
    address = os.environ["LUTHIER_ENDPOINT"]
    if what == "describe":
        sys.stdout.write(describe(address, rest[0]) + "\n")
    elif what == "list":
        os.execv(BUF[0], [*BUF, "--list-services", f"http://{address}"])
    else:
        os.execv(BUF[0], [*BUF, *data, f"http://{address}/{what}"])


if __name__ == "__main__":
    main(sys.argv[1:])
