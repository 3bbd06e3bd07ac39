"""Where weights come from: timm's own folders and the hub's repositories, as architecture and as checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
from click.testing import CliRunner
from safetensors.torch import load_file
from torch import nn

from cdam_cli import main
from cdam_server.compute.loading import LoadError, ModelSpec, load_model, load_models_file
from cdam_server.settings.specs import check_files
from small_models import ARCHITECTURE, difference, vit

ARGUMENTS = {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2}


@pytest.fixture
def folder(tmp_path: Path) -> tuple[Path, nn.Module]:
    """As timm writes it (pytorch-image-models#2476, #2067)."""
    model, path = vit(), tmp_path / "lesions"
    timm.models.save_for_hf(
        model,
        str(path),
        model_config={"label_names": ["no", "yes", "?"]},
        model_args=ARGUMENTS,
        safe_serialization=True,
    )
    return path, model


def test_paths_in_a_models_file_are_relative_to_it(folder: tuple[Path, nn.Module], tmp_path: Path) -> None:
    _, model = folder
    models = [
        {"name": "whole", "architecture": "local-dir:lesions"},
        {"name": "part", "architecture": ARCHITECTURE, "checkpoint": "local-dir:lesions", "model_kwargs": ARGUMENTS},
    ]
    (tmp_path / "models.yaml").write_text(json.dumps({"models": models}))
    specs = load_models_file(tmp_path / "models.yaml")
    check_files(specs)
    whole, part = (load_model(spec) for spec in specs)
    assert difference(whole, model) == difference(part, model) == 0
    assert whole.output_names == ("no", "yes", "?")
    assert part.output_names == ()  # a checkpoint is weights alone


def test_on_the_command_line(folder: tuple[Path, nn.Module]) -> None:
    done = CliRunner().invoke(main, ["check", "--model", f"local-dir:{folder[0]}", "--json"])
    assert done.exit_code == 0, done.output
    (found,) = json.loads(done.stdout)
    assert (found["name"], found["outputs"], found["input size"]) == ("lesions", 3, [32, 32])


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    spec = ModelSpec(name="m", architecture=f"local-dir:{tmp_path}/nowhere")
    for look in (lambda: check_files([spec]), lambda: load_model(spec)):
        with pytest.raises(LoadError, match=r"nowhere"):
            look()


def test_a_folder_without_weights(folder: tuple[Path, nn.Module]) -> None:
    (folder[0] / "model.safetensors").unlink()
    for file in folder[0].glob("*.bin"):
        file.unlink()
    with pytest.raises(LoadError, match=r"neither model\.safetensors nor"):
        load_model(ModelSpec(name="m", architecture=f"local-dir:{folder[0]}"))


def test_a_repository_as_a_checkpoint(folder: tuple[Path, nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    path, model = folder
    asked = []

    def fetch(name: str, **_: Any) -> Any:
        asked.append(name)
        return load_file(path / "model.safetensors")

    monkeypatch.setattr("timm.models.load_state_dict_from_hf", fetch)
    spec = ModelSpec(name="m", architecture=ARCHITECTURE, checkpoint=Path("hf-hub:org/lesions"), model_kwargs=ARGUMENTS)
    check_files([spec])
    loaded = load_model(spec)
    assert (difference(loaded, model), asked, loaded.weights.source) == (0, ["org/lesions"], "hf-hub:org/lesions")


def test_a_repository_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route to host\nmore")

    monkeypatch.setattr("timm.models.load_state_dict_from_hf", fail)
    spec = ModelSpec(name="m", architecture=ARCHITECTURE, checkpoint=Path("hf-hub:org/lesions"))
    with pytest.raises(
        LoadError, match=r"checkpoint: .*org/lesions did not come from the hub .*no route to host\)"
    ) as caught:
        load_model(spec)
    assert "more" not in caught.value.message


@pytest.mark.parametrize("extra", [{"pretrained": True}, {"checkpoint": "w.safetensors"}, {"random_weights": True}])
def test_a_folder_brings_its_weights(extra: dict[str, Any], folder: tuple[Path, nn.Module], tmp_path: Path) -> None:
    """Another source takes its place; `pretrained` says what is so anyway."""
    if "checkpoint" in extra:
        timm.models.save_for_hf(vit(seed=2), str(tmp_path / "other"), model_args=ARGUMENTS, safe_serialization=True)
        extra = {"checkpoint": tmp_path / "other" / "model.safetensors"}
    loaded = load_model(ModelSpec(name="m", architecture=f"local-dir:{folder[0]}", **extra))
    if "pretrained" in extra:
        assert difference(loaded, folder[1]) == 0
    elif "checkpoint" in extra:
        assert difference(loaded, vit(seed=2)) == 0
    else:
        assert difference(loaded, folder[1]) > 0
