"""`cdam explain` and `cdam models` against a scripted server."""

import json
from collections.abc import Callable
from pathlib import Path

import click
import grpc
import numpy as np
import pytest
import skimage.measure
from click.testing import CliRunner, Result
from google.rpc import error_details_pb2 as details
from numpy.typing import NDArray
from PIL import Image

import cdam
from cdam_cli.explain import explain
from cdam_cli.failures import describe
from cdam_cli.models import models
from cdam_cli.spelling import parse_method, parse_size, parse_target, spelled
from scripted_server import Failure, Script, scores

Run = Callable[..., Result]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "scene.png"
    Image.new("RGB", (60, 40), "teal").save(path)
    return path


@pytest.fixture
def run(script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CDAM_SERVER", script.address)
    return lambda command, *arguments: CliRunner().invoke(command, [str(a) for a in arguments])


def test_explain_writes_overlays_and_scores(run: Run, script: Script, image: Path, tmp_path: Path) -> None:
    result = run(explain, image, "-t", "7", "-t", "top:2", "-m", "cdam", "-o", tmp_path / "out")
    assert (result.exit_code, result.stderr) == (0, "")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "scene.0.cdam.png",
        "scene.1.cdam.png",
        "scene.7.cdam.png",
        "scene.json",
    ]
    saved = json.loads((tmp_path / "out" / "scene.json").read_text())
    assert (saved["patch_grid"], saved["region"]["right"], saved["model"]) == ([2, 3], 60, "first")
    assert saved["maps"][0]["probability"] == 0.25
    np.testing.assert_array_equal(np.float32(saved["maps"][1]["scores"]), scores(1))
    with Image.open(tmp_path / "out" / "scene.7.cdam.png") as overlay:
        assert overlay.size == (540, 360)
    (sent,) = script.requests
    assert [t.WhichOneof("kind") for t in sent.targets] == ["output", "top_k"]
    assert sent.targets[0].output.name == "7"
    assert "first, 2 x 3 patches, 12.0 ms" in result.stdout
    assert "25.0%" in result.stdout
    assert max(map(len, result.stdout.splitlines())) < 200


def test_explain_tells_the_box(run: Run, script: Script, image: Path, tmp_path: Path) -> None:
    """Of 2 x 3 random patches over all of the image."""
    words = (image, "-t", "7", "-t", "0", "-m", "cdam", "-o", tmp_path / "out")
    assert "box:" not in run(explain, *words).stdout
    plain = (tmp_path / "out" / "scene.7.cdam.png").read_bytes()
    saved = json.loads((tmp_path / "out" / "scene.json").read_text())
    assert "box" not in saved["maps"][0]
    result = run(explain, *words, "--box", "0.5", "--sheet")
    assert (result.exit_code, result.stderr) == (0, "")
    assert (tmp_path / "out" / "scene.7.cdam.png").read_bytes() != plain
    saved = json.loads((tmp_path / "out" / "scene.json").read_text())
    for relevance in saved["maps"]:
        expected = expected_box(np.float32(relevance["scores"]), 0.5)
        assert relevance["box"] == expected
        corners = (
            "-" if expected is None else ", ".join(f"{expected[edge]:g}" for edge in ("left", "top", "right", "bottom"))
        )
        assert corners in result.stdout
    assert "box: left, top, right, bottom" in result.stdout
    for wrong in ("0", "1.1", "x"):
        refused = run(explain, image, "--box", wrong)
        assert refused.exit_code == 2
        assert "--box" in refused.stderr


def expected_box(patches: NDArray[np.float32], fraction: float) -> dict[str, float] | None:
    """By Pillow's bilinear enlargement and scikit-image's components."""
    large = np.asarray(Image.fromarray(patches).resize((60, 40), Image.Resampling.BILINEAR))
    if large.max() <= 0:
        return None
    regions = skimage.measure.regionprops(skimage.measure.label(large >= fraction * large.max(), connectivity=2))
    top, left, bottom, right = max(regions, key=lambda region: region.area).bbox
    return {"left": left, "top": top, "right": right, "bottom": bottom}


