"""How large batches may be, as far as memory is known to hold them."""

from collections.abc import Hashable
from dataclasses import dataclass, replace

from cdam_server.compute.scheduling import policy


@dataclass
class Ceiling:
    """The largest batch of a bucket that memory is known to hold.

    Attributes:
        jobs: Most jobs in a batch.
        raise_after: Full batches after which it is raised.
        full: Full batches since it was changed.
    """

    jobs: int
    raise_after: int = policy.RAISE_AFTER_BATCHES
    full: int = 0


class Ceilings:
    """The ceiling of every bucket: lowered when a batch did not fit into memory, raised again after full batches that did.

    Args:
        max_batch_size: Largest number of jobs in a batch, whatever memory holds.
    """

    def __init__(self, max_batch_size: int) -> None:
        self.max_batch_size = max_batch_size
        self._lowered: dict[Hashable, Ceiling] = {}

    def jobs(self, bucket: Hashable) -> int:
        """Most jobs in a batch of a bucket."""
        lowered = self._lowered.get(bucket)
        return self.max_batch_size if lowered is None else lowered.jobs

    def get(self, bucket: Hashable) -> Ceiling | None:
        """What is known of a bucket's ceiling now, or None if it was never lowered; for `restore`."""
        lowered = self._lowered.get(bucket)
        return None if lowered is None else replace(lowered)

    def restore(self, bucket: Hashable, ceiling: Ceiling | None) -> None:
        """Put an earlier ceiling back."""
        if ceiling is None:
            self._lowered.pop(bucket, None)
        else:
            self._lowered[bucket] = ceiling

    def lower(self, bucket: Hashable, size: int) -> None:
        """A batch of this size did not fit into memory."""
        ceiling = self._lowered.get(bucket)
        if ceiling is None:
            self._lowered[bucket] = Ceiling(size // 2)
            return
        ceiling.jobs = min(ceiling.jobs, size // 2)
        ceiling.raise_after = min(2 * ceiling.raise_after, policy.MAX_RAISE_AFTER_BATCHES)
        ceiling.full = 0

    def fitted(self, bucket: Hashable, size: int) -> None:
        """A batch of this size fitted."""
        ceiling = self._lowered.get(bucket)
        if ceiling is None or size < ceiling.jobs:
            return
        ceiling.full += 1
        if ceiling.full >= ceiling.raise_after:
            ceiling.jobs, ceiling.full = ceiling.jobs + max(1, int(policy.CEILING_GROWTH * ceiling.jobs)), 0
        if ceiling.jobs >= self.max_batch_size:
            del self._lowered[bucket]
