"""Who calls: what callers take turns by."""

from __future__ import annotations

import hashlib
from typing import Any

import grpc


def identity(context: grpc.aio.ServicerContext[Any, Any]) -> str:
    """The caller: by its token, else by the name in its certificate, else by its address.

    Nothing is proved by it, and it decides about turns alone: who shows many tokens has many turns.
    """
    for key, value in context.invocation_metadata() or ():
        if key == "authorization":
            return "token " + hashlib.sha256(value.encode() if isinstance(value, str) else value).hexdigest()[:16]
    for name in context.auth_context().get("x509_common_name", ()):
        return f"name {name.decode(errors='replace')}"
    peer = context.peer()
    return peer.rpartition(":")[0] if peer.startswith(("ipv4:", "ipv6:")) else peer
