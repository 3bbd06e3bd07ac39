"""What is scheduled: work of which several pieces can be computed at once."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol, Self, TypeAlias, TypeVar

Answer = TypeVar("Answer")

Pause: TypeAlias = Callable[[], int]
"""To be called wherever the work may pause; ends it, by an exception, if nobody waits for it any more.

Returns how many batches share the device now.
"""


@dataclass(frozen=True)
class Computed:
    """How a batch was computed.

    Attributes:
        seconds: Time from its start to its end, without the time that it rested.
        fill: Its size as a share of its bucket's ceiling, the largest batch that memory is known to hold.
    """

    seconds: float
    fill: float


class Work(Protocol[Answer]):
    """One piece of work. Pieces of one bucket may share a batch; whichever comes first must be able to run and record all of it.

    Only the structure counts: a dataclass whose field is `bucket` can't inherit from it, since the field would hide a property.
    """

    @property
    def bucket(self) -> Hashable:
        """What the pieces of a batch have in common."""

    def run(self, batch: Sequence[Self], pause: Pause) -> Sequence[Answer | Exception]:
        """Compute a batch, of which this is the first piece; called in a worker's thread, and blocks it.

        Args:
            batch: At least one piece, all of this one's bucket.
            pause: To be called wherever the work may pause.

        Returns:
            One answer for each piece, in order. An exception is the answer to that piece alone.

        Raises:
            TooLargeError: The batch does not fit into memory.
            DeviceLostError: Nothing can be computed any more.
            Exception: Something else is wrong with the batch. Unless it is a single piece, its halves are tried next.
        """

    def record(self, batch: Sequence[Self], answers: Sequence[Answer | Exception], computed: Computed) -> None:
        """Count a batch that `run` has answered, before its callers have their answers; called in the same thread.

        An error is logged and changes nothing else.
        """
