"""Encoding requests and decoding answers, without a server."""

import dataclasses
import io
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from PIL import Image

import cdam
from cdam._decode import decode_explanation, decode_tensor
from cdam._encode import encode_explain, encode_method, encode_target
from cdam._images import encode_image, open_image
from cdam._methods import as_methods
from cdam._targets import as_targets
from cdam.v1 import common_pb2, explain_pb2, method_pb2, target_pb2
from scripted_server import answer, scores

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (40, 60, 3), np.uint8)
UPRIGHT = 6  # EXIF: turn a quarter clockwise


def _request(targets: Any = 1, methods: Any = (), **fields: Any) -> explain_pb2.ExplainRequest:
    given = {"model": "", "resize": None, "input_size": None, "request_id": "", "priority": None} | fields
    return encode_explain(PIXELS, targets, methods=methods, **given)


def _file(image: Image.Image, kind: str, **settings: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_files_travel_as_they_are(kind: str, tmp_path: Path) -> None:
    data = _file(Image.fromarray(PIXELS), kind)
    path = tmp_path / "image"
    path.write_bytes(data)
    for image in (data, bytearray(data), memoryview(data), path, str(path)):
        assert encode_image(image).encoded == data


@pytest.mark.parametrize("kind", ["BMP", "TIFF", "GIF"])
def test_other_formats_travel_as_pixels(kind: str) -> None:
    image = Image.fromarray(PIXELS).quantize() if kind == "GIF" else Image.fromarray(PIXELS)
    message = encode_image(_file(image, kind))
    np.testing.assert_array_equal(np.asarray(open_image(message)), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("pixels", [PIXELS, PIXELS[..., :1], PIXELS[..., 0], PIXELS[::-1, ::2]])
def test_arrays_travel_as_pixels(pixels: np.ndarray) -> None:
    message = encode_image(pixels)
    raw = message.raw
    sent = np.frombuffer(raw.data, np.uint8).reshape(raw.height, raw.width, raw.channels)
    np.testing.assert_array_equal(sent, pixels.reshape(sent.shape))
    assert open_image(message).mode == "RGB"


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_images_of_any_colours(mode: str) -> None:
    image = Image.fromarray(PIXELS).convert(mode)
    message = encode_image(image)
    assert message.raw.channels == (1 if mode in {"1", "L", "LA"} else 3)
    np.testing.assert_allclose(np.asarray(open_image(message), int), np.asarray(image.convert("RGB"), int), atol=2)


def test_transparency_lies_over_white() -> None:
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (255, 0, 0, 255))
    assert np.asarray(open_image(encode_image(image))).tolist() == [[[255, 255, 255], [255, 0, 0]]]
    assert np.asarray(open_image(encode_image(_file(image, "PNG")))).tolist() == [[[255, 255, 255], [255, 0, 0]]]


def test_images_stand_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = UPRIGHT
    data = _file(Image.fromarray(PIXELS), "PNG", exif=exif)
    upright = np.rot90(PIXELS, -1)
    for image in (data, Image.open(io.BytesIO(data))):
        np.testing.assert_array_equal(np.asarray(open_image(encode_image(image))), upright)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (b"", "not an image"),
        (b"GIF89a and then nothing", "not an image"),
        (PIXELS.astype(float), "uint8"),
        (PIXELS.transpose(2, 0, 1), "shape"),
        (PIXELS[None], "shape"),
        (PIXELS[:0], "shape"),
        (Image.new("F", (2, 2)), "mode 'F'"),
    ],
)
def test_what_is_no_image(image: Any, message: str) -> None:
    with pytest.raises(cdam.ImageError, match=message) as error:
        encode_image(image)
    assert isinstance(error.value, ValueError)


