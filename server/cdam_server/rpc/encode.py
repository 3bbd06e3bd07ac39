"""From the use cases' answers to the API's messages."""

import json
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from google.protobuf.duration_pb2 import Duration
from numpy.typing import NDArray

from cdam.v1 import common_pb2, concept_pb2, explain_pb2, method_pb2, model_pb2, target_pb2
from cdam_engine import Concept, Contrast, ExplainedTarget, Output, Readout, RelevanceMap
from cdam_engine.preprocess import DataConfig, Prepared
from cdam_server.compute.facts import ModelFacts
from cdam_server.settings.specs import Task
from cdam_server.store import Example, StoredConcept, Version
from cdam_server.usecases.explain import Explained
from cdam_server.usecases.resolve import RegisteredConcept

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
    Readout.CLS_TOKEN_AND_AVERAGE_POOL: model_pb2.READOUT_CLS_TOKEN_AND_AVERAGE_POOL,
}
_PRECISION = {"fp32": model_pb2.PRECISION_FP32, "bf16": model_pb2.PRECISION_BF16}
_RESIZE = {"model": common_pb2.RESIZE_MODE_MODEL, "squash": common_pb2.RESIZE_MODE_SQUASH}
_SIMILARITY = {
    "dot": target_pb2.SIMILARITY_DOT,
    "cosine": target_pb2.SIMILARITY_COSINE,
    "l2": target_pb2.SIMILARITY_L2,
}


def explain_response(explained: Explained, request_id: str, total_seconds: float) -> explain_pb2.ExplainResponse:
    """The answer to an Explain request."""
    model, answered = explained.model, explained.answered
    explanation, done, prepared = answered.done.answer, answered.done, answered.prepared
    # A part is written where it belongs: protobuf would copy a message that is made apart.
    message = explain_pb2.ExplainResponse(
        request_id=request_id,
        model=model.name,
        model_fingerprint=model.fingerprint,
        token_cache_hit=explanation.token_cache_hit,
        preprocessing=_applied(model.data_config, prepared.resize, prepared.input_size),
    )
    _write_geometry(message.geometry, prepared, explanation.grid, model.explained.sizes.patch_size)
    timing = message.timing
    _write_seconds(timing.decode, answered.decode_seconds)
    _write_seconds(timing.queue, done.queue_seconds)
    _write_seconds(timing.trunk, explanation.trunk_seconds)
    _write_seconds(timing.tail, explanation.tail_seconds)
    _write_seconds(timing.total, total_seconds)
    timing.batch_size = done.batch_size
    for target in explanation.targets:
        _write_target(message.targets.add(), explained, target)
    for relevance in explanation.maps:
        _write_map(message.maps.add(), relevance)
    return message


def model(facts: ModelFacts, *, is_default: bool) -> model_pb2.Model:
    """A model's description."""
    message = model_pb2.Model(
        name=facts.name,
        is_default=is_default,
        architecture=facts.architecture,
        fingerprint=facts.fingerprint,
        task=_TASK[facts.task],
        output_names=facts.output_names,
        output_count=facts.output_count,
        input_size=size(facts.data_config.input_size),
        methods=_methods(facts),
        input=_model_input(facts.data_config),
        resampled=facts.resampled,
    )
    message.model_kwargs.update(json.loads(json.dumps(dict(facts.model_kwargs))))  # a Struct takes lists, no tuples
    if (explained := facts.explainer) is not None:
        message.precision = _PRECISION[explained.precision]
        message.flexible_input_size = explained.sizes.flexible
        message.patch_size.CopyFrom(size(explained.sizes.patch_size))
        message.patch_grid.CopyFrom(size(explained.sizes.grid(facts.data_config.input_size)))
        message.prefix_tokens = explained.prefix_tokens
        message.latent_size = explained.latent_size
        message.readout = _READOUT[explained.readout]
    return message


def concept(stored: StoredConcept) -> concept_pb2.Concept:
    """A concept, whole."""
    content = stored.content
    message = concept_version(stored.version)
    message.vector.CopyFrom(tensor(content.vector))
    message.examples.extend(map(_example, content.examples))
    message.negatives.extend(map(_example, content.negatives))
    return message


def concept_version(version: Version) -> concept_pb2.Concept:
    """A concept without its vector and examples."""
    facts = version.facts
    message = concept_pb2.Concept(
        id=facts.id,
        name=version.name,
        version=version.number,
        model=version.model,
        model_fingerprint=facts.model_fingerprint,
        description=version.description,
        labels=version.labels,
        example_count=facts.example_count,
        negative_count=facts.negative_count,
        spread=facts.spread,
        content_digest=facts.content_digest,
        preprocessing=None if facts.input_size is None else preprocessing(facts.resize, facts.input_size),
        imported=facts.imported,
    )
    message.create_time.FromDatetime(version.create_time)
    return message


def _example(example: Example) -> concept_pb2.ConceptExample:
    return concept_pb2.ConceptExample(digest=example.digest, cosine=example.cosine)


def preprocessing(resize: str, input_size: tuple[int, int]) -> common_pb2.Preprocessing:
    """How images were brought to the model's input."""
    return common_pb2.Preprocessing(resize_mode=_RESIZE[resize], input_size=size(input_size))


@lru_cache(maxsize=64)  # of every model and input size in use; what is put into a message is copied
def _applied(config: DataConfig, resize: str, input_size: tuple[int, int]) -> explain_pb2.AppliedPreprocessing:
    return explain_pb2.AppliedPreprocessing(
        resize_mode=_RESIZE[resize], input_size=size(input_size), model_input=_model_input(config)
    )