def test_explain_without_words(run: Run, script: Script, image: Path, tmp_path: Path) -> None:
    assert run(explain, image).exit_code == 0
    assert script.requests[0].targets[0].top_k.k == 1
    assert (tmp_path / "scene.0.cdam.png").exists()


def test_explain_passes_everything_on(run: Run, script: Script, image: Path, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("s3cret\n")
    run(
        explain,
        *(image, "-t", "#3", "-t", "index:4", "-t", "name:top:1", "-m", "smooth_cdam", "--model", "second"),
        *("--resize", "squash", "--input-size", "32x48", "--token-file", "token", "--timeout", "7", "--json"),
    )
    (sent,) = script.requests
    assert [t.output.index or t.output.name for t in sent.targets] == [3, 4, "top:1"]
    assert (sent.model, sent.methods[0].WhichOneof("kind")) == ("second", "smooth_cdam")
    assert (sent.preprocessing.resize_mode, sent.preprocessing.input_size.height) == (2, 32)
    assert script.metadata[0]["authorization"] == "Bearer s3cret"
    assert script.seconds_left[0] < 7.1


def test_minus_makes_contrasts(run: Run, script: Script, image: Path) -> None:
    assert run(explain, image, "-t", "tabby, tabby cat", "-t", "#3", "--minus", "index:4", "--json").exit_code == 0
    sides = [(t.contrast.positive.output, t.contrast.negative.output) for t in script.requests[0].targets]
    assert [(one.name or one.index, other.index) for one, other in sides] == [("tabby, tabby cat", 4), (3, 4)]


def test_methods_with_parameters(run: Run, script: Script, image: Path) -> None:
    chosen = ["smooth_cdam:samples=20,seed=3,noise=0.1", "cdam:parts", "integrated_cdam:quadrature=gauss_legendre"]
    result = run(explain, image, "--json", "-t", "7", *(word for text in chosen for word in ("-m", text)))
    smooth, parts, integrated = script.requests[0].methods
    assert (smooth.smooth_cdam.samples, smooth.smooth_cdam.seed, smooth.smooth_cdam.noise.relative) == (20, 3, 0.1)
    assert parts.cdam.parts
    assert integrated.integrated_cdam.quadrature == 2
    maps = json.loads(result.stdout)["maps"]
    assert maps[0]["parameters"] == {"samples": 20, "noise": {"relative": 0.1, "absolute": None}, "seed": 3}
    assert maps[1]["parameters"] == {"parts": True}


def test_no_target_is_made_up_for_methods_that_need_none(run: Run, script: Script, image: Path) -> None:
    run(explain, image, "--json", "-m", "attention", "-m", "attention_rollout")
    run(explain, image, "--json", "-m", "attention", "-m", "cdam")
    assert [len(sent.targets) for sent in script.requests] == [0, 1]


def test_json_is_a_line_for_each_image_and_writes_nothing(run: Run, image: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.png"
    other.write_bytes(image.read_bytes())
    before = set(tmp_path.iterdir())
    result = run(explain, image, other, image, "--json")
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["image"] for line in lines] == [str(image), str(other)]
    assert lines[0]["maps"][0]["overlay"] is None
    assert set(tmp_path.iterdir()) == before


def test_images_of_the_same_name_keep_their_own_files(run: Run, image: Path, tmp_path: Path) -> None:
    for name in ("other/SCENE.png", "third/scene.png"):
        (tmp_path / name).parent.mkdir()
        Image.new("RGB", (60, 40)).save(tmp_path / name)
    result = run(explain, image, "other/SCENE.png", "third", "-t", "a", "-t", "a", "-o", "out")
    assert result.exit_code == 0
    assert len(list((tmp_path / "out").glob("*.png"))) == 6
    assert len({p.name.lower() for p in (tmp_path / "out").iterdir()}) == 9


def test_file_names_are_tame(run: Run, image: Path, tmp_path: Path) -> None:
    result = run(explain, image, "-t", "../../etc/passwd", "-t", "x" * 300, "-t", "naïve: 50/50?", "-o", "out")
    assert result.exit_code == 0
    names = sorted(p.name for p in (tmp_path / "out").glob("*.png"))
    assert names[0] == "scene._etc_passwd.cdam.png"
    assert names[1] == "scene.naïve_50_50.cdam.png"
    assert all(len(name.encode()) < 255 for name in names)
    assert len(names) == 3


def test_names_that_begin_with_a_dot_or_an_underscore_are_three(run: Run, image: Path, tmp_path: Path) -> None:
    for label in ("loops", ".loops", "_rings", "rings"):
        run(explain, image, "-t", label, "-o", "out")
    names = sorted(p.name for p in (tmp_path / "out").glob("*.png"))
    assert names == [f"scene.{name}.cdam.png" for name in ("_loops", "_rings", "loops", "rings")]


def test_a_sheet_a_shared_scale_and_blocks(run: Run, image: Path, tmp_path: Path) -> None:
    result = run(explain, image, "-t", "a", "-t", "b", "--sheet", "--shared-scale", "--blocks", "-o", "out")
    assert result.exit_code == 0
    with Image.open(tmp_path / "out" / "scene.sheet.png") as sheet:
        assert sheet.width > 500


def test_one_bad_image_does_not_stop_the_others(run: Run, image: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "empty").mkdir()
    result = run(explain, "notes.txt", "nowhere.png", "empty", image, "-o", "out")
    assert result.exit_code == 1
    empty, notes, nowhere = result.stderr.splitlines()
    assert empty == "Error: empty: no JPEG, PNG or WebP file below this folder"
    assert notes.startswith("Error: notes.txt: not an image")
    assert nowhere == "Error: nowhere.png: No such file or directory"
    assert (tmp_path / "out" / "scene.json").exists()


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ("targets[1].top_k.k", "--target top:99: too many"),
        ("methods[0].smooth_cdam.samples", "--method smooth_cdam:samples=900: too many"),
        ("preprocessing.input_size", "--input-size: too many"),
        ("image.encoded", "the image: too many"),
        ("something.new", "something.new: too many"),
    ],
)
def test_wrong_fields_are_named_as_the_command_line_does(
    run: Run, script: Script, image: Path, field: str, said: str
) -> None:
    violation = details.BadRequest.FieldViolation(field=field, description="too many")
    wrong = details.BadRequest(field_violations=[violation])
    script.failures = [Failure(grpc.StatusCode.INVALID_ARGUMENT, "", [wrong])]
    result = run(explain, image, "-t", "a", "-t", "top:99", "-m", "smooth_cdam:samples=900")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == f"Error: {image}: {said}\n"


