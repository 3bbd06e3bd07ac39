"""From the use cases' answers to the API's messages."""

import numpy as np
from google.protobuf.duration_pb2 import Duration
from numpy.typing import NDArray

from cdam.v1 import common_pb2, explain_pb2, method_pb2, model_pb2, target_pb2
from cdam_engine import Readout
from cdam_engine.preprocess import Prepared
from cdam_server.explain import Explained
from cdam_server.loading import Task
from cdam_server.models import ServedModel

_TASK = {
    Task.MULTI_CLASS: model_pb2.TASK_MULTI_CLASS,
    Task.MULTI_LABEL: model_pb2.TASK_MULTI_LABEL,
    Task.BINARY: model_pb2.TASK_BINARY,
    Task.REGRESSION: model_pb2.TASK_REGRESSION,
}
_READOUT = {
    Readout.CLS_TOKEN: model_pb2.READOUT_CLS_TOKEN,
    Readout.CLS_AND_DISTILLATION_TOKENS: model_pb2.READOUT_CLS_AND_DISTILLATION_TOKENS,
    Readout.AVERAGE_POOL: model_pb2.READOUT_AVERAGE_POOL,
    Readout.MAX_POOL: model_pb2.READOUT_MAX_POOL,
    Readout.ATTENTION_POOL: model_pb2.READOUT_ATTENTION_POOL,
}


def explain_response(
    explained: Explained, request_id: str, methods: int, total_seconds: float
) -> explain_pb2.ExplainResponse:
    """The answer to an Explain request with `methods` methods, all of them CDAM so far."""
    explanation, done, loaded = explained.done.answer, explained.done, explained.model.loaded
    response = explain_pb2.ExplainResponse(
        request_id=request_id,
        model=loaded.name,
        model_fingerprint=loaded.fingerprint,
        geometry=_geometry(explained.prepared, explanation.grid, explained.model.explainer.vit.patch_size),
        timing=explain_pb2.Timing(
            decode=_duration(explained.decode_seconds),
            queue=_duration(done.queue_seconds),
            trunk=_duration(explanation.trunk_seconds),
            tail=_duration(explanation.tail_seconds),
            total=_duration(total_seconds),
            batch_size=done.batch_size,
        ),
    )
    for target, request_index in zip(explanation.targets, explained.request_indices, strict=True):
        probabilities = explained.probabilities
        response.targets.add(
            target=target_pb2.Target(output=target_pb2.OutputTarget(index=target.index)),
            request_index=request_index,
            output_index=target.index,
            label=loaded.output_names[target.index] if loaded.output_names else str(target.index),
            value=target.value,
            probability=None if probabilities is None else float(probabilities[target.index]),
        )
    for method_index in range(methods):
        for target_index, relevance in enumerate(explanation.maps):
            response.maps.add(
                method_index=method_index,
                target_index=target_index,
                scores=_tensor(relevance.scores),
                prefix_share=relevance.prefix_share,
            )
    return response


def model(served: ServedModel, *, is_default: bool) -> model_pb2.Model:
    """A model's description."""
    loaded = served.loaded
    message = model_pb2.Model(
        name=loaded.name,
        is_default=is_default,
        architecture=loaded.architecture,
        fingerprint=loaded.fingerprint,
        task=_TASK[loaded.task],
        output_names=loaded.output_names,
        output_count=loaded.output_count,
        input_size=_size(loaded.data_config.input_size),
        precision=model_pb2.PRECISION_FP32,
        methods=_methods(served),
    )
    if served.unsupported is None:
        vit = served.explainer.vit
        message.flexible_input_size = vit.flexible_input_size
        message.patch_size.CopyFrom(_size(vit.patch_size))
        message.patch_grid.CopyFrom(_size(vit.grid(loaded.data_config.input_size)))
        message.prefix_tokens = vit.num_prefix_tokens
        message.latent_size = vit.latent_size
        message.readout = _READOUT[vit.readout]
    return message


def _methods(served: ServedModel) -> list[model_pb2.MethodSupport]:
    support = []
    for kind in method_pb2.MethodKind.values()[1:]:
        reason = ""
        if kind != method_pb2.METHOD_KIND_CDAM:
            reason = "this version of the server does not serve it"
        elif served.unsupported is not None:
            reason = str(served.unsupported)
        support.append(model_pb2.MethodSupport(method=kind, supported=not reason, reason=reason))
    return support


def _geometry(prepared: Prepared, grid: tuple[int, int], patch: tuple[int, int]) -> explain_pb2.MapGeometry:
    """Where the grid lies; where a model pads its input to whole patches, the grid reaches beyond the input."""
    region = prepared.region
    down, across = (grid[axis] * patch[axis] / prepared.input_size[axis] for axis in (0, 1))
    return explain_pb2.MapGeometry(
        patch_grid=_size(grid),
        region=common_pb2.Region(
            left=region.left,
            top=region.top,
            right=region.left + (region.right - region.left) * across,
            bottom=region.top + (region.bottom - region.top) * down,
        ),
        image_size=_size(prepared.image_size),
        input_size=_size(prepared.input_size),
    )


def _size(size: tuple[int, int]) -> common_pb2.Size:
    return common_pb2.Size(height=size[0], width=size[1])


def _tensor(array: NDArray[np.floating]) -> common_pb2.FloatTensor:
    return common_pb2.FloatTensor(shape=array.shape, data=array.astype("<f4").tobytes())


def _duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromNanoseconds(round(seconds * 1e9))
    return duration
