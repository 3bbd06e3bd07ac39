"""Settings of models as people write them: labels that YAML takes for something else, and words for what is wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cdam_server.compute.loading import LoadError, load_models_file
from cdam_server.settings.plain_yaml import read_yaml
from cdam_server.settings.specs import ModelSpec, check_files


def models(folder: Path, *lines: str) -> list[ModelSpec]:
    path = folder / "models.yaml"
    indented = "\n".join(f"    {line}" for line in lines)
    path.write_text(
        f"models:\n  - name: m\n    architecture: vit_tiny_patch16_224\n    random_weights: true\n{indented}\n"
    )
    return load_models_file(path)


def complaint(folder: Path, *lines: str) -> str:
    with pytest.raises(LoadError) as caught:
        models(folder, *lines)
    said = str(caught.value).replace(str(folder), "")
    assert "\n" not in said
    assert len(said) < 400
    assert "lax-or-strict" not in said
    return said


@pytest.mark.parametrize(
    "labels",
    [
        ["no", "yes"],  # huggingface_hub#797, docker/docs#21378
        ["on", "off"],
        ["y", "N", "True", "FALSE"],  # kirby#1024
        ["null", "~", "none"],
        ["0", "1", "2"],
        ["2024-05-01", "2024-05-02"],
        ["1e3", "0x10", "1_000", "012", "1.50", ".5", "1:30"],
        ["NO", "SE"],  # r-lib/yaml#93
    ],
)
def test_labels_are_as_they_are_written(labels: list[str], tmp_path: Path) -> None:
    assert models(tmp_path, f"outputs: [{', '.join(labels)}]")[0].outputs == labels
    assert models(tmp_path, "outputs:", *(f"- {label}" for label in labels))[0].outputs == labels


def test_names_of_models_too(tmp_path: Path) -> None:
    (tmp_path / "models.yaml").write_text("models: [{name: no, architecture: demo}, {name: 007, architecture: demo}]")
    assert [spec.name for spec in load_models_file(tmp_path / "models.yaml")] == ["no", "007"]


def test_labels_behind_an_alias(tmp_path: Path) -> None:
    (tmp_path / "models.yaml").write_text(
        "models:\n"
        "  - &first {name: a, architecture: vit_tiny_patch16_224, random_weights: true, outputs: [no, yes]}\n"
        "  - {<<: *first, name: b}\n"
    )
    assert [spec.outputs for spec in load_models_file(tmp_path / "models.yaml")] == [["no", "yes"]] * 2


def test_numbers_without_a_point(tmp_path: Path) -> None:
    """pyyaml#173, skll#318, ViP#8: 1e-5 is read as text."""
    spec = models(tmp_path, "model_kwargs: {init_values: 1e-5, drop_rate: 1E-1, depth: 2, qkv_bias: no}")[0]
    assert spec.model_kwargs == {"init_values": 1e-5, "drop_rate": 0.1, "depth": 2, "qkv_bias": False}


def test_a_setting_that_is_there_twice(tmp_path: Path) -> None:
    assert "'outputs' is there twice" in complaint(tmp_path, "outputs: [a]", "outputs: [b]")


def test_a_label_that_is_no_text(tmp_path: Path) -> None:
    said = complaint(tmp_path, "outputs: [cat: animal, dog]")
    assert "outputs[0]" in said
    assert "quotes" in said


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("outptus: [a]", ["outptus: there is no such setting; is it outputs"]),
        ("outputs: {a: 0}", ["outputs: must be a list of names, a file"]),
        ("preprocessing: {mena: [1, 1, 1]}", ["preprocessing.mena: there is no such setting; is it mean"]),
        ("preprocessing: 3", ["preprocessing: must be settings"]),
        ("num_outputs: -1", ["num_outputs: must be greater than or equal to 0, not -1"]),
        ("num_outputs: many", ["num_outputs: must be a whole number, not 'many'"]),
        ("task: guess", ["task: must be 'multi_class'", "not 'guess'"]),
        ("input_size: 224", ["input_size: must be a list, not 224"]),
        ("dynamic_img_size: perhaps", ["dynamic_img_size: must be true or false, not 'perhaps'"]),
        ("model_kwargs: [1]", ["model_kwargs: must be settings"]),
        ("pretrained: true", ["give one source of weights"]),
    ],
)
def test_what_is_wrong_in_words_for_people(line: str, words: list[str], tmp_path: Path) -> None:
    said = complaint(tmp_path, line)
    assert all(word in said for word in words), said


def test_a_file_that_is_no_yaml(tmp_path: Path) -> None:
    said = complaint(tmp_path, "outputs: [a")
    assert "line" in said


def test_an_empty_document_is_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert read_yaml(tmp_path / "empty.yaml") is None


def test_every_model_is_looked_at_before_the_first_is_built(tmp_path: Path) -> None:
    (tmp_path / "models.yaml").write_text(
        "models:\n"
        "  - {name: good, architecture: vit_giant_patch14_224, random_weights: true}\n"
        "  - {name: bad, architecture: vit_tiny_patch16_224, random_weights: true, outputs: classes.txt}\n"
    )
    with pytest.raises(LoadError, match=r"model 'bad': outputs: there is no file .*classes\.txt"):
        check_files(load_models_file(tmp_path / "models.yaml"))


@pytest.mark.parametrize("setting", ["outputs", "head", "checkpoint"])
def test_a_file_that_is_not_there_is_found_before_torch_is_imported(setting: str, tmp_path: Path) -> None:
    missing = tmp_path / ("names.txt" if setting == "outputs" else "w.safetensors")
    weights = [] if setting == "checkpoint" else ["--random-weights"]
    script = (
        "import sys\n"
        "from cdam_cli import main\n"
        "try:\n"
        "    main(standalone_mode=False)\n"
        "except Exception as error:\n"
        "    print(error)\n"
        "    print('torch' in sys.modules, 'timm' in sys.modules)\n"
    )
    flags = ["--model", "vit_tiny_patch16_224", *weights, f"--{setting}", str(missing)]
    done = subprocess.run(
        [sys.executable, "-c", script, "serve", *flags], capture_output=True, text=True, timeout=120, check=True
    )
    said, imported = done.stdout.strip().rsplit("\n", 1)
    assert f"{setting}: there is no file {missing}" in said
    assert imported == "False False"
