"""CONTRIBUTING's recipes: a toy method and a toy metric are added where the recipes say, and no table is forgotten."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self, get_args

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

import cdam
import cdam_engine
from cdam.v1 import evaluation_pb2, method_pb2
from cdam_cli.evaluation import quantities
from cdam_engine import METHODS, Cdam, Explainer, Grid, Method, Output, evaluation
from cdam_engine.batch import Batch
from cdam_engine.evaluation import METRICS, Evaluator, Geometry, Measured, Metric, Protocol, Sample
from cdam_engine.evaluation.metrics.base import Better, Cost, Found
from cdam_engine.evaluation.perturbation import CLEAN, MapOf, Order, Perturbation, Ranked
from cdam_engine.evaluation.sample import Field
from cdam_engine.evaluation.subject import Subject
from cdam_engine.methods.base import Scores
from cdam_engine.methods.prediction import Activation
from cdam_engine.targets import Target
from cdam_server.rpc import methods, metrics
from oblong_vit import CONFIG, PATCH, SIZE, image, vit

GEOMETRY = Geometry(SIZE, (PATCH, PATCH), Grid(3, 4))


@dataclass(frozen=True)
class Length(Method):
    """The length of each token that enters the last attention."""

    kind: ClassVar[str] = "token_ablation"  # whose message has no parameters
    needs_target: ClassVar[bool] = False

    def explain(self, batch: Batch, images: Sequence[int], wanted: Sequence[Sequence[Target]]) -> Scores:
        assert batch.trunk is not None
        return Scores(batch.trunk.take(images).tokens.norm(dim=-1)[:, None])


@dataclass(frozen=True)
class Removal(Metric):
    """f's drop when the patches that score highest show the mean colour."""

    kind: ClassVar[str] = "randomisation"  # whose message has one parameter, a flag
    better: ClassVar[Better] = {"drop": "higher", "rest": None}
    requires: ClassVar[tuple[Field, ...]] = ()

    absolute: bool = False

    @property
    def patches(self) -> int:
        return 2 if self.absolute else 1

    def resolved(self, geometry: Geometry, activation: Activation | None = None) -> Self:
        return self

    def cost(self, geometry: Geometry) -> Cost:
        return Cost(images=1)

    def images_of_map(self, its: MapOf, geometry: Geometry) -> Sequence[Perturbation]:
        return [Ranked(Order(its, "patch", None, least_first=False), "mean_colour", "clean", self.patches)]

    def images_of_sample(self, seed: int, sample: str, geometry: Geometry) -> Sequence[Perturbation]:
        return [CLEAN]

    def measure(self, its: MapOf, seed: int, subject: Subject) -> dict[str, Found]:
        clean, rest = subject.values([CLEAN, *self.images_of_map(its, subject.geometry)])
        return {"drop": Found(float(clean - rest)), "rest": Found(float(rest))}


@pytest.fixture(scope="module")
def model() -> VisionTransformer:
    return vit().double()


def pixels(*seeds: int) -> torch.Tensor:
    return torch.from_numpy(np.stack([image(seed) for seed in seeds])).double().permute(0, 3, 1, 2) / 127.5 - 1


def lengths(model: VisionTransformer, x: torch.Tensor) -> np.ndarray:
    """Of the patches' tokens, (B, h, w), as the last block's own norm gives them."""
    tokens: list[torch.Tensor] = []
    hook = model.blocks[-1].norm1.register_forward_hook(lambda _module, _inputs, output: tokens.append(output))
    with torch.no_grad():
        model(x)
    hook.remove()
    return tokens[0].norm(dim=-1)[:, 1:].unflatten(1, (3, 4)).numpy()


def test_a_toy_method_is_explained_beside_others(model: VisionTransformer) -> None:
    x = pixels(0, 1)
    explainer = Explainer(model, data_config=CONFIG)
    found = explainer.explain(x, [[Output(1)], []], [[Cdam(), Length()], [Length()]])
    maps = [its for explanation in found for its in explanation.maps if its.method_index == len(explanation.maps) - 1]
    np.testing.assert_allclose(np.stack([its.scores for its in maps]), lengths(model, x), rtol=1e-6)
    assert explainer.cost([Length()], 0, 12) == 1


@pytest.mark.parametrize("patches", [1, 2])
def test_a_toy_metric_is_measured(model: VisionTransformer, patches: int) -> None:
    x = pixels(3)
    removed = x.clone()
    for place in np.argsort(-lengths(model, x)[0], axis=None)[:patches]:
        row, column = (PATCH * index for index in divmod(place, 4))
        removed[:, :, row : row + PATCH, column : column + PATCH] = 0  # the mean colour, normalised
    with torch.no_grad():
        (clean,), (rest,) = model(x)[:, 2].tolist(), model(removed)[:, 2].tolist()

    protocol = Protocol((Length(),), (Removal(absolute=patches == 2), Removal()))
    evaluator = Evaluator(Explainer(model, data_config=CONFIG), protocol)
    (result,) = evaluator.evaluate([Sample("a", image(3), Output(2))])
    assert isinstance(result, Measured)
    assert [(value.metric_index, value.quantity) for value in result.values] == [
        (0, "drop"), (0, "rest"), (1, "drop"), (1, "rest")
    ]  # fmt: skip
    np.testing.assert_allclose([value.value for value in result.values[:2]], [clean - rest, rest], rtol=1e-6)
    assert evaluator.required == frozenset()
    assert evaluator.passes() == 1 + patches  # its map with the clean image, and each different image once
    assert protocol.cost(GEOMETRY) == Cost(images=2)


