"""From single jobs to full batches, in turn and in time; knows neither torch nor grpc.

`Scheduler` is the face: it admits jobs, and waits for their answers; `Work` is what a job computes. The `Dispatcher` holds the lock under
which the parts decide: `Admission` who is let in, `Queue` who is next, `Batching` who shares a batch, `Preemption` who interrupts one,
`Ceilings` how large a batch may be, `Forecast` how long it takes. A `Worker` computes, and deals with what fails. `policy` has the numbers.
"""

from cdam_server.compute.scheduling.byte_budget import ByteBudget
from cdam_server.compute.scheduling.job import (
    BACKGROUND,
    AbandonedError,
    Bounds,
    ClosedError,
    DeviceLostError,
    Done,
    ExpiredError,
    JobSpec,
    QueueFullError,
    TooLargeError,
)
from cdam_server.compute.scheduling.pool import Pool
from cdam_server.compute.scheduling.scheduler import Observer, Scheduler, Ticket
from cdam_server.compute.scheduling.work import Answer, Computed, Pause, Work

__all__ = [
    "BACKGROUND",
    "AbandonedError",
    "Answer",
    "Bounds",
    "ByteBudget",
    "ClosedError",
    "Computed",
    "DeviceLostError",
    "Done",
    "ExpiredError",
    "JobSpec",
    "Observer",
    "Pause",
    "Pool",
    "QueueFullError",
    "Scheduler",
    "Ticket",
    "TooLargeError",
    "Work",
]
