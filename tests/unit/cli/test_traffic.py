"""The requests that `cdam bench` sends."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import cdam
from cdam._encode import encode_explain
from cdam.v1 import explain_pb2
from cdam_cli.traffic import Kind, Requests, pictures

TOP = Kind(targets=(cdam.TopK(1),), methods=())
PLENTY = Kind((cdam.Output("7"), cdam.Output(3)), (cdam.Cdam(), cdam.SmoothCdam(samples=4)), "demo", "low", weight=3)


def _sent(requests: Requests, count: int) -> list[explain_pb2.ExplainRequest]:
    return [explain_pb2.ExplainRequest.FromString(requests[number]) for number in range(count)]


def test_they_are_what_the_client_sends(tmp_path: Path) -> None:
    Image.new("RGB", (9, 5), "teal").save(tmp_path / "file.png")
    Image.new("RGB", (9, 5), "teal").save(tmp_path / "file.bmp")  # travels as raw pixels
    images = [tmp_path / "file.png", tmp_path / "file.bmp"]
    for kind in (TOP, PLENTY):
        requests = Requests([kind], images, fresh=False, seed=0)
        for number, sent in enumerate(_sent(requests, 4)):
            image = images[number % 2]
            assert sent == encode_explain(image, **kind.request, resize=None, input_size=None, request_id="")
    assert requests.path == "/cdam.v1.ExplainerService/Explain"
    assert requests.decode(b"") == explain_pb2.ExplainResponse()


def test_a_mixture_comes_by_its_weights() -> None:
    requests = Requests([TOP, PLENTY], pictures(3, (8, 8), 0), fresh=False, seed=1)
    numbers = np.arange(4000)
    kinds = requests.kinds(numbers)
    assert kinds.mean() == pytest.approx(0.75, abs=0.03)
    assert [len(sent.targets) for sent in _sent(requests, 50)] == [(1, 2)[kind] for kind in kinds[:50]]
    again = Requests([TOP, PLENTY], pictures(3, (8, 8), 0), fresh=False, seed=1)
    np.testing.assert_array_equal(kinds, again.kinds(numbers))


@pytest.mark.parametrize("fill", ["photo", "teal"])
def test_fresh_images_are_never_the_same(fill: str, tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    if fill == "photo":
        path.write_bytes(pictures(1, (16, 24), 0)[0])
    else:
        Image.new("RGB", (24, 16), fill).save(path)
    with Image.open(path) as image:
        original = np.asarray(image.convert("RGB")).astype(int)
    runs = [Requests([TOP], [path, path], fresh=True, seed=0) for _ in range(2)]
    sent = [request.image.raw for requests in runs for request in _sent(requests, 200)]
    assert len({raw.data for raw in sent}) == 400
    assert {(raw.height, raw.width, raw.channels) for raw in sent} == {(16, 24, 3)}
    for number, raw in enumerate(sent[:200]):
        pixels = np.frombuffer(raw.data, np.uint8).reshape(-1, 3)
        shifted = np.roll(pixels, number // 2, axis=0).reshape(original.shape)
        assert np.abs(shifted - original).max() <= 1


def test_pictures_are_jpegs_of_the_size_asked_for() -> None:
    files = pictures(4, (24, 40), 7)
    assert len(set(files)) == 4
    assert files == pictures(4, (24, 40), 7)
    assert files != pictures(4, (24, 40), 8)
    for file in files:
        with Image.open(io.BytesIO(file)) as image:
            assert (image.format, image.size) == ("JPEG", (40, 24))


def test_a_kind_in_words() -> None:
    assert str(TOP) == "-t top:1"
    assert str(PLENTY) == "-t 7 -t '#3' -m cdam -m smooth_cdam:samples=4 --model demo --priority low"
    assert PLENTY.to_json() == {
        "targets": ["7", "#3"],
        "methods": ["cdam", "smooth_cdam:samples=4"],
        "model": "demo",
        "priority": "low",
        "weight": 3,
    }
