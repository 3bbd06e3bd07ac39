"""From single jobs to full batches, in turn and in time; knows neither torch nor grpc.

`Scheduler` is the face: it admits jobs, and waits for their answers; `Work` is what a job computes. The `Dispatcher` holds the lock under
which the parts decide: `Admission` who is let in, `Queue` who is next, `Batching` who shares a batch, `Preemption` who interrupts one,
`Ceilings` how large a batch may be, `Forecast` how long it takes. A `Worker` computes, and deals with what fails. `policy` has the numbers.
"""

from cdam_server.compute.scheduling.entry import (
    BACKGROUND,
    AbandonedError,
    Bounds,
    ClosedError,
    DeviceLostError,
    Done,
    ExpiredError,
    QueueFullError,
    Terms,
    TooLargeError,
)
from cdam_server.compute.scheduling.room import Room
from cdam_server.compute.scheduling.scheduler import Observer, Scheduler, Ticket
from cdam_server.compute.scheduling.turns import Pool
from cdam_server.compute.scheduling.work import Answer, Computed, Rest, Work

__all__ = [
    "BACKGROUND",
    "AbandonedError",
    "Answer",
    "Bounds",
    "ClosedError",
    "Computed",
    "DeviceLostError",
    "Done",
    "ExpiredError",
    "Observer",
    "Pool",
    "QueueFullError",
    "Rest",
    "Room",
    "Scheduler",
    "Terms",
    "Ticket",
    "TooLargeError",
    "Work",
]