def test_toys_travel_by_an_entry_of_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, Length.kind, Length)
    monkeypatch.setitem(methods.PARAMETERS, Length, {})
    monkeypatch.setitem(METRICS, Removal.kind, Removal)
    monkeypatch.setitem(metrics.PARAMETERS, Removal, {"absolute": metrics.Parameter()})
    assert methods.decode_method(methods.encode_method(Length()), "methods[0]", 1) == Length()
    for metric in (Removal(), Removal(absolute=True)):
        assert metrics.decode_metric(metrics.encode_metric(metric), "metrics[0]") == metric


def _without(form: type, *missing: str) -> type:
    """The toy's class without some of what it says."""
    own = {name: its for name, its in vars(form).items() if name in _SAID and name not in missing}
    return type(form)("Lacking", form.__bases__, own)


_SAID = {"kind", "better", "requires", "patches", *Method.__abstractmethods__, *Metric.__abstractmethods__}


@pytest.mark.parametrize("missing", sorted(Metric.__abstractmethods__))
def test_a_metric_that_lacks_a_part_cannot_be_constructed(missing: str) -> None:
    _without(Removal)()
    with pytest.raises(TypeError, match=rf"abstract method '?{missing}'?$"):
        _without(Removal, missing)()


@pytest.mark.parametrize("missing", ["kind", "better", "requires"])
def test_a_metric_that_leaves_something_unsaid_is_no_class(missing: str) -> None:
    with pytest.raises(TypeError, match=f"^metric Lacking does not say: {missing}$"):
        _without(Removal, missing)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"better": {"drop": "up"}}, "better must say"),
        ({"better": {}}, "better must say"),
        ({"requires": "mask"}, "requires must be a tuple of wrong_target, mask"),
        ({"requires": ("maks",)}, "requires must be a tuple of wrong_target, mask"),
    ],
)
def test_a_metric_that_says_something_wrong_is_no_class(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=f"^metric Wrong: {message}"):
        type(Removal)("Wrong", (Removal,), wrong)


@pytest.mark.parametrize("found", [{"rest": Found(1.0), "drop": Found(1.0)}, {"drop": Found(1.0)}, {}, 1.0, None])
def test_a_metric_measures_what_it_says(model: VisionTransformer, monkeypatch: pytest.MonkeyPatch, found: Any) -> None:
    monkeypatch.setattr(Removal, "measure", lambda *_: found)
    evaluator = Evaluator(Explainer(model, data_config=CONFIG), Protocol((Length(),), (Removal(),)))
    with pytest.raises(TypeError, match=r"^metric randomisation must measure a Found of each of drop, rest"):
        evaluator.evaluate([Sample("a", image(3), Output(2))])


def test_a_method_that_explains_nothing_cannot_be_constructed() -> None:
    with pytest.raises(TypeError, match=r"abstract method '?explain'?$"):
        _without(Length, "explain")()


def _fields(form: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(form)}


@pytest.mark.parametrize("kind", METHODS)
def test_every_method_is_in_every_table(kind: str) -> None:
    form, client = METHODS[kind], cdam.METHODS[kind]
    message = method_pb2.Method.DESCRIPTOR.fields_by_name[kind].message_type
    of_the_model = {"activation"} & _fields(form)
    assert {field.name for field in message.fields} == set(methods.PARAMETERS[form]) == _fields(client)
    assert _fields(form) - of_the_model == _fields(client)
    assert methods.decode_method(methods.encode_method(form()), "methods[0]", 1000) == form()
    assert (form.kind, client.kind, client.needs_target) == (kind, kind, form.needs_target)
    assert method_pb2.MethodKind.Value(f"METHOD_KIND_{kind.upper()}")  # else the server could not name it
    assert getattr(cdam, client.__name__) is client
    assert getattr(cdam_engine, form.__name__) is form


@pytest.mark.parametrize("kind", METRICS)
def test_every_metric_is_in_every_table(kind: str) -> None:
    form, client = METRICS[kind], cdam.METRICS[kind]
    message = evaluation_pb2.Metric.DESCRIPTOR.fields_by_name[kind].message_type
    of_the_model = {"activation"} & _fields(form)
    assert {field.name for field in message.fields} == set(metrics.PARAMETERS[form]) == _fields(client)
    assert _fields(form) - of_the_model == _fields(client)
    assert metrics.decode_metric(metrics.encode_metric(form()), "metrics[0]") == form()
    assert (form.kind, client.kind) == (kind, kind)
    assert list(form.better.items()) == list(client.quantities.items())
    assert form.quantities == tuple(client.quantities)
    assert form.requires == client.requires
    assert getattr(cdam, client.__name__) is client
    assert getattr(evaluation, form.__name__) is form
    assert quantities.METRICS[kind].title
    assert all(quantities.quantity(name).says != name for name in form.quantities)  # as it is of one not known


def test_no_table_has_more() -> None:
    assert list(methods.PARAMETERS) == list(METHODS.values())
    assert set(metrics.PARAMETERS) == set(METRICS.values())
    assert set(METHODS) == set(cdam.METHODS) == set(get_args(cdam.MethodKind))
    assert set(METRICS) == set(cdam.METRICS) == set(get_args(cdam.MetricKind)) == set(quantities.METRICS)


def test_a_resolved_metric_says_every_choice() -> None:
    for kind, form in METRICS.items():
        settings = getattr(metrics.encode_metric(form().resolved(GEOMETRY, "softmax")), kind)
        said = {field.name for field, _ in settings.ListFields()}
        flags = {field.name for field in settings.DESCRIPTOR.fields if field.cpp_type == field.CPPTYPE_BOOL}
        assert said | flags == set(metrics.PARAMETERS[form])
