"""Asks a head's GCS, over the network and with the token, before this node joins it: does it answer, what runs there.

One gRPC call each with the messages that Ray's wheel brings (`ray.core.generated`), so that nothing joins the cluster, no driver
starts, and a refused token is an answer and no hang. The head's versions lie in its key-value table: `publish_versions` puts them
there as soon as Ray runs, `head_versions` reads them. Callers: `node` on the head, `doctor` on a worker.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from cluster import versions
from cluster.errors import LaunchError

NAMESPACE, KEY = b"tidepool", b"versions"
ANSWER_S = 5.0
PUBLISHED_S = 20.0


def publish_versions(address: str, token: str) -> None:
    """Tell the cluster at `address` (`host:port` of its GCS) what this node, its head, has installed.

    Raises:
        LaunchError: it does not answer, or refuses the token.
    """
    from ray.core.generated import gcs_service_pb2 as messages
    from ray.core.generated import gcs_service_pb2_grpc as services

    text = json.dumps(versions.installed()).encode()
    request = messages.InternalKVPutRequest(namespace=NAMESPACE, key=KEY, value=text, overwrite=True)
    with _channel(address) as channel:
        _call(services.InternalKVGcsServiceStub(channel).InternalKVPut, request, address, token)


def head_versions(address: str, token: str, patience_s: float = PUBLISHED_S) -> dict[str, str]:
    """What the head has installed, as `versions.installed` there gave it.

    A head that does not say it (it was not started by `python -m cluster`) still has Ray's and Python's own versions.

    Args:
        address: `host:port` of its GCS.
        patience_s: How long it may take to say so; it does so right after its start.

    Raises:
        LaunchError: the head does not answer, or refuses the token.
    """
    deadline = time.monotonic() + patience_s
    said = _get(address, token, NAMESPACE, KEY)
    while not said and time.monotonic() < deadline:
        time.sleep(0.2)
        said = _get(address, token, NAMESPACE, KEY)
    if said:
        return {str(name): str(version) for name, version in json.loads(said).items()}
    known = json.loads(_get(address, token, b"cluster", b"CLUSTER_METADATA") or b"{}")
    return {name: str(known[f"{name}_version"]) for name in ("ray", "python") if f"{name}_version" in known}


def head_metrics_port(address: str, token: str) -> int | None:
    """The port of the head's metrics agent, which speaks HTTP; None where it has none.

    Raises:
        LaunchError: as `head_versions`.
    """
    from ray.core.generated import gcs_service_pb2 as messages
    from ray.core.generated import gcs_service_pb2_grpc as services

    with _channel(address) as channel:
        stub = services.NodeInfoGcsServiceStub(channel)
        reply = _call(stub.GetAllNodeInfo, messages.GetAllNodeInfoRequest(), address, token)
    # state 0 is ALIVE; a head that was started again is listed twice.
    heads = [node for node in reply.node_info_list if node.is_head_node and node.state == 0]
    return int(heads[-1].metrics_export_port) or None if heads else None


def _get(address: str, token: str, namespace: bytes, key: bytes) -> bytes:
    from ray.core.generated import gcs_service_pb2 as messages
    from ray.core.generated import gcs_service_pb2_grpc as services

    request = messages.InternalKVGetRequest(namespace=namespace, key=key)
    with _channel(address) as channel:
        return bytes(_call(services.InternalKVGcsServiceStub(channel).InternalKVGet, request, address, token).value)


@contextmanager
def _channel(address: str) -> Iterator[Any]:
    import grpc

    # A proxy of the environment is for the internet, not for a head.
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        yield channel


def _call(method: Callable[..., Any], request: Any, address: str, token: str) -> Any:
    import grpc

    metadata = [("authorization", f"Bearer {token}")]
    try:
        return method(request, metadata=metadata, timeout=ANSWER_S, wait_for_ready=True)
    except grpc.RpcError as error:
        if error.code() == grpc.StatusCode.UNAUTHENTICATED:
            raise LaunchError(
                f"the head at {address} refuses this node's token; give every node the head's ~/.ray/auth_token"
            ) from error
        raise LaunchError(
            f"no head answers at {address} ({error.code().name.lower().replace('_', ' ')} after {ANSWER_S:.0f} s); "
            "start the head first, and let this node reach that port"
        ) from error
