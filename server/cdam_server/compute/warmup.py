"""Every model's batches once before the first caller, so that none pays for lazy initialisation, or for compiling.

The scheduler learns meanwhile how long batches take, and how large they may be.
"""

from collections.abc import Iterator
from time import perf_counter
from typing import Final

import numpy as np
import structlog
import torch

from cdam_engine import Cdam, Concept, Explanation, TopK
from cdam_server.compute.facts import NonFiniteError
from cdam_server.compute.models import Catalog, ServedModel
from cdam_server.compute.scheduling import DeviceLostError, JobSpec, Scheduler, TooLargeError
from cdam_server.compute.work import Bound, ExplainWork, image_bucket

# On a CPU a second batch teaches how time grows with size; more than this it need not take. A GPU gets the largest batch
# there may be, because that shows what fits into its memory.
_SECONDS: Final = 2.0
_log = structlog.get_logger("cdam.server")


async def warm_up(catalog: Catalog, scheduler: Scheduler, largest: int) -> None:
    """Compute batches of all models, of those that share a trunk for the first alone: a single image, then several.

    Args:
        catalog: The models.
        scheduler: Where jobs go.
        largest: Most images in a batch; a compiled model is warmed for its own sizes instead.

    Raises:
        ValueError: A model can't be used, or not be compiled.
    """
    models = [served for served in catalog if served.unsupported is None and served.trunk_of is None]
    for number, served in enumerate(models, 1):
        name = served.loaded.name
        _log.info("warming up", model=name, number=number, of=len(models), compiled=bool(served.compiled_batch_sizes))
        started = perf_counter()
        try:
            await _warm(served, scheduler, catalog, largest)
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
        _log.info("warm", model=name, number=number, of=len(models), seconds=round(perf_counter() - started, 3))


async def _warm(served: ServedModel, scheduler: Scheduler, catalog: Catalog, largest: int) -> None:
    """The batches of one model."""
    if served.compiled_batch_sizes:
        for size in served.compiled_batch_sizes:
            await _batch(served, scheduler, catalog, size)
        return
    seconds = await _batch(served, scheduler, catalog, 1)
    if largest > 1:
        on_cpu = next(served.loaded.module.parameters()).device.type == "cpu"
        await _batch(served, scheduler, catalog, min(largest, max(2, int(_SECONDS / seconds))) if on_cpu else largest)


async def _batch(served: ServedModel, scheduler: Scheduler, catalog: Catalog, size: int) -> float:
    """Compute one batch, and say so.

    Returns:
        The seconds that it took.
    """
    started = perf_counter()
    await scheduler.submit_all(list(_works(served, catalog, size)))
    seconds = perf_counter() - started
    _log.info(
        "warmed",
        model=served.loaded.name,
        batch_size=size,
        input_size=" x ".join(map(str, served.loaded.data_config.input_size)),
        seconds=round(seconds, 3),
    )
    return seconds


def _works(served: ServedModel, catalog: Catalog, count: int) -> Iterator[tuple[JobSpec, Bound[Explanation]]]:
    """Work on pictures of noise, none like the other: equal ones would be computed once."""
    facts = served.facts
    height, width = facts.data_config.input_size
    noise = np.random.default_rng(count).integers(0, 256, (count, height, width, facts.data_config.channels), np.uint8)
    target = TopK(1) if facts.output_count else Concept(torch.ones(facts.explained.latent_size))
    for number, pixels in enumerate(noise):  # a caller for each, since one alone may not fill the queue
        bucket = image_bucket(facts, (height, width))
        work = ExplainWork(bucket, facts.name, pixels, (target,), (Cdam(),))
        yield JobSpec(bucket, caller=f"warm-up {number}"), Bound(work, catalog, observer=None)  # nobody's requests