def test_image_errors_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("no image")
    with pytest.raises(cdam.ImageError, match=r"notes\.txt"):
        encode_image(path)
    with pytest.raises(FileNotFoundError):
        encode_image(tmp_path / "nowhere.png")
    with pytest.raises(TypeError, match="not int"):
        encode_image(7)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (7, [cdam.Output(7)]),
        (np.int64(7), [cdam.Output(7)]),
        ("7", [cdam.Output("7")]),
        (cdam.TopK(2), [cdam.TopK(2)]),
        ([7, "cat"], [cdam.Output(7), cdam.Output("cat")]),
        (np.arange(2), [cdam.Output(0), cdam.Output(1)]),
        ((), []),
        (
            cdam.Contrast("cat", 3),
            [cdam.Contrast(cdam.Output("cat"), cdam.Output(3))],
        ),
    ],
)
def test_targets_of_few_words(given: Any, meant: list[cdam.Target]) -> None:
    assert list(as_targets(given)) == meant


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (cdam.Output(0), {"output": {"index": 0}}),
        (cdam.Output("cat"), {"output": {"name": "cat"}}),
        (cdam.TopK(3), {"top_k": {"k": 3}}),
        (cdam.Concept("fur"), {"concept": {"name": "fur", "similarity": 1}}),
        (cdam.Concept(id="c1", similarity="cosine"), {"concept": {"id": "c1", "similarity": 2}}),
        (
            cdam.Concept(vector=[1, 0.5], similarity="l2"),
            {"concept": {"vector": {"shape": [2], "data": b"\0\0\x80\x3f\0\0\0\x3f"}, "similarity": 3}},
        ),
        (
            cdam.Contrast(3, cdam.Concept("fur")),
            {
                "contrast": {
                    "positive": {"output": {"index": 3}},
                    "negative": {"concept": {"name": "fur", "similarity": 1}},
                }
            },
        ),
    ],
)
def test_targets_travel_and_return(target: cdam.Target, message: dict[str, Any]) -> None:
    encoded = encode_target(target)
    assert encoded == target_pb2.Target(**message)
    if not isinstance(target, cdam.TopK):
        decoded = decode_explanation(answer(_request(target)), (), _request(target))
        assert decoded.targets[0].target == target


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: cdam.Output(-1), ValueError),
        (lambda: cdam.Output(True), TypeError),
        (lambda: cdam.Output(1.0), TypeError),
        (lambda: cdam.TopK(0), ValueError),
        (cdam.Concept, ValueError),
        (lambda: cdam.Concept("fur", id="c1"), ValueError),
        (lambda: cdam.Concept(vector=[[1.0]]), ValueError),
        (lambda: cdam.Contrast(1, cdam.TopK(2)), TypeError),
        (lambda: cdam.Noise(relative=1, absolute=1), ValueError),
        (lambda: as_targets([1.5]), TypeError),
        (lambda: as_methods("cdamn"), ValueError),
        (lambda: as_methods([7]), TypeError),
        (lambda: _request(resize="stretch"), ValueError),
        (lambda: _request(priority="urgent"), ValueError),
        (lambda: _request(cdam.Concept("fur", similarity="l1")), ValueError),
        (lambda: _request(methods=cdam.IntegratedCdam(quadrature="simpson")), ValueError),
    ],
)
def test_contradictions_are_found_before_anything_is_sent(make: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        make()


def test_an_unknown_word_is_answered_with_those_there_are() -> None:
    with pytest.raises(ValueError, match="'model', 'squash'"):
        _request(resize="stretch")


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (cdam.Cdam(), {"cdam": {}}),
        (cdam.Cdam(parts=True), {"cdam": {"parts": True}}),
        (cdam.SmoothCdam(), {"smooth_cdam": {}}),
        (
            cdam.SmoothCdam(samples=9, noise=cdam.Noise(relative=0.1), seed=3),
            {"smooth_cdam": {"samples": 9, "noise": {"relative": 0.1}, "seed": 3}},
        ),
        (cdam.SmoothGrad(noise=cdam.Noise(absolute=0)), {"smooth_grad": {"noise": {"absolute": 0}}}),
        (cdam.SmoothGrad(noise=cdam.Noise()), {"smooth_grad": {"noise": {}}}),
        (
            cdam.IntegratedCdam(steps=8, quadrature="gauss_legendre", tolerance=0.0),
            {"integrated_cdam": {"steps": 8, "quadrature": 2, "tolerance": 0.0}},
        ),
        (cdam.IntegratedGradients(steps=1), {"integrated_gradients": {"steps": 1, "quadrature": 1}}),
        (cdam.Attention(heads=(0, 2)), {"attention": {"heads": [0, 2]}}),
        (cdam.TokenAblation(), {"token_ablation": {}}),
    ],
)
def test_methods_travel(method: cdam.Method, message: dict[str, Any]) -> None:
    assert encode_method(method) == method_pb2.Method(**message)


def test_every_method_of_the_api_is_there() -> None:
    kinds = {field.name: field for field in method_pb2.Method.DESCRIPTOR.fields}
    assert set(cdam.METHODS) == set(kinds) == set(get_args(cdam.MethodKind))
    for name, method in cdam.METHODS.items():
        assert {field.name for field in dataclasses.fields(method)} == {f.name for f in kinds[name].message_type.fields}
        assert encode_method(method()).WhichOneof("kind") == name


def test_what_is_not_said_is_not_set() -> None:
    request = _request()
    assert not request.HasField("preprocessing")
    assert (request.priority, list(request.methods)) == (0, [])