def test_whatever_is_about_a_field_names_it_as_the_command_line_does(run: Run, script: Script, image: Path) -> None:
    violation = details.BadRequest.FieldViolation(field="targets[1].output.name", description="there is no output 'b'")
    about = [details.BadRequest(field_violations=[violation])]
    what = details.ResourceInfo(resource_type="cdam.v1.output", resource_name="b")
    for code, more in ((grpc.StatusCode.NOT_FOUND, [what]), (grpc.StatusCode.FAILED_PRECONDITION, [])):
        script.failures = [Failure(code, "targets[1].output.name: there is no output 'b'", [*about, *more])]
        result = run(explain, image, "-t", "a", "-t", "b")
        assert (result.exit_code, result.stderr) == (1, "Error: --target b: there is no output 'b'\n")


def test_without_a_server_nothing_is_tried_twice(run: Run, image: Path) -> None:
    result = run(explain, image, image, "--server", "127.0.0.1:1")
    assert result.exit_code == 1
    said = "no server answers there (Connection refused); start one: cdam serve"
    assert result.stderr == f"Error: 127.0.0.1:1: {said}\n"


@pytest.mark.parametrize(
    ("told", "said"),
    [
        (
            "last error: UNKNOWN: ipv6:%5B::1%5D:1: Failed to connect to remote host: connect: Connection refused (111)",
            "no server answers there (Connection refused); start one: cdam serve",
        ),
        (
            "last error: UNKNOWN: unix:/x: Failed to connect to remote host: No such file or directory",
            "no server answers there (No such file or directory); start one: cdam serve",
        ),
        (
            "DNS resolution failed for far:1: C-ares status is not ARES_SUCCESS qtype=A name=far: Domain name not found]",
            "no host has this name",
        ),
        (
            "last error: UNAVAILABLE: ipv4:1.2.3.4:8002: Trying to connect an http1.x server (HTTP status 505)",
            "this port does not serve cdam's API; is it the admin port? The API's is 8001 if it was not told otherwise",
        ),
        ("Ssl handshake failed: WRONG_VERSION_NUMBER: OK", "no server answers there (Ssl handshake failed: {})"),
    ],
)
def test_the_transports_words_are_cut_where_the_systems_say_it(told: str, said: str) -> None:
    error = cdam.Unavailable(told, code=grpc.StatusCode.UNAVAILABLE)
    assert describe(error) == said.format("WRONG_VERSION_NUMBER: OK")


