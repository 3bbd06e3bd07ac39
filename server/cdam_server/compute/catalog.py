"""From settings to the models of a server, loaded on one device."""

from functools import partial

import structlog
import torch

from cdam_engine import TokenCache
from cdam_server.compute.architectures import check_explainable, none_explainable
from cdam_server.compute.device import find_device
from cdam_server.compute.loading import LoadedModel, load_model, share_weights
from cdam_server.compute.models import Catalog, ServedModel
from cdam_server.settings.config import MIB, Settings
from cdam_server.settings.specs import check_files

_log = structlog.get_logger("cdam.server")


def load_catalog(settings: Settings) -> Catalog:
    """Load every model of the settings; all of them are looked at before the first one is built.

    Raises:
        LoadError: A model can't be loaded, none can be explained, or the device can't be used; the message says why.
    """
    specs = settings.specs()
    check_files(specs)
    check_explainable(specs)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    device = find_device(settings.device)
    cache = TokenCache(settings.token_cache_mib * MIB) if settings.token_cache_mib else None
    models: list[ServedModel] = []
    for number, spec in enumerate(specs, 1):
        _log.info("loading", model=spec.name, number=number, of=len(specs))
        loaded = load_model(spec, device=device)
        alike = [its for its in models if its.loaded.architecture == loaded.architecture]
        share_weights(loaded.module, [its.loaded.module for its in alike])
        served = ServedModel(
            loaded,
            precision=settings.precision,
            compiled_batch_sizes=_batch_sizes(settings) if settings.compile else (),
            cache=cache,
            trunk_of=next(filter(partial(_share_a_trunk, loaded), alike), None),
        )
        if served.trunk_of is not None:
            _log.info("shares its trunk", model=spec.name, with_model=served.trunk_of.loaded.name)
        if served.unsupported is not None:
            _log.warning("model can't be explained", model=spec.name, reason=str(served.unsupported))
        models.append(served)
    if all(served.unsupported is not None for served in models):
        raise none_explainable({served.loaded.name: str(served.unsupported) for served in models})
    return Catalog(models, cache)


def _share_a_trunk(loaded: LoadedModel, other: ServedModel) -> bool:
    """Whether a model may use another one's trunk: one of its own, and the same."""
    return (
        other.trunk_of is None
        and other.unsupported is None
        and (loaded.trunk_fingerprint == other.loaded.trunk_fingerprint)
    )


def _batch_sizes(settings: Settings) -> tuple[int, ...]:
    """Powers of two up to the largest batch that there can be, and that one."""
    largest = min(settings.max_batch_size, settings.max_pending)
    return (*(1 << step for step in range((largest - 1).bit_length())), largest)
