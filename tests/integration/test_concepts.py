"""Concepts as any gRPC client sees them: raw stubs against a real server of the demo model and another one."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from google.rpc import error_details_pb2
from PIL import Image

import cdam_engine as engine
from calls import SAMPLES, Stub, array, contrast, method, output, refused, request, vector, violated
from cdam.v1 import common_pb2, concept_pb2, model_pb2, target_pb2
from cdam_server.demo import model as demo_model
from in_this_process import served

DIGEST = "0" * 64
_LARGE = [("grpc.max_send_message_length", 1 << 26)]
MODELS = """models:
- {name: demo, architecture: demo}
- {name: twin, architecture: demo}
- {name: other, architecture: test_vit, random_weights: true}
"""
_numbers = itertools.count()


@pytest.fixture(scope="module")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stub]:
    folder = tmp_path_factory.mktemp("concepts")
    (folder / "models.yaml").write_text(MODELS)
    settings: dict[str, Any] = {"models_file": folder / "models.yaml", "data_dir": folder / "data"}
    with (
        served(**settings, max_concept_images=60, max_pending=24) as address,
        grpc.insecure_channel(address) as channel,
    ):
        yield Stub(channel)


@pytest.fixture
def name() -> str:
    """A name that no other test has."""
    return f"concept-{next(_numbers)}"


@pytest.fixture(scope="module")
def explainer() -> engine.Explainer:
    return engine.Explainer(demo_model.load())


def _picture(seed: int, size: int = 64) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def _pixels(pictures: Sequence[bytes]) -> torch.Tensor:
    return torch.from_numpy(np.stack([np.array(Image.open(io.BytesIO(data))) for data in pictures]))


def _latents(explainer: engine.Explainer, pictures: Sequence[bytes]) -> np.ndarray:
    nothing: list[list[engine.Target]] = [[] for _ in pictures]
    found = explainer.explain(_pixels(pictures), nothing, [[] for _ in pictures])
    return np.stack([item.latent for item in found]).astype(np.float64)


def _images(pictures: Sequence[bytes]) -> list[common_pb2.Image]:
    return [common_pb2.Image(encoded=data) for data in pictures]


def _request(
    name: str, examples: Sequence[bytes] = (), negatives: Sequence[bytes] = (), **fields: Any
) -> concept_pb2.ConceptRegisterRequest:
    spec = concept_pb2.ConceptSpec(name=name, **fields)
    return concept_pb2.ConceptRegisterRequest(spec=spec, examples=_images(examples), negatives=_images(negatives))


def _register(stub: Stub, *arguments: Any, **fields: Any) -> concept_pb2.ConceptRegisterResponse:
    return stub.ConceptRegister(_request(*arguments, **fields), timeout=60)


def _end(count: int) -> concept_pb2.ConceptRegisterStreamRequest:
    return concept_pb2.ConceptRegisterStreamRequest(end=concept_pb2.ConceptRegisterEnd(image_count=count))


def _tensor(values: np.ndarray) -> common_pb2.FloatTensor:
    return common_pb2.FloatTensor(shape=values.shape, data=values.astype("<f4").tobytes())


def _by_name(name: str, similarity: Any = 0) -> target_pb2.Target:
    return target_pb2.Target(concept=target_pb2.ConceptTarget(name=name, similarity=similarity))


def _by_id(concept_id: str) -> target_pb2.Target:
    return target_pb2.Target(concept=target_pb2.ConceptTarget(id=concept_id))


def _scene() -> bytes:
    return (SAMPLES / "scene1.png").read_bytes()


def _sha(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _identity(fingerprint: str, examples: Sequence[bytes], negatives: Sequence[bytes] = ()) -> str:
    """The id, from the documented recipe."""
    sides = [sorted(hashlib.sha256(data).hexdigest() for data in side) for side in (examples, negatives)]
    content = _sha({"format": "cdam-concept-1", "examples": sides[0], "negatives": sides[1]})
    return _sha(
        {
            "format": "cdam-concept-1",
            "model_fingerprint": fingerprint,
            "resize": "model",
            "input_size": [64, 64],
            "content": content,
        }
    )


# --- what is registered


def test_the_mean_of_the_examples_latents(stub: Stub, name: str, explainer: engine.Explainer) -> None:
    pictures = [_picture(seed) for seed in range(20)]
    answer = _register(stub, name, pictures, description="noise", labels={"team": "a", "Größe": "ß"})
    concept, latents = answer.concept, _latents(explainer, pictures)
    mean = latents.mean(0)
    cosines = latents @ mean / np.linalg.norm(latents, axis=1) / np.linalg.norm(mean)
    assert answer.created
    np.testing.assert_allclose(array(concept.vector), mean, atol=1e-5 * np.abs(mean).max())
    assert concept.spread == pytest.approx(cosines.mean(), abs=1e-6)
    assert [item.cosine for item in concept.examples] == pytest.approx(cosines, abs=1e-6)
    assert [item.digest for item in concept.examples] == [hashlib.sha256(data).hexdigest() for data in pictures]
    assert (concept.name, concept.version, concept.model, concept.description) == (name, 1, "demo", "noise")
    assert dict(concept.labels) == {"team": "a", "Größe": "ß"}
    assert (concept.example_count, concept.negative_count, concept.imported) == (20, 0, False)
    fingerprint = stub.GetModel(model_pb2.GetModelRequest(name="demo")).model.fingerprint
    assert concept.model_fingerprint == fingerprint
    assert concept.id == _identity(fingerprint, pictures)
    size = concept.preprocessing.input_size
    assert (size.height, size.width, concept.preprocessing.resize_mode) == (64, 64, common_pb2.RESIZE_MODE_MODEL)
    assert stub.GetConcept(concept_pb2.GetConceptRequest(name=name)).concept == concept
    assert stub.GetConcept(concept_pb2.GetConceptRequest(id=concept.id)).concept == concept


def test_negatives_make_a_difference_of_means(stub: Stub, name: str, explainer: engine.Explainer) -> None:
    shown, others = [_picture(seed) for seed in range(5)], [_picture(seed) for seed in range(50, 57)]
    concept = _register(stub, name, shown, others).concept
    expected = _latents(explainer, shown).mean(0) - _latents(explainer, others).mean(0)
    np.testing.assert_allclose(array(concept.vector), expected, atol=1e-5 * np.abs(expected).max())
    assert (concept.example_count, concept.negative_count) == (5, 7)
    assert len(concept.negatives) == 7
    assert concept.id == _identity(concept.model_fingerprint, shown, others)


def test_a_stream_and_a_message_make_the_same_concept(stub: Stub, name: str) -> None:
    pictures = [_picture(seed) for seed in range(100, 140)]
    messages = [concept_pb2.ConceptRegisterStreamRequest(spec=concept_pb2.ConceptSpec(name=name))]
    for place, image in enumerate(_images(pictures)):
        kind = "negative" if place % 4 == 3 else "example"
        messages.append(concept_pb2.ConceptRegisterStreamRequest(**{kind: image}))
    messages.append(_end(len(pictures)))
    streamed = stub.ConceptRegisterStream(iter(messages), timeout=60)
    shown = [data for place, data in enumerate(pictures) if place % 4 != 3]
    at_once = _register(stub, name, shown, pictures[3::4])
    assert (streamed.created, at_once.created) == (True, False)
    assert streamed.concept == at_once.concept
    # Their order is nothing.
    again = _register(stub, name, shown[::-1], pictures[3::4])
    assert (again.created, again.concept) == (False, streamed.concept)


def test_raw_pixels_and_other_input_sizes(stub: Stub, name: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 48, 3), np.uint8)
    raw = common_pb2.Image(raw=common_pb2.RawImage(height=40, width=48, channels=3, data=pixels.tobytes()))
    preprocessing = common_pb2.Preprocessing(
        resize_mode=common_pb2.RESIZE_MODE_SQUASH, input_size=common_pb2.Size(height=32, width=48)
    )
    spec = concept_pb2.ConceptSpec(name=name, preprocessing=preprocessing)
    concept = stub.ConceptRegister(concept_pb2.ConceptRegisterRequest(spec=spec, examples=[raw])).concept
    assert concept.preprocessing == preprocessing
    assert concept.examples[0].digest == hashlib.sha256(b"40 48 3\n" + pixels.tobytes()).hexdigest()
    assert concept.examples[0].cosine == pytest.approx(1)


def test_a_ready_vector(stub: Stub, name: str) -> None:
    values = np.random.default_rng(0).standard_normal(128).astype(np.float32)
    concept = _register(stub, name, vector=_tensor(values)).concept
    np.testing.assert_array_equal(array(concept.vector), values)
    assert not concept.HasField("spread")
    assert not concept.HasField("preprocessing")
    assert (concept.example_count, concept.imported) == (0, False)
    assert not _register(stub, name, vector=_tensor(values)).created


# --- explained with


def test_a_registered_concept_is_its_vector(stub: Stub, name: str) -> None:
    concept = _register(stub, name, [_picture(seed) for seed in range(200, 203)]).concept
    values = array(concept.vector)
    cosine, l2 = target_pb2.SIMILARITY_COSINE, target_pb2.SIMILARITY_L2
    named = [_by_name(name), _by_id(concept.id), _by_name(name, cosine), _by_name(name, l2)]
    inline = [vector(values), vector(values), vector(values, cosine), vector(values, l2)]
    answer, expected = (stub.Explain(request(_scene(), *targets)) for targets in (named, inline))
    for relevance, truth in zip(answer.maps, expected.maps, strict=True):
        scores = array(truth.scores)
        np.testing.assert_allclose(array(relevance.scores), scores, atol=1e-6 * np.abs(scores).max())
    assert [item.value for item in answer.targets] == pytest.approx([item.value for item in expected.targets])
    assert [item.label for item in answer.targets] == [
        name,
        concept.id[:12],
        f"{name} (cosine)",
        f"{name} (l2)",
    ]
    assert {item.target.concept.id for item in answer.targets} == {concept.id}


@pytest.mark.parametrize("scale", [1e-37, 1e-23, 1e-10, 1e14])
def test_a_cosine_knows_no_scale(stub: Stub, scale: float) -> None:
    values, cosine = np.random.default_rng(7).uniform(-1, 1, 128), target_pb2.SIMILARITY_COSINE
    answer = stub.Explain(request(_scene(), vector(values, cosine), vector(values * scale, cosine)))
    expected, scores = (array(item.scores) for item in answer.maps)
    np.testing.assert_allclose(scores, expected, atol=1e-5 * np.abs(expected).max())
    assert answer.targets[1].value == pytest.approx(answer.targets[0].value, rel=1e-5)


def test_differences_of_concepts_and_outputs(stub: Stub, name: str) -> None:
    first = _register(stub, name, [_picture(300)]).concept
    second = _register(stub, f"{name}-2", [_picture(301)]).concept
    targets = [contrast(_by_name(name), _by_name(f"{name}-2")), contrast(3, _by_id(second.id)), _by_name(name)]
    answer = stub.Explain(request(_scene(), *targets, _by_name(f"{name}-2"), output(3)))
    maps = [array(item.scores) for item in answer.maps]
    tolerance = 1e-5 * max(np.abs(item).max() for item in maps)
    np.testing.assert_allclose(maps[0], maps[2] - maps[3], atol=tolerance)
    np.testing.assert_allclose(maps[1], maps[4] - maps[3], atol=tolerance)
    assert [item.label for item in answer.targets[:2]] == [f"{name} - {name}-2", f"3 - {second.id[:12]}"]
    sides = answer.targets[0].target.contrast
    assert (sides.positive.concept.id, sides.negative.concept.id) == (first.id, second.id)


# --- names, versions


def test_other_content_needs_replace_and_old_versions_stay(stub: Stub, name: str) -> None:
    first = _register(stub, name, [_picture(400)]).concept
    other = partial(_register, stub, name, [_picture(401)])
    code, message, (info,) = refused(other, error_details_pb2.ResourceInfo)
    assert code is grpc.StatusCode.ALREADY_EXISTS
    assert (info.resource_type, info.resource_name) == ("cdam.v1.concept", name)
    assert "replace" in message
    second = other(replace=True)
    assert (second.created, second.concept.version) == (True, 2)
    assert not other(replace=True).created
    old, new = (array(item.scores) for item in stub.Explain(request(_scene(), _by_id(first.id), _by_name(name))).maps)
    (truth,) = stub.Explain(request(_scene(), vector(array(second.concept.vector)))).maps
    np.testing.assert_allclose(new, array(truth.scores), atol=1e-6 * np.abs(new).max())
    assert np.abs(old - new).max() > 0.1 * np.abs(new).max()
    # Back to the first content: a third version, of the first id.
    third = _register(stub, name, [_picture(400)], replace=True).concept
    assert (third.version, third.id) == (3, first.id)
    assert stub.GetConcept(concept_pb2.GetConceptRequest(id=first.id)).concept.version == 3


def test_an_expected_version_guards_against_lost_updates(stub: Stub, name: str) -> None:
    assert _register(stub, name, [_picture(500)], expected_version=0).concept.version == 1
    update = partial(_register, stub, name, [_picture(501)], replace=True)
    code, _, (info,) = refused(partial(update, expected_version=0), error_details_pb2.ErrorInfo)
    assert (code, info.reason, info.metadata["current_version"]) == (grpc.StatusCode.ABORTED, "VERSION_MISMATCH", "1")
    assert update(expected_version=1).concept.version == 2
    # Repeated after its answer was lost it is still a success.
    again = update(expected_version=1)
    assert (again.created, again.concept.version) == (False, 2)


def test_a_new_description_is_a_new_version(stub: Stub, name: str) -> None:
    pictures = [_picture(600)]
    _register(stub, name, pictures, description="old")
    assert _register(stub, name, pictures, description="new").concept.description == "old"
    replaced = _register(stub, name, pictures, description="new", replace=True)
    assert (replaced.created, replaced.concept.description, replaced.concept.version) == (True, "new", 2)


def test_deleting_frees_the_name_and_keeps_the_content(stub: Stub, name: str) -> None:
    concept = _register(stub, name, [_picture(700)]).concept
    delete = partial(stub.DeleteConcept, concept_pb2.DeleteConceptRequest(name=name, model="demo"))
    wrong = concept_pb2.DeleteConceptRequest(name=name, model="demo", expected_version=7)
    assert refused(partial(stub.DeleteConcept, wrong))[0] is grpc.StatusCode.ABORTED
    assert delete().concept.id == concept.id
    assert refused(delete)[0] is grpc.StatusCode.NOT_FOUND
    assert refused(lambda: stub.Explain(request(_scene(), _by_name(name))))[0] is grpc.StatusCode.NOT_FOUND
    assert stub.Explain(request(_scene(), _by_id(concept.id))).targets[0].label == concept.id[:12]
    assert name not in {item.name for item in stub.ListConcepts(concept_pb2.ListConceptsRequest()).concepts}
    assert _register(stub, name, [_picture(701)], expected_version=0).concept.version == 2


def test_lists_go_page_by_page(stub: Stub, name: str) -> None:
    names = [f"{name}.{place}" for place in range(7)]
    for place, its in enumerate(names):
        labels = {"suite": name, "parity": "odd" if place % 2 else "even"}
        values = np.random.default_rng(place).standard_normal(128).astype(np.float32)
        _register(stub, its, vector=_tensor(values), labels=labels, model="twin" if place == 6 else "demo")
    ask = partial(concept_pb2.ListConceptsRequest, labels={"suite": name}, page_size=3)
    found, token, pages = [], "", 0
    while pages == 0 or token:
        page = stub.ListConcepts(ask(page_token=token))
        found += page.concepts
        token, pages = page.next_page_token, pages + 1
    assert (pages, [item.name for item in found]) == (3, names)
    assert not any(item.HasField("vector") or item.examples for item in found)
    few = stub.ListConcepts(ask(labels={"suite": name, "parity": "odd"}))
    assert [item.name for item in few.concepts] == names[1::2]
    assert not few.next_page_token
    assert [item.name for item in stub.ListConcepts(ask(model="twin")).concepts] == names[6:]
    first = stub.ListConcepts(ask())
    assert violated(lambda: stub.ListConcepts(ask(model="demo", page_token=first.next_page_token))) == "page_token"


def test_a_page_fits_into_any_clients_messages(stub: Stub, name: str) -> None:
    labels = {"suite": name, **{f"label-{number}": "\U0001f50d" * 1024 for number in range(60)}}
    for place in range(10):
        values = np.random.default_rng(place).standard_normal(128).astype(np.float32)
        _register(stub, f"{name}.{place}", vector=_tensor(values), labels=labels)
    found, token = [], "first"
    while token:
        ask = concept_pb2.ListConceptsRequest(labels={"suite": name}, page_token=token.removeprefix("first"))
        page = stub.ListConcepts(ask)
        assert page.ByteSize() < 1.5 * 1024 * 1024
        found += [item.name for item in page.concepts]
        token = page.next_page_token
    assert found == [f"{name}.{place}" for place in range(10)]


# --- models


def test_a_concept_belongs_to_one_models_weights(stub: Stub, name: str) -> None:
    concept = _register(stub, name, [_picture(800)]).concept
    wrong = partial(stub.Explain, request(_scene(), _by_id(concept.id), model="other"))
    code, message, (info,) = refused(wrong, error_details_pb2.ErrorInfo)
    assert (code, info.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "CONCEPT_OF_ANOTHER_MODEL")
    assert "targets[0].concept" in message
    assert "is of model 'demo' or 'twin', not of 'other'" in message
    # Names are looked for in the request's model; the same weights under another name have the same ids.
    code = refused(lambda: stub.Explain(request(_scene(), _by_name(name), model="twin")))[0]
    assert code is grpc.StatusCode.NOT_FOUND
    assert stub.Explain(request(_scene(), _by_id(concept.id), model="twin")).maps
    code, _, (info,) = refused(
        partial(_register, stub, name, [_picture(1)], model_fingerprint=DIGEST), error_details_pb2.ErrorInfo
    )
    assert (code, info.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "CONCEPT_OF_ANOTHER_MODEL")


def test_new_weights_under_an_old_name_are_never_explained_with_old_concepts(tmp_path: Path) -> None:
    def served_as(architecture: str) -> AbstractContextManager[str]:
        (tmp_path / "models.yaml").write_text(
            f"models: [{{name: m, architecture: {architecture}, random_weights: true}}]"
        )
        return served(models_file=tmp_path / "models.yaml", data_dir=tmp_path / "data")

    picture = _picture(0, 160)
    with served_as("test_vit") as address, grpc.insecure_channel(address) as channel:
        old = _register(Stub(channel), "noise", [picture]).concept
        assert Stub(channel).Explain(request(picture, _by_name("noise"))).maps
    with served_as("test_vit2") as address, grpc.insecure_channel(address) as channel:
        stub = Stub(channel)
        code, _, (info,) = refused(
            lambda: stub.Explain(request(picture, _by_name("noise"))), error_details_pb2.ErrorInfo
        )
        assert (code, info.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "CONCEPT_OF_ANOTHER_MODEL")
        new = _register(stub, "noise", [picture], replace=True).concept
        assert (new.version, new.id == old.id) == (2, False)
        assert stub.Explain(request(picture, _by_name("noise"))).maps
        assert stub.GetConcept(concept_pb2.GetConceptRequest(id=old.id)).concept.vector == old.vector


# --- moved from elsewhere


def _exported(concept: concept_pb2.Concept, **changes: Any) -> dict[str, Any]:
    origin = concept_pb2.ConceptOrigin(examples=concept.examples, negatives=concept.negatives)
    return {
        "vector": concept.vector,
        "origin": origin,
        "model_fingerprint": concept.model_fingerprint,
        "preprocessing": concept.preprocessing,
        **changes,
    }


def test_an_import_is_the_same_concept_where_its_images_were_seen(stub: Stub, name: str, tmp_path: Path) -> None:
    pictures = [_picture(seed) for seed in range(900, 904)]
    concept = _register(stub, name, pictures[:3], pictures[3:]).concept
    assert not _register(stub, name, **_exported(concept)).created
    with served(data_dir=tmp_path) as address, grpc.insecure_channel(address) as channel:
        elsewhere = Stub(channel)
        moved = _register(elsewhere, name, **_exported(concept)).concept
        assert (moved.imported, moved.id == concept.id) == (True, False)
        assert (moved.vector, moved.spread) == (concept.vector, pytest.approx(concept.spread))
        assert (list(moved.examples), list(moved.negatives)) == (list(concept.examples), list(concept.negatives))
        assert not _register(elsewhere, name, **_exported(concept)).created
        # It does not keep the images from being registered, and then is what they made.
        seen = _register(elsewhere, "seen", pictures[:3], pictures[3:]).concept
        assert (seen.imported, seen.id) == (False, concept.id)
        assert _register(elsewhere, "again", **_exported(concept)).concept.id == concept.id
        # Nor do two files that say different things pass for each other.
        less = concept_pb2.ConceptOrigin(examples=concept.examples[:2], negatives=concept.negatives)
        other = _register(elsewhere, "less", **_exported(concept, origin=less)).concept
        assert other.id not in {moved.id, concept.id}


def test_a_false_import_never_passes_for_its_images(stub: Stub, name: str) -> None:
    picture = _picture(950)
    honest = _register(stub, f"{name}-honest", [_picture(951)]).concept
    lie = concept_pb2.ConceptExample(digest=hashlib.sha256(picture).hexdigest(), cosine=1)
    wrong = _tensor(-array(honest.vector))
    imported = _register(
        stub, name, **_exported(honest, origin=concept_pb2.ConceptOrigin(examples=[lie]), vector=wrong)
    )
    assert imported.concept.imported
    spec = concept_pb2.ConceptSpec(name=f"{name}-true")
    message = concept_pb2.ConceptRegisterStreamRequest
    messages = [message(spec=spec), message(example=_images([picture])[0]), _end(1)]
    streamed = stub.ConceptRegisterStream(iter(messages), timeout=60).concept
    at_once = _register(stub, f"{name}-true", [picture]).concept
    assert (streamed.imported, streamed.vector == wrong, at_once) == (False, False, streamed)


# --- what is refused


ONES = _tensor(np.ones(128, np.float32))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"name": ""}, "spec.name"),
        ({"name": "a b"}, "spec.name"),
        ({"name": "a" * 129}, "spec.name"),
        ({"name": "ä"}, "spec.name"),
        ({"model": "m" * 257}, "spec.model"),
        ({"description": "d" * 4097}, "spec.description"),
        ({"description": "\0"}, "spec.description"),
        ({"labels": {"": "x"}}, "spec.labels"),
        ({"labels": {"k": "x" * 1025}}, "spec.labels['k']"),
        ({"labels": {"k" * 129: "x"}}, "spec.labels (a key)"),
        ({"labels": {str(number): "x" for number in range(65)}}, "spec.labels"),
        ({"expected_version": 1 << 63}, "spec.expected_version"),
        ({"model_fingerprint": "abc"}, "spec.model_fingerprint"),
        ({"preprocessing": common_pb2.Preprocessing(resize_mode=9)}, "spec.preprocessing.resize_mode"),
        (
            {"preprocessing": common_pb2.Preprocessing(input_size=common_pb2.Size(height=7, width=7))},
            "spec.preprocessing.input_size",
        ),
        ({"vector": ONES}, "spec.vector"),
        ({"origin": concept_pb2.ConceptOrigin()}, "spec.origin"),
    ],
)
def test_a_wrong_specification(stub: Stub, change: dict[str, Any], field: str) -> None:
    assert violated(partial(_register, stub, **{"name": "wrong", "examples": [_picture(0)], **change})) == field


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"vector": _tensor(np.ones(127, np.float32))}, "spec.vector"),
        ({"vector": _tensor(np.zeros(128, np.float32))}, "spec.vector"),
        ({"vector": _tensor(np.full(128, np.nan, np.float32))}, "spec.vector"),
        ({"preprocessing": common_pb2.Preprocessing(resize_mode=1)}, "spec.preprocessing"),
        ({"origin": concept_pb2.ConceptOrigin()}, "spec.model_fingerprint"),
        ({"origin": concept_pb2.ConceptOrigin(), "model_fingerprint": DIGEST}, "spec.origin.examples"),
    ],
)
def test_a_wrong_vector(stub: Stub, change: dict[str, Any], field: str) -> None:
    assert violated(partial(_register, stub, **{"name": "wrong", "vector": ONES, **change})) == field


@pytest.mark.parametrize(
    ("example", "field"),
    [
        (concept_pb2.ConceptExample(digest="x", cosine=1), "spec.origin.examples[0].digest"),
        (concept_pb2.ConceptExample(digest=DIGEST, cosine=1.5), "spec.origin.examples[0].cosine"),
        (concept_pb2.ConceptExample(digest=DIGEST, cosine=float("nan")), "spec.origin.examples[0].cosine"),
    ],
)
def test_a_wrong_origin(stub: Stub, example: concept_pb2.ConceptExample, field: str) -> None:
    origin = concept_pb2.ConceptOrigin(examples=[example])
    call = partial(_register, stub, "wrong", vector=ONES, origin=origin, model_fingerprint=DIGEST)
    assert violated(call) == field


def test_wrong_images(stub: Stub) -> None:
    good, bad = _picture(0), b"no picture"
    assert violated(partial(_register, stub, "wrong")) == "examples"
    assert violated(partial(_register, stub, "wrong", [], [good])) == "examples"
    assert violated(partial(_register, stub, "wrong", [good, good, bad])) == "examples[2].encoded"
    assert violated(partial(_register, stub, "wrong", [good], [bad])) == "negatives[0].encoded"
    assert violated(partial(_register, stub, "wrong", [good] * 61)) == "examples"
    empty = concept_pb2.ConceptRegisterRequest(spec=concept_pb2.ConceptSpec(name="wrong"), examples=[{}] * 1_000_000)
    assert violated(lambda: stub.ConceptRegister(empty, timeout=10)) == "examples"
    # Nothing is left of the difference of equal means.
    assert violated(partial(_register, stub, "wrong", [good], [good])) == "examples"
    code = refused(lambda: stub.GetConcept(concept_pb2.GetConceptRequest(name="wrong")))[0]
    assert code is grpc.StatusCode.NOT_FOUND


def test_wrong_streams(stub: Stub) -> None:
    message = concept_pb2.ConceptRegisterStreamRequest
    spec = message(spec=concept_pb2.ConceptSpec(name="wrong"))
    good, bad = message(example=_images([_picture(0)])[0]), message(negative=_images([b"no picture"])[0])

    def field(*messages: concept_pb2.ConceptRegisterStreamRequest) -> str:
        return violated(lambda: stub.ConceptRegisterStream(iter(messages), timeout=60))

    assert field() == "spec"
    assert field(good) == "spec"
    assert field(spec, _end(0)) == "examples"
    # An upload that was given up can look like this.
    assert field(spec, good) == "end"
    assert field(spec, good, good, _end(1)) == "end.image_count"
    assert field(spec, good, _end(1), good) == "example"
    assert field(spec, good, spec) == "spec"
    assert field(spec, message()) == "payload"
    assert field(spec, good, bad, _end(2)) == "negatives[0].encoded"
    assert field(spec, *[good] * 61) == "examples"
    assert field(message(spec=concept_pb2.ConceptSpec(name="wrong", vector=ONES)), good, _end(1)) == "spec.vector"


def test_no_caller_keeps_others_from_registering(stub: Stub, name: str) -> None:
    spec = concept_pb2.ConceptRegisterStreamRequest(spec=concept_pb2.ConceptSpec(name=name))
    over = threading.Event()

    def silent() -> Iterator[concept_pb2.ConceptRegisterStreamRequest]:
        yield spec
        over.wait()

    begun = [stub.ConceptRegisterStream.future(silent(), timeout=60) for _ in range(2)]
    for call in begun:
        call.initial_metadata()
    call = partial(_register, stub, name, vector=ONES)
    until = time.monotonic() + 10
    while time.monotonic() < until:  # the places are taken a moment after the metadata came
        try:
            call()
        except grpc.RpcError:
            break
    code, message, (info,) = refused(call, error_details_pb2.RetryInfo)
    assert (code, info.retry_delay.seconds) == (grpc.StatusCode.RESOURCE_EXHAUSTED, 1)
    assert "2 registrations of yours" in message
    over.set()
    for upload in begun:
        assert upload.code() is grpc.StatusCode.INVALID_ARGUMENT  # it stopped without an end
    assert call().concept.version == 1


def test_concepts_that_are_not_there(stub: Stub) -> None:
    code, message, (info,) = refused(
        lambda: stub.Explain(request(_scene(), output(1), _by_name("nosuch"))), error_details_pb2.ResourceInfo
    )
    assert (code, info.resource_name) == (grpc.StatusCode.NOT_FOUND, "nosuch")
    assert "targets[1].concept" in message
    assert refused(lambda: stub.Explain(request(_scene(), _by_id(DIGEST))))[0] is grpc.StatusCode.NOT_FOUND
    assert violated(lambda: stub.Explain(request(_scene(), _by_name("no such")))) == "targets[0].concept.name"
    assert violated(lambda: stub.Explain(request(_scene(), _by_id("7")))) == "targets[0].concept.id"
    get, delete = concept_pb2.GetConceptRequest, concept_pb2.DeleteConceptRequest
    assert refused(lambda: stub.GetConcept(get(name="nosuch")))[0] is grpc.StatusCode.NOT_FOUND
    assert refused(lambda: stub.DeleteConcept(delete(name="nosuch", model="demo")))[0] is grpc.StatusCode.NOT_FOUND
    assert violated(lambda: stub.GetConcept(get())) == "selector"
    assert violated(lambda: stub.DeleteConcept(delete(name="nosuch"))) == "model"
    for token in ("x" * 10_000, "x", "!", "W10=", "bnVsbA==", "WzEsMiwzXQ=="):
        page = concept_pb2.ListConceptsRequest(page_token=token)
        assert violated(partial(stub.ListConcepts, page)) == "page_token"


def test_a_server_without_a_place_to_store_serves_all_else(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with served(data_dir=tmp_path / "file" / "data") as address, grpc.insecure_channel(address) as channel:
        stub = Stub(channel)
        code, message, (info,) = refused(partial(_register, stub, "c", [_picture(0)]), error_details_pb2.ErrorInfo)
        assert (code, info.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "STORE_READ_ONLY")
        assert str(tmp_path) not in message
        assert not stub.ListConcepts(concept_pb2.ListConceptsRequest()).concepts
        assert stub.Explain(request(_scene(), output(1))).maps


def test_a_registration_waits_for_room_once_it_has_begun(tmp_path: Path) -> None:
    with served(data_dir=tmp_path, max_pending=2) as address, grpc.insecure_channel(address) as channel:
        stub = Stub(channel)
        concept = _register(stub, "crowded", [_picture(seed) for seed in range(40)]).concept
        assert concept.example_count == 40
        busy = stub.Explain.future(request(_scene(), output(1), methods=[method("token_ablation")] * 2), timeout=60)
        also = stub.Explain.future(request(_scene(), output(2), methods=[method("token_ablation")] * 2), timeout=60)
        codes = set()
        while not (busy.done() or also.done()):
            try:
                _register(stub, f"refused-{next(_numbers)}", [_picture(1000 + next(_numbers))])
            except grpc.RpcError as error:
                codes.add(error.code())
        assert codes == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        assert busy.result().maps


def test_messages_that_wait_are_counted(tmp_path: Path) -> None:
    large = _request("large", [_picture(seed, 1500) for seed in range(2)])  # some 13 MB
    with served(data_dir=tmp_path, max_pending_mib=20) as address, grpc.insecure_channel(address, _LARGE) as channel:
        calls = [Stub(channel).ConceptRegister.future(large, timeout=60) for _ in range(4)]
        codes = {call.code() for call in calls}
        assert codes == {grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED}
        assert Stub(channel).ConceptRegister(large, timeout=60).concept.example_count == 2


def test_a_registration_that_is_given_up_stores_nothing(stub: Stub, name: str) -> None:
    call = stub.ConceptRegister.future(_request(name, [_picture(2000 + seed) for seed in range(60)]), timeout=60)
    call.cancel()
    with pytest.raises(grpc.RpcError, match="DEADLINE_EXCEEDED"):
        _ = stub.ConceptRegister(_request(name, [_picture(2000 + seed) for seed in range(60)]), timeout=0.02)
    code = refused(lambda: stub.GetConcept(concept_pb2.GetConceptRequest(name=name)))[0]
    assert code is grpc.StatusCode.NOT_FOUND