def test_what_is_wrong_with_all_images_is_said_once(run: Run, script: Script, image: Path) -> None:
    script.failures = [Failure(grpc.StatusCode.FAILED_PRECONDITION, "not this model")]
    result = run(explain, image, image, image)
    assert (result.exit_code, result.stderr) == (1, "Error: not this model\n")
    assert len(script.requests) == 1


def test_the_admin_port(run: Run, script: Script, image: Path) -> None:
    script.failures = [Failure(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")]
    assert "is it the admin port?" in run(explain, image).stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-t", "top:0"], "'top:0' wants a whole number from 1"),
        (["-t", "top:many"], "'top:many' wants a whole number"),
        (["-t", "#-1"], "'#-1' wants a whole number from 0"),
        (["-t", "index:"], "'index:' wants a whole number"),
        (["-t", "name:"], "the name is missing"),
        (["-t", ""], "the name is missing"),
        (["-m", "cdamn"], "'cdamn' is no method; there are cdam, smooth_cdam"),
        (
            ["-m", "smooth_cdam:draws=3"],
            "'draws' is no parameter of smooth_cdam; its parameters are samples, noise, seed",
        ),
        (["-m", "token_ablation:steps=3"], "'steps' is no parameter of token_ablation; it has no parameters"),
        (["-m", "smooth_cdam:samples"], "samples wants a whole number"),
        (["-m", "smooth_cdam:samples=-1"], "samples wants a whole number"),
        (["-m", "smooth_cdam:samples=99999999999"], "samples wants a whole number from 0 to 999999999"),
        (["-m", "smooth_cdam:noise=loud"], "noise wants a number"),
        (["-m", "smooth_cdam:noise=some:1"], "noise wants a fraction of the range"),
        (["-m", "integrated_cdam:quadrature=simpson"], "quadrature wants riemann_right or gauss_legendre"),
        (["-m", "attention:heads=0/1"], "heads wants whole numbers with + between them"),
        (["-m", "cdam:parts=maybe"], "parts wants true or false"),
        (["--minus", "7"], "--minus needs a --target"),
        (["-t", "top:2", "--minus", "7"], "--minus needs a --target"),
        (["-t", "7", "--minus", "top:2"], "'top:2' is not one output"),
        (["-t", "7", "--minus", ""], "the name is missing"),
        (["--input-size", "224x"], "not HEIGHTxWIDTH"),
        (["--input-size", "0x5"], "not HEIGHTxWIDTH"),
        (["--resize", "stretch"], "'model', 'squash'"),
        (["--timeout", "0"], "timeout"),
        (["--token", "t", "--server", "far:1"], "refusing to send a token in plaintext"),
        (["--cert", __file__], "--cert and --key go together"),
    ],
)
def test_usage_errors(run: Run, script: Script, image: Path, arguments: list[str], said: str) -> None:
    result = run(explain, image, *arguments)
    assert result.exit_code == 2
    assert said in result.stderr
    assert not script.requests