def _model_input(config: DataConfig) -> common_pb2.ModelInput:
    return common_pb2.ModelInput(
        mean=config.mean,
        std=config.std,
        interpolation=common_pb2.Interpolation.Value(f"INTERPOLATION_{config.interpolation.upper()}"),
        crop_fraction=config.crop_pct,
        crop_mode=common_pb2.CropMode.Value(f"CROP_MODE_{config.crop_mode.upper()}"),
    )


def _methods(facts: ModelFacts) -> list[model_pb2.MethodSupport]:
    support = []
    for field in method_pb2.Method.DESCRIPTOR.fields:
        refusal = facts.refusals.get(field.name)
        support.append(
            model_pb2.MethodSupport(
                method=method_pb2.MethodKind.Value(f"METHOD_KIND_{field.name.upper()}"),
                supported=refusal is None,
                reason=refusal.message if refusal else "",
            )
        )
    return support


def _write_target(message: explain_pb2.ExplainedTarget, explained: Explained, item: ExplainedTarget) -> None:
    index, probabilities = item.index, explained.probabilities
    message.target.CopyFrom(_target(item.target))
    message.request_index = item.request_index
    message.label = _label(item.target, explained.model.output_names)
    message.value = item.value
    if index is not None:
        message.output_index = index
        if probabilities is not None:
            message.probability = float(probabilities[index])


def _target(target: Output | Concept | Contrast) -> target_pb2.Target:
    match target:
        case Output():
            return target_pb2.Target(output=_output(target))
        case Concept():
            return target_pb2.Target(concept=_concept(target))
        case Contrast(positive, negative):
            contrast = target_pb2.ContrastTarget(positive=_side(positive), negative=_side(negative))
            return target_pb2.Target(contrast=contrast)


def _side(target: Output | Concept) -> target_pb2.ScalarTarget:
    if isinstance(target, Output):
        return target_pb2.ScalarTarget(output=_output(target))
    return target_pb2.ScalarTarget(concept=_concept(target))


def _output(output: Output) -> target_pb2.OutputTarget:
    return target_pb2.OutputTarget(index=output.index)


def _concept(concept: Concept) -> target_pb2.ConceptTarget:
    """How it is compared, and which it is if it is registered; a vector is the caller's own, and long."""
    similarity = _SIMILARITY[concept.similarity]
    if isinstance(concept, RegisteredConcept):
        return target_pb2.ConceptTarget(id=concept.id, similarity=similarity)
    return target_pb2.ConceptTarget(similarity=similarity)


def _label(target: Output | Concept | Contrast, names: Sequence[str]) -> str:
    match target:
        case Output(index):
            return names[index] if names else str(index)
        case RegisteredConcept(name=name, similarity="dot"):
            return name
        case RegisteredConcept(name=name, similarity=similarity):
            return f"{name} ({similarity})"
        case Concept():
            return f"concept ({target.similarity})"
        case Contrast(positive, negative):
            return f"{_label(positive, names)} - {_label(negative, names)}"


def _write_map(message: explain_pb2.RelevanceMap, relevance: RelevanceMap) -> None:
    message.method_index = relevance.method_index
    if relevance.target_index is not None:
        message.target_index = relevance.target_index
    _write_tensor(message.scores, relevance.scores)
    if relevance.prefix_share is not None:
        message.prefix_share = relevance.prefix_share
    if relevance.completeness_residual is not None:
        message.completeness_residual = relevance.completeness_residual
    if relevance.steps is not None:
        message.steps = relevance.steps
    if relevance.value_part is not None and relevance.key_part is not None:
        _write_tensor(message.parts.value, relevance.value_part)
        _write_tensor(message.parts.key, relevance.key_part)
    if relevance.standard_error is not None:
        _write_tensor(message.standard_error, relevance.standard_error)


def _write_geometry(
    message: explain_pb2.MapGeometry, prepared: Prepared, grid: tuple[int, int], patch: tuple[int, int]
) -> None:
    """Where the grid lies; where a model pads its input to whole patches, the grid reaches beyond the input."""
    seen, region = prepared.region, message.region
    down, across = (grid[axis] * patch[axis] / prepared.input_size[axis] for axis in (0, 1))
    region.left, region.top = seen.left, seen.top
    region.right = seen.left + (seen.right - seen.left) * across
    region.bottom = seen.top + (seen.bottom - seen.top) * down
    _write_size(message.patch_grid, grid)
    _write_size(message.image_size, prepared.image_size)
    _write_size(message.input_size, prepared.input_size)


def _write_size(message: common_pb2.Size, pixels: tuple[int, int]) -> None:
    message.height, message.width = pixels


def size(pixels: tuple[int, int]) -> common_pb2.Size:
    """(height, width)."""
    return common_pb2.Size(height=pixels[0], width=pixels[1])


def tensor(array: NDArray[np.floating]) -> common_pb2.FloatTensor:
    """The array as float32."""
    message = common_pb2.FloatTensor()
    _write_tensor(message, array)
    return message


def _write_tensor(message: common_pb2.FloatTensor, array: NDArray[np.floating]) -> None:
    message.shape.extend(array.shape)
    message.data = array.astype("<f4", copy=False).tobytes()


def duration(seconds: float) -> Duration:
    """A span of time."""
    message = Duration()
    _write_seconds(message, seconds)
    return message


def _write_seconds(message: Duration, seconds: float) -> None:
    message.FromNanoseconds(round(seconds * 1e9))
