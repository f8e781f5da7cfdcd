"""Asks a service whether it serves, for container health checks: python -m services.common.healthcheck HOST:PORT

Ends with 0 where gRPC health says SERVING, else with 1 and what it said instead.
"""

from __future__ import annotations

import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

_TIMEOUT_S = 3.0


def check(address: str) -> str | None:
    """None where the service at `address` serves, else what is wrong."""
    with grpc.insecure_channel(address) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=_TIMEOUT_S)
        except grpc.RpcError as error:
            return f"{address}: {error.code().name}: {error.details()}"
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        return f"{address}: {health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)}"
    return None


def main() -> None:
    """Entry point."""
    if len(sys.argv) != 2:
        sys.exit("usage: python -m services.common.healthcheck HOST:PORT")
    problem = check(sys.argv[1])
    if problem:
        sys.exit(problem)


if __name__ == "__main__":
    main()