def test_an_answer_in_full() -> None:
    request = _request([1], [cdam.Cdam(parts=True), "smooth_cdam", "attention"])
    response = answer(request)
    first, second, third = response.maps
    first.prefix_share = 0.25
    first.parts.value.CopyFrom(first.scores)
    first.parts.key.CopyFrom(second.scores)
    second.standard_error.CopyFrom(first.scores)
    second.completeness_residual = 0.0
    second.steps = 50
    third.ClearField("target_index")
    explanation = decode_explanation(response, as_methods([cdam.Cdam(parts=True), "smooth_cdam", "attention"]), request)
    one, two, three = explanation
    assert (explanation.patch_grid, explanation.image_size, explanation.input_size) == ((2, 3), (40, 60), (32, 48))
    assert explanation.region == cdam.Region(0, 0, 60, 40)
    assert (explanation.timing.total, explanation.timing.trunk, explanation.timing.queue) == (0.012, 1.5, 0.0)
    assert (explanation.fingerprint, explanation.token_cache_hit) == ("f00d", True)
    np.testing.assert_array_equal(one.scores, scores(0))
    assert one.scores.dtype == np.float32
    assert not one.scores.flags.writeable
    assert one.prefix_share == 0.25
    assert one.parts is not None
    np.testing.assert_array_equal(one.parts.key, scores(1))
    assert (one.standard_error, one.completeness_residual, one.steps) == (None, None, None)
    assert (two.prefix_share, two.parts, two.completeness_residual, two.steps) == (None, None, 0.0, 50)
    np.testing.assert_array_equal(two.standard_error, scores(0))
    assert (three.target, three.label, three.method) == (None, "", cdam.Attention())
    assert one.target is explanation.targets[0]
    assert (one.target.value, one.target.probability, one.target.output_index) == (1.5, 0.25, 1)


def test_maps_go_by_label() -> None:
    request = _request(["cat", "dog"], ["cdam", "smooth_cdam"])
    explanation = decode_explanation(answer(request), as_methods(["cdam", "smooth_cdam"]), request)
    assert explanation["dog", "cdam"] is explanation.maps[1]
    with pytest.raises(KeyError, match="2 maps"):
        explanation["dog"]
    with pytest.raises(KeyError, match="0 maps"):
        explanation["bird"]


def _spoil(**changes: Any) -> explain_pb2.ExplainResponse:
    response = answer(_request())
    for name, value in changes.items():
        setattr(response.maps[0], name, value)
    return response


def _without(field: str) -> explain_pb2.ExplainResponse:
    response = answer(_request())
    response.ClearField(field)
    return response


def _short() -> explain_pb2.ExplainResponse:
    response = answer(_request())
    response.maps[0].scores.data = b"\0" * 20
    return response


def _other_shape() -> explain_pb2.ExplainResponse:
    response = answer(_request())
    response.maps[0].scores.shape[:] = [3, 2]
    return response


def _endless() -> explain_pb2.ExplainResponse:
    response = answer(_request())
    response.geometry.region.right = 0
    return response


def _of_another_target(**fields: Any) -> explain_pb2.ExplainResponse:
    response = answer(_request())
    response.targets[0].ClearField("target")
    response.targets[0].MergeFrom(explain_pb2.ExplainedTarget(**fields))
    return response


@pytest.mark.parametrize(
    "response",
    [
        _spoil(method_index=1),
        _spoil(target_index=1),
        _without("geometry"),
        _short(),
        _other_shape(),
        _endless(),
        _of_another_target(request_index=1),
        _of_another_target(target=target_pb2.Target()),
        _of_another_target(target=target_pb2.Target(concept=target_pb2.ConceptTarget())),
    ],
)
def test_answers_that_contradict_themselves(response: explain_pb2.ExplainResponse) -> None:
    with pytest.raises(cdam.MalformedResponse):
        decode_explanation(response, (), _request())


def test_a_vector_that_the_server_does_not_repeat_is_the_one_that_was_sent() -> None:
    concept = cdam.Concept(vector=[1, 0.5], similarity="cosine")
    request = _request([concept, cdam.Contrast(3, concept)])
    response = answer(request)
    response.targets[0].target.concept.ClearField("vector")
    response.targets[1].target.contrast.negative.concept.ClearField("vector")
    explained = decode_explanation(response, (), request).targets
    assert [item.target for item in explained] == [concept, cdam.Contrast(cdam.Output(3), concept)]


def test_targets_may_be_left_out_if_no_method_needs_one() -> None:
    assert not _request((), ["attention", cdam.AttentionRollout()]).targets
    for methods in ((), ["attention", "cdam"], "token_ablation"):
        with pytest.raises(ValueError, match="needs a target"):
            _request((), methods)
    needless = {name for name, method in cdam.METHODS.items() if not method.needs_target}
    assert needless == {"attention", "attention_rollout"}


def test_tensors_may_have_any_shape() -> None:
    assert decode_tensor(common_pb2.FloatTensor(shape=[0], data=b"")).shape == (0,)
    with pytest.raises(cdam.MalformedResponse):
        decode_tensor(common_pb2.FloatTensor(data=b""))


def test_newer_servers_words_are_unknown() -> None:
    from cdam._decode import decode_model
    from scripted_server import model

    message = model("first")
    message.task = 99
    message.methods.add(method=99, supported=True)
    decoded = decode_model(message)
    assert (decoded.task, decoded.methods) == ("unknown", ("cdam", "unknown"))
    assert hash(decoded)
