"""What ends a server."""


class ServerFailedError(Exception):
    """Nothing can be computed any more: only a new process helps."""