def test_explain_wants_an_image(run: Run) -> None:
    assert run(explain).exit_code == 2


def test_help_has_examples(run: Run) -> None:
    result = run(explain, "--help")
    assert "cdam explain scene.png --target 7 --target top:3" in result.stdout
    assert all(f"--{name}" in result.stdout for name in ("target", "method", "out", "server", "json", "local", "sheet"))


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("7", cdam.Output("7")),
        ("#7", cdam.Output(7)),
        ("index:7", cdam.Output(7)),
        ("top:3", cdam.TopK(3)),
        ("name:top:3", cdam.Output("top:3")),
        ("name:#7", cdam.Output("#7")),
        ("top hat", cdam.Output("top hat")),
        ("on top: hat", cdam.Output("on top: hat")),
    ],
)
def test_targets(text: str, target: cdam.Target) -> None:
    assert parse_target(text) == target


@pytest.mark.parametrize(
    ("text", "method"),
    [
        ("cdam", cdam.Cdam()),
        ("cdam:", cdam.Cdam()),
        ("cdam:parts=true", cdam.Cdam(parts=True)),
        ("smooth_cdam:samples=3,noise=0.1", cdam.SmoothCdam(samples=3, noise=cdam.Noise(relative=0.1))),
        ("smooth_grad:noise=absolute:2,seed=0", cdam.SmoothGrad(noise=cdam.Noise(absolute=2), seed=0)),
        (
            "integrated_cdam:steps=5,quadrature=gauss_legendre,tolerance=0.001",
            cdam.IntegratedCdam(steps=5, quadrature="gauss_legendre", tolerance=1e-3),
        ),
        ("integrated_gradients:steps=5", cdam.IntegratedGradients(steps=5)),
        ("attention:heads=0+2", cdam.Attention(heads=(0, 2))),
        ("attention:heads=1", cdam.Attention(heads=(1,))),
        *((kind, method()) for kind, method in cdam.METHODS.items()),
    ],
)
def test_methods(text: str, method: cdam.Method) -> None:
    assert parse_method(text) == method
    assert parse_method(spelled(method)) == method


def test_sizes() -> None:
    assert parse_size("224") == (224, 224)
    assert parse_size("224x336") == (224, 336)
    with pytest.raises(click.BadParameter):
        parse_size("-1x2")


def test_models(run: Run) -> None:
    result = run(models)
    assert result.exit_code == 0
    head, first, second, *refusals = result.stdout.splitlines()
    assert head.split() == ["model", "architecture", "task", "outputs", "input", "patches", "methods"]
    assert first.split()[:2] == ["first", "(default)"]
    assert "32 x 48" in second
    assert second.split()[-1] == "cdam"
    assert [line.strip() for line in refusals] == [
        f"{name} does not serve smooth_cdam: not yet" for name in ("first", "second")
    ]


def test_models_as_json(run: Run) -> None:
    first, _ = json.loads(run(models, "--json").stdout)
    assert first["output_names"] == ["cat", "dog"]
    assert first["unsupported"] == {"smooth_cdam": "not yet"}


def test_models_without_a_server(run: Run) -> None:
    result = run(models, "--server", "127.0.0.1:1")
    assert (result.exit_code, len(result.stderr.splitlines())) == (1, 1)
