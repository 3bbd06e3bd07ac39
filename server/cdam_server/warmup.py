"""Every model's batches once before the first caller, so that none pays for lazy initialisation, or for compiling.

The scheduler learns meanwhile how long batches take, and how large they may be.
"""

from collections.abc import Iterator, Sequence
from time import perf_counter

import numpy as np
import structlog
import torch

from cdam_engine import Cdam, Concept, Explanation, TopK
from cdam_server.models import Bucket, Catalog, Job, NonFiniteError, ServedModel
from cdam_server.scheduling import DeviceLostError, Scheduler, Terms, TooLargeError

_log = structlog.get_logger("cdam.server")


async def warm_up(catalog: Catalog, scheduler: Scheduler[Bucket, Job, Explanation], batch_sizes: Sequence[int]) -> None:
    """Compute batches of all models.

    Args:
        catalog: The models.
        scheduler: Where jobs go.
        batch_sizes: Sizes of the batches; a compiled model's own count instead.

    Raises:
        ValueError: A model can't be used, or not be compiled.
    """
    for served in catalog:
        name = served.loaded.name
        if served.unsupported is not None:
            _log.warning("model can't be explained", model=name, reason=str(served.unsupported))
            continue
        started = perf_counter()
        if served.compiled_batch_sizes:
            _log.info("compiling", model=name, batch_sizes=served.compiled_batch_sizes)
        try:
            for size in served.compiled_batch_sizes or batch_sizes:
                await scheduler.submit_all(list(_jobs(served, size)))
        except (NonFiniteError, DeviceLostError) as error:
            raise ValueError(f"model {name!r} can't be used: {error}") from error
        except TooLargeError as error:
            raise ValueError(f"model {name!r} can't be used: not even one image fits into memory") from error
        except RuntimeError as error:
            if not served.compiled_batch_sizes:
                raise
            reason = str(error).strip().partition("\n")[0]
            raise ValueError(f"model {name!r} can't be compiled (compile): {reason}") from error
        if served.explainer.cache is not None:
            served.explainer.cache.clear()
        _log.info("warm", model=name, seconds=round(perf_counter() - started, 3))


def _jobs(served: ServedModel, count: int) -> Iterator[tuple[Terms[Bucket], Job]]:
    """Jobs with pictures of noise, none like the other: equal ones would be computed once."""
    height, width = served.loaded.data_config.input_size
    bucket = Bucket(served.loaded.name, (height, width))
    noise = np.random.default_rng(count).integers(0, 256, (count, height, width, 3), np.uint8)
    has_outputs = served.loaded.output_count > 0
    target = TopK(1) if has_outputs else Concept(torch.ones(served.explainer.vit.latent_size))
    for number, pixels in enumerate(noise):  # a caller for each, since one alone may not fill the queue
        yield Terms(bucket, caller=f"warm-up {number}"), Job(pixels, (target,), (Cdam(),))
