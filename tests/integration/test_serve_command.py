"""`cdam serve` as an operator meets it: a process, its log, its admin port, its complaints."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from importlib.resources import files
from pathlib import Path

import grpc
import pytest

from calls import method
from cdam.v1 import common_pb2, explain_pb2, explainer_service_pb2_grpc, target_pb2
from processes import ServerProcess, free_ports, serving

SCENE = (files("cdam_server.demo") / "assets" / "samples" / "scene1.png").read_bytes()


def _request(**fields: object) -> explain_pb2.ExplainRequest:
    target = target_pb2.Target(output=target_pb2.OutputTarget(index=3))
    return explain_pb2.ExplainRequest(image=common_pb2.Image(encoded=SCENE), targets=[target], **fields)


def _calls(server: ServerProcess) -> list[dict[str, object]]:
    return [line for line in server.log_lines() if line["event"] == "rpc"]


def test_log_metrics_and_probes(tmp_path: Path) -> None:
    with serving(tmp_path / "log") as server:
        with grpc.insecure_channel(server.address) as channel:
            stub = explainer_service_pb2_grpc.ExplainerServiceStub(channel)
            stub.Explain(_request(request_id="abc"))
            stub.Explain(_request(methods=[method("cdam"), method("attention"), method("cdam", parts=True)]))
            stub.Explain(_request(methods=[method("input_x_gradient")]))
            with pytest.raises(grpc.RpcError):
                stub.Explain(_request(model="nobody"))
        until = time.monotonic() + 30
        while len(_calls(server)) < 4 and time.monotonic() < until:  # a call is booked when its caller has been told
            time.sleep(0.05)
        assert server.get("/livez")[0] == server.get("/readyz")[0] == 200
        assert server.get("/nothing")[0] == 404
        metrics = server.get("/metrics")[1]
    for line in (
        'grpc_server_handled_total{code="OK",method="Explain"} 3.0',
        'grpc_server_handled_total{code="NOT_FOUND",method="Explain"} 1.0',
        'grpc_server_handling_seconds_count{method="Explain"} 4.0',
        'cdam_request_failures_total{reason="NOT_FOUND"} 1.0',
        'cdam_queue_duration_seconds_count{model="demo"} 3.0',
        'cdam_compute_duration_seconds_count{method="",model="demo",stage="decode"} 3.0',
        'cdam_compute_duration_seconds_count{method="",model="demo",stage="trunk"} 1.0',  # the image was known
        'cdam_compute_duration_seconds_count{method="cdam",model="demo",stage="tail"} 2.0',
        'cdam_compute_duration_seconds_count{method="attention",model="demo",stage="tail"} 1.0',
        'cdam_compute_duration_seconds_count{method="input_x_gradient",model="demo",stage="tail"} 1.0',
        'cdam_batch_size_count{model="demo"} 3.0',
        'cdam_token_cache_misses_total{model="demo"} 1.0',
        'cdam_token_cache_hits_total{model="demo"} 1.0',
        "cdam_pending_requests 0.0",
    ):
        assert line in metrics, metrics
    calls = _calls(server)
    assert [(line["method"], line["code"]) for line in calls] == [("Explain", "OK")] * 3 + [("Explain", "NOT_FOUND")]
    assert (calls[0]["request_id"], calls[0]["methods"]) == ("abc", ["cdam"])
    assert calls[1]["methods"] == ["cdam", "attention", "cdam"]
    assert "nobody" in str(calls[3]["error"])


def test_what_a_batch_costs_is_booked_once(tmp_path: Path) -> None:
    count = 24
    with serving(tmp_path / "log", "--token-cache-mib", "0") as server:
        with grpc.insecure_channel(server.address) as channel:
            stub = explainer_service_pb2_grpc.ExplainerServiceStub(channel)
            futures = [stub.Explain.future(_request()) for _ in range(count)]
            batches = sum(1 / future.result().timing.batch_size for future in futures)
        lines = server.get("/metrics")[1].splitlines()
    metrics = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert float(metrics['cdam_batch_size_sum{model="demo"}']) == count
    assert batches < count
    assert float(metrics['cdam_batch_size_count{model="demo"}']) == pytest.approx(batches)
    for labels in ('method="",model="demo",stage="trunk"', 'method="cdam",model="demo",stage="tail"'):
        assert float(metrics[f"cdam_compute_duration_seconds_count{{{labels}}}"]) == pytest.approx(batches)
    assert not any(name.startswith("cdam_token_cache_hits_total") for name in metrics)


def _serve(*flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cdam_cli", "serve", *flags],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, **environment},
    )


def test_flags_win_over_the_environment_and_the_environment_over_the_file(tmp_path: Path) -> None:
    from cdam_server.settings.config import Settings

    file = tmp_path / "settings.yaml"
    file.write_text("max_batch_size: 2\nmax_pending: 3\nmax_targets: 4\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CDAM_MAX_PENDING", "30")
        patch.setenv("CDAM_MAX_TARGETS", "40")
        settings = Settings.load(file, max_targets=400, max_batch_size=None)
    assert (settings.max_batch_size, settings.max_pending, settings.max_targets) == (2, 30, 400)


@pytest.mark.parametrize(
    ("flags", "environment", "words"),
    [
        (["--model", "vit_of_the_future", "--random-weights"], {}, ["vit_of_the_future"]),
        (["--device", "abacus"], {}, ["abacus"]),
        ([], {"CDAM_MAX_BATCH_SIZE": "many"}, ["max_batch_size"]),
        (["--model", "vit_tiny_patch16_224", "--models-file", "README.md"], {}, ["models"]),
    ],
)
def test_a_wrong_setting_ends_in_one_clear_line(
    flags: list[str], environment: dict[str, str], words: list[str]
) -> None:
    done = _serve(*flags, **environment)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert all(word in done.stderr for word in words), done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="on others torch looks for a compiler elsewhere")
def test_without_a_compiler_compiling_ends_in_one_clear_line(tmp_path: Path) -> None:
    api, admin = free_ports(2)
    flags = ("--compile", "--address", f"127.0.0.1:{api}", "--admin-address", f"127.0.0.1:{admin}")
    done = _serve(*flags, CXX="/nowhere", TORCHINDUCTOR_CACHE_DIR=str(tmp_path), CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "model 'demo' can't be compiled (compile)" in done.stderr.splitlines()[-1]


def test_a_misspelled_variable_is_named_in_the_log(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CDAM_MAX_BACH_SIZE", "2")
        with serving(tmp_path / "log") as server:
            (warning,) = (line for line in server.log_lines() if line["event"] == "unknown environment variable")
    assert (warning["level"], warning["name"], warning["similar"]) == (
        "warning",
        "CDAM_MAX_BACH_SIZE",
        "CDAM_MAX_BATCH_SIZE",
    )


def test_an_unknown_key_in_the_settings_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("max_bach_size: 2\n")
    done = _serve("--config", str(file))
    assert done.returncode == 2
    assert "max_bach_size" in done.stderr


def test_a_taken_port_is_named(tmp_path: Path) -> None:
    with serving(tmp_path / "log") as server:
        done = _serve("--address", server.address, "--admin-address", f"127.0.0.1:{free_ports(1)[0]}")
    assert done.returncode == 1
    assert server.address in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("architecture", ["resnet50", "convnext_tiny", "swin_tiny_patch4_window7_224"])
@pytest.mark.parametrize("weights", ["--pretrained", "--checkpoint"])
def test_what_is_no_vit_is_named_before_its_weights(architecture: str, weights: str, tmp_path: Path) -> None:
    (tmp_path / "damaged.pth").write_bytes(b"nobody reads this")
    flags = [weights] if weights == "--pretrained" else [weights, str(tmp_path / "damaged.pth")]
    done = _serve("--model", architecture, *flags)
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("Error:")]
    assert f"no model can be explained, so there is nothing to serve: '{architecture}'" in line
    assert "it is a convolutional network" in line or "it is hierarchical" in line


def test_a_server_that_could_explain_nothing_ends(tmp_path: Path) -> None:
    (tmp_path / "models.yaml").write_text(
        "models:\n"
        "  - {name: mixed, architecture: test_mambaout, random_weights: true}\n"
        "  - {name: cross, architecture: crossvit_tiny_240, random_weights: true}\n"
    )
    done = _serve("--models-file", str(tmp_path / "models.yaml"))
    assert done.returncode == 1
    assert "'mixed'" in done.stderr
    assert "'cross'" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_log_tells_how_far_the_warm_up_is(tmp_path: Path) -> None:
    (tmp_path / "models.yaml").write_text(
        "models:\n"
        "  - {name: first, architecture: demo}\n"
        "  - {name: second, architecture: vit_tiny_patch16_224, random_weights: true, input_size: [32, 32],\n"
        "     model_kwargs: {depth: 1, embed_dim: 32, num_heads: 2}}\n"
        "  - {name: resnet, architecture: test_resnet, random_weights: true}\n"
    )
    with serving(tmp_path / "log", "--models-file", str(tmp_path / "models.yaml")) as server:
        lines = server.log_lines()
    events = [(line["event"], line.get("model"), line.get("number"), line.get("of")) for line in lines]
    assert ("warming up", "first", 1, 2) in events
    assert ("warm", "second", 2, 2) in events
    batches = [(line["model"], line["batch_size"], line["input_size"]) for line in lines if line["event"] == "warmed"]
    assert {batch[::2] for batch in batches} == {("first", "64 x 64"), ("second", "32 x 32")}
    assert next(size for model, size, _ in batches if model == "first") == 1
    assert len(batches) == 4
    (refused,) = [line for line in lines if line["event"] == "model can't be explained"]
    assert refused["model"] == "resnet"
