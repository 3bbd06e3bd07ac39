"""From single jobs to full batches; knows neither torch nor grpc."""

from cdam_server.scheduling.batcher import Batcher, ClosedError, Done, ExpiredError, QueueFullError

__all__ = ["Batcher", "ClosedError", "Done", "ExpiredError", "QueueFullError"]
