"""What `cdam evaluate` is made of: datasets, the journal, what samples come to, files and the page; without a server."""

from __future__ import annotations

import csv
import importlib
import json
import math
import re
import shlex
import signal
from collections.abc import Callable, Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from pyarrow import parquet

import cdam
from cdam_cli import evaluate, main
from cdam_cli.evaluation import files
from cdam_cli.evaluation.about import About
from cdam_cli.evaluation.dataset import SCENES_SEED, Dataset, digest, open_dataset
from cdam_cli.evaluation.journal import FILE, Journal, Record
from cdam_cli.evaluation.page import Example, write_page
from cdam_cli.evaluation.quantities import quantity
from cdam_cli.evaluation.results import Results, gather, tells
from cdam_cli.evaluation.terminal import summary
from cdam_cli.interrupts import uninterrupted
from cdam_cli.spelling import parse_evaluated, parse_metric, spelled

command = importlib.import_module("cdam_cli.evaluate")  # the package's attribute of this name is the command
DIGITS = tuple("0123456789")
EVIL = "<script>alert('\u202e1')</script>&\"x"


def model(names: Sequence[str] = DIGITS, count: int | None = None) -> cdam.Model:
    return cdam.Model(
        name="demo",
        is_default=True,
        architecture="vit_tiny",
        fingerprint="f00d" * 16,
        task="multi_class",
        output_names=tuple(names),
        output_count=len(names) if count is None else count,
        input_size=(64, 64),
        flexible_input_size=False,
        patch_size=(4, 4),
        patch_grid=(16, 16),
        prefix_tokens=1,
        latent_size=8,
        readout="cls_token",
        precision="fp32",
        methods=("cdam",),
    )


def found(text: object, its_model: cdam.Model | None = None, limit: int | None = None) -> Dataset:
    def find(concept: cdam.Concept) -> cdam.Concept:
        return cdam.Concept(id="ab" * 32, label=concept.name, similarity=concept.similarity)

    return open_dataset(str(text), its_model or model(), find, limit)


def ids(dataset: Dataset) -> list[str]:
    return [sample.id for sample in dataset]


def targets(dataset: Dataset) -> list[str]:
    return [spelled(sample.target) for sample in dataset]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three images of two classes, and what is none."""
    for name in ("7/b.png", "7/a.JPG", "7/.cache.txt", "3/deep/c.webp", ".hidden/d.png", "3/notes.txt"):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    (tmp_path / "photos" / "above.png").write_bytes(b"")
    return tmp_path / "photos"


def test_a_folder_of_classes_by_their_names(folder: Path) -> None:
    dataset = found(folder)
    assert (len(dataset), ids(dataset)) == (3, ["3/deep/c.webp", "7/a.JPG", "7/b.png"])  # the classes take turns
    assert targets(dataset) == ["3", "7", "7"]
    assert next(iter(dataset)).image == folder / "3/deep/c.webp"
    assert (dataset.everywhere, dataset.notes) == (frozenset(), ("classes by the folders' names",))
    first = found(folder, limit=2)
    assert (len(first), ids(first), first.identity) == (2, ids(dataset)[:2], dataset.identity)
    assert found(folder, limit=9).limit is None
    (folder / "7" / "z.png").write_bytes(b"")
    assert found(folder).identity != dataset.identity


def test_a_folder_of_classes_by_their_order(folder: Path) -> None:
    dataset = found(folder, model(["cat", "dog"]))
    assert targets(dataset) == ["#0", "#1", "#1"]
    assert "by position" in dataset.notes[0]
    assert targets(found(folder, model([], count=2))) == ["#0", "#1", "#1"]


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (
            ["cat", "dog", "cow"],
            "no outputs of demo are called 3, 7; and for the outputs in their order there are 3, but 2",
        ),
        (["7", "cat"], "no outputs of demo are called 3$"),
        (["7", "33"], "no outputs of demo are called 3; did you mean '33'"),
    ],
)
def test_folders_that_are_no_outputs_are_named(folder: Path, names: list[str], said: str) -> None:
    with pytest.raises(click.UsageError, match=said):
        found(folder, model(names))


def test_folders_without_images(tmp_path: Path) -> None:
    with pytest.raises(click.UsageError, match="no sub-folders"):
        found(tmp_path)
    (tmp_path / "3").mkdir()
    with pytest.raises(click.UsageError, match="no JPEG, PNG or WebP file"):
        found(tmp_path)
    with pytest.raises(click.UsageError, match="no folder, no CSV file"):
        found(tmp_path / "nowhere")


def table(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "samples.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_table(tmp_path: Path) -> None:
    path = table(
        tmp_path,
        "\ufeffimage,target,wrong_target,mask,split,id\n"
        "sub/a.png,7,3,m.png,x,\n\n"
        '"b,c.png",#2,,m.png,,second\n'
        " d.png ,concept:loops:cosine,index:0,m.png,x\n",
    )
    dataset = found(path)
    a, b, d = dataset
    assert (len(dataset), ids(dataset)) == (3, ["sub/a.png", "second", "d.png"])
    assert (a.image, a.mask, b.image) == (tmp_path / "sub/a.png", tmp_path / "m.png", tmp_path / "b,c.png")
    assert (spelled(a.target), spelled(a.wrong_target), b.wrong_target) == ("7", "3", None)
    assert spelled(d.target) == f"concept:id={'ab' * 32}:cosine"
    assert (dataset.everywhere, dataset.somewhere) == ({"mask"}, {"mask", "wrong_target"})
    assert dataset.notes == ("columns not used: split",)
    assert ids(dataset) == ids(dataset)  # as often as it is asked
    assert targets(found(table(tmp_path, "target,image\n7,a.png\n"), model([], count=8))) == ["#7"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no column image and no column target"),
        ("image;target\na.png;7\n", "with commas between them"),
        ("image,target\n", "no rows below the header"),
        ("image,target,image\n", "two columns of the same name"),
        ("image,target\na.png,7\na.png,3\n", "line 3: 'a.png' is there twice; a column `id`"),
        ("image,target,id\na.png,7,x\nb.png,3,x\n", "line 3: 'x' is there twice; ids have to differ"),
        ("image,target,maskk\na.png,7,m.png\n", "'maskk' is no column; did you mean 'mask'?"),
        ("image,target,Wrong-Target\na.png,7,3\n", "'Wrong-Target' is no column; did you mean 'wrong_target'?"),
        ("image,target\na.png,\n", "line 2: an image and a target are needed"),
        ("image,target\na.png,7,8\n", "line 2: 3 cells, but 2 columns"),
        ("image,target\na.png,top:3\n", "line 2: 'top:3' is not one target"),
        ("image,target\na.png,#10\n", "line 2: demo has 10 outputs, no output 10"),
        ("image,target\na.png,12\n", "line 2: demo has 10 outputs, no output 12"),
        ("image,target\na.png,seven\n", "line 2: no output of demo is called 'seven'"),
        ("image,target\na.png,index:x\n", "line 2: 'index:x' wants a whole number"),
        ('image,target\na.png,"7\n', "line 2: unexpected end of data"),
    ],
)
def test_tables_that_are_wrong(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(click.UsageError, match=re.escape(said)):
        found(table(tmp_path, text))


def test_what_is_no_text_is_no_table(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(click.UsageError, match="not a CSV file in UTF-8"):
        found(tmp_path / "x.csv")


def test_the_demo_scenes() -> None:
    dataset = found("demo-scenes:3")
    samples = list(dataset)
    assert ids(dataset) == [f"scene-{SCENES_SEED + index}" for index in range(3)]
    assert dataset.everywhere == {"wrong_target", "mask", "counterfactual", "wrong_mask"}
    assert [digest(sample) for sample in dataset] == [digest(sample) for sample in samples]
    for sample in samples:
        changed = (np.asarray(sample.image) != np.asarray(sample.counterfactual)).any(2)
        assert changed.any()
        assert not (changed & ~np.asarray(sample.mask)).any()
        assert not (np.asarray(sample.mask) & np.asarray(sample.wrong_mask)).any()
        assert sample.target != sample.wrong_target
    assert found("demo-scenes:2").identity == dataset.identity  # more of them are the same dataset
    for wrong in ("demo-scenes", "demo-scenes:", "demo-scenes:0", "demo-scenes:x"):
        with pytest.raises(click.UsageError, match="demo-scenes:N"):
            found(wrong)
    with pytest.raises(click.UsageError, match="outputs are the digits"):
        found("demo-scenes:2", model(["cat", "dog"]))


def test_the_demo_scenes_need_their_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    from cdam_server.demo import scenes

    def missing(_split: str) -> None:
        raise ImportError("demo scenes need scikit-learn: install cdam-serve with its extra `demo`")

    monkeypatch.setattr(scenes, "load_digits", missing)
    with pytest.raises(click.ClickException, match="extra `demo`"):
        found("demo-scenes:2")


def test_a_digest_is_of_all_that_is_measured(tmp_path: Path) -> None:
    for name in ("a.png", "m.png"):
        (tmp_path / name).write_bytes(name.encode())

    def made(**more: Any) -> cdam.Sample:
        return cdam.Sample("a", **{"image": tmp_path / "a.png", "target": cdam.Output(7), **more})

    seen = {
        digest(made()),
        digest(made(target=cdam.Output(3))),
        digest(made(wrong_target=cdam.Output(3))),
        digest(made(mask=tmp_path / "m.png")),
        digest(made(counterfactual=tmp_path / "m.png")),
        digest(made(mask=np.zeros((2, 3), bool))),
        digest(made(mask=np.zeros((3, 2), bool))),
    }
    before = digest(made())
    (tmp_path / "a.png").write_bytes(b"other")
    assert len(seen | {digest(made())}) == 8
    assert len(before) == 16
    assert digest(made(mask=tmp_path / "nowhere.png")) == ""


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("fidelity", cdam.Fidelity()),
        ("fidelity:points=6,unit=patch", cdam.Fidelity(points=6, unit="patch")),
        ("box_sensitivity:box_sizes=8+16,boxes=50", cdam.BoxSensitivity(box_sizes=(8, 16), boxes=50)),
        ("compactness:absolute", cdam.Compactness(absolute=True)),
        (
            "insertion_deletion:blur_sigma=2.5,enlargement=nearest",
            cdam.InsertionDeletion(blur_sigma=2.5, enlargement="nearest"),
        ),
        (
            "class_discrimination:fidelity.points=6,box_sensitivity.boxes=25",
            cdam.ClassDiscrimination(cdam.Fidelity(points=6), cdam.BoxSensitivity(boxes=25)),
        ),
    ],
)
def test_metrics_are_spelled(text: str, meant: cdam.Metric) -> None:
    assert parse_metric(text) == meant
    assert parse_metric(spelled(meant)) == meant


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("fidelty", "'fidelty' is no metric; there are fidelity"),
        ("fidelity:unit=row", "unit wants pixel or patch"),
        ("fidelity:points=x", "points wants a whole number"),
        ("fidelity:boxes=3", "'boxes' is no parameter of fidelity; its parameters are unit"),
        ("sparseness:x=1", "it has no parameters"),
        ("class_discrimination:fidelity=1", "its parameters are fidelity.unit"),
        ("box_sensitivity:box_sizes=8,16", "'16' is no parameter"),
    ],
)
def test_metrics_that_are_none(text: str, said: str) -> None:
    with pytest.raises(click.BadParameter, match=re.escape(said)):
        parse_metric(text)


def test_methods_and_anchors_are_spelled() -> None:
    for text in ("random", "mask", "inverted_mask", "cdam", "smooth_cdam:samples=20,noise=absolute:0.5"):
        assert spelled(parse_evaluated(text)) == text
    with pytest.raises(click.BadParameter, match=r"neither a method nor an anchor; there are cdam, .*, inverted_mask"):
        parse_evaluated("randm")


# --- what an evaluation comes to


class Some(Dataset):
    """Samples that nobody reads."""

    name, kind, identity = f"photos {EVIL}", "csv", "1d" * 32
    somewhere = everywhere = frozenset({"mask"})

    def __init__(self, count: int) -> None:
        self._ids = [f"sample {number} {EVIL}" for number in range(count)]

    def __len__(self) -> int:
        return len(self._ids)

    def __iter__(self) -> Iterator[cdam.Sample]:
        return (cdam.Sample(name, b"", cdam.Output(0)) for name in self._ids)


def about(count: int = 12, **changes: Any) -> About:
    given: dict[str, Any] = {
        "methods": (cdam.Cdam(), cdam.Anchor.RANDOM, cdam.Attention(), cdam.Anchor.MASK),
        "metrics": (cdam.Fidelity(points=3), cdam.Counterfactual(), cdam.Randomisation()),
        "seed": 0,
        "resamples": 200,
        "resize": None,
        "input_size": None,
        "command": "cdam evaluate photos",
    }
    return About(model(), Some(count), **{**given, **changes})


def records(its: About, *, fail: Sequence[int] = ()) -> list[Record]:
    """Made-up records: the mask is best and random worst, but mean_lif tells nothing."""
    rng = np.random.default_rng(1)
    made = []
    for number, sample in enumerate(its.dataset):
        if number in fail:
            made.append(Record(sample.id, "aa", (), "INVALID_ARGUMENT", f"mask: is empty {EVIL}"))
            continue
        values = []
        for method, quality in enumerate([2.0, 0.0, 1.0, 3.0][: len(its.methods)]):
            for metric, form in enumerate(its.metrics):
                for name, better in form.quantities.items():
                    value = (-quality if better == "lower" else quality) + rng.normal() / 10
                    curve = None
                    if name in {"a_mif", "a_lif"}:
                        curve = np.stack([[0, 50, 100], rng.normal(value, 0.1, 3)]).astype(np.float32)
                    values.append((method, metric, name, rng.normal() if name == "mean_lif" else value, curve))
        made.append(Record(sample.id, "aa", values))
    return made


def results(its: About, found: Sequence[Record]) -> Results:
    return gather(found, len(its.methods), seed=its.seed, resamples=its.resamples)


def written(folder: Path, its: About, found: Sequence[Record], **options: Any) -> list[str]:
    """Write to the folder's journal; return the ids that it had before."""
    with Journal.open(folder, its.header(), **options) as journal:
        there = [record.id for record in journal.records(ids(its.dataset))]
        for seconds, record in enumerate(found, 1):
            journal.add(record, seconds)
        return there


def read(folder: Path, its: About) -> list[Record]:
    with Journal.open(folder, its.header()) as journal:
        return list(journal.records(ids(its.dataset)))


def same(one: Sequence[Record], other: Sequence[Record]) -> bool:
    def plain(record: Record) -> Any:
        values = [(*value[:4], None if value[4] is None else np.asarray(value[4]).tolist()) for value in record.values]
        return record.id, record.digest, record.code, record.message, values

    return list(map(plain, one)) == list(map(plain, other))


def test_a_journal_goes_on_where_it_was(tmp_path: Path) -> None:
    its = about()
    made = records(its, fail=[2])
    assert written(tmp_path / "new" / "deep", its, made[:5]) == []
    tmp_path = tmp_path / "new" / "deep"
    assert written(tmp_path, its, made[5:]) == [record.id for record in made[:5]]
    with Journal.open(tmp_path, its.header()) as journal:
        assert journal.seconds == 5 + 7
        assert journal.measured(made[0].id, "aa")
        assert not journal.measured(made[0].id, "bb")  # its files have changed
        assert not journal.measured(made[2].id, "aa")  # it failed, and is tried again
        assert not journal.measured("another", "aa")
        assert (journal.has(made[0].id), journal.has(made[2].id), journal.has("another")) == (True, False, False)
        assert same(list(journal.records(ids(its.dataset))), [_rounded(record) for record in made])
        again = Record(made[2].id, "cc", made[3].values)
        journal.add(again, 1)  # while it is read from
        assert next(journal.records([made[2].id])).digest == "cc"
    assert next(record for record in read(tmp_path, its) if record.id == made[2].id).digest == "cc"


def _rounded(record: Record) -> Record:
    """With curves as they are written."""
    values = [
        (
            *value[:4],
            None if value[4] is None else np.array([[float(f"{x:.9g}") for x in row] for row in value[4].tolist()]),
        )
        for value in record.values
    ]
    return Record(record.id, record.digest, values, record.code, record.message)


def test_a_journal_that_was_cut_anywhere(tmp_path: Path) -> None:
    its = about(3, methods=(cdam.Cdam(),), metrics=(cdam.Sparseness(),))
    made = records(its)
    written(tmp_path, its, made)
    whole = (tmp_path / FILE).read_bytes()
    ends = [position + 1 for position, byte in enumerate(whole) if byte == ord("\n")]
    for cut in range(len(whole) + 1):
        (tmp_path / FILE).write_bytes(whole[:cut])
        there = written(tmp_path, its, [])
        assert len(there) == max(0, sum(end <= cut for end in ends) - 2)  # the header and the run are lines, too
        done = written(tmp_path, its, made[len(there) :])
        assert same(read(tmp_path, its), made), (cut, done)


def test_a_journal_whose_middle_is_damaged(tmp_path: Path) -> None:
    its = about(3)
    written(tmp_path, its, records(its))
    lines = (tmp_path / FILE).read_bytes().splitlines(keepends=True)
    for broken in (b"{]\n", b"{}\n", b"3\n", b'{"id":"x","digest":"","seconds":0}\n', b"\xff\n"):
        for rest in (lines[3:], []):
            (tmp_path / FILE).write_bytes(b"".join([*lines[:3], broken, *rest]))
            with pytest.raises(click.ClickException, match=r"samples.jsonl, line 4: damaged; .*--overwrite"):
                written(tmp_path, its, [])
    assert written(tmp_path, its, [], overwrite=True) == []


@pytest.mark.parametrize(
    ("where", "what"),
    [
        (("values",), []),
        (("values", 0, 0), 99),
        (("values", 0, 0), -1),
        (("values", 0, 1), 3),
        (("values", 0, 2), "a_lif"),
        (("values", 0, 3), math.nan),
        (("values", 0, 3), "1"),
        (("values", 0, 4), [[0, 1], [2, 3]]),
        (("values", 0, 4), [[0], [1, 2]]),
        (("values", 0, 4), "a curve"),
        (("values", 0), None),
        (("values", 0), ()),
        (("id",), 5),
        (("digest",), None),
        (("seconds",), "1"),
    ],
)
def test_a_record_that_is_not_whole_is_damaged(tmp_path: Path, where: tuple[Any, ...], what: object) -> None:
    its = about(3)
    written(tmp_path, its, records(its))
    lines = (tmp_path / FILE).read_text().splitlines()
    line = place = json.loads(lines[3])
    *path, last = where
    for step in path:
        place = place[step]
    place[last] = what
    broken = "\n".join([*lines[:3], json.dumps(line), *lines[4:], ""])
    (tmp_path / FILE).write_text(broken)
    with pytest.raises(click.ClickException, match=r"samples.jsonl, line 4: damaged; .*--overwrite"):
        written(tmp_path, its, [])
    assert (tmp_path / FILE).read_text() == broken


def boxes(its: About, curve: object = ((0.0, 0.5), (1.0, 0.0))) -> list[Record]:
    """Made-up records of `Localisation` alone, all of the same curve."""
    points = None if curve is None else np.array(curve, np.float32)
    values = [
        (m, 0, name, 0.5, points if name == "box_acc" else None) for m in (0, 1) for name in its.metrics[0].quantities
    ]
    return [Record(sample.id, "aa", values) for sample in its.dataset]


def test_boxes_from_the_journal_to_the_page(tmp_path: Path) -> None:
    its = about(3, methods=(cdam.Cdam(), cdam.Anchor.RANDOM), metrics=(cdam.Localisation(points=2),))
    written(tmp_path, its, boxes(its))
    come = results(its, read(tmp_path, its))
    names = ["box_acc", "corloc", "box_iou", "pixel_ap", "max_box_acc"]
    assert come.quantities(0) == names
    row = come.row((0, 0, "max_box_acc"))
    assert row is not None
    assert (row.mean, row.standard_error, row.interval_low, row.interval_high) == (1.0, None, 1.0, 1.0)
    assert come.curves[1, 0, "box_acc"].mean.tolist() == [1.0, 0.0]
    write_page(tmp_path / "report.html", its, come, [], 1.0)
    page = (tmp_path / "report.html").read_text()
    assert all(name in page for name in names)
    assert "right boxes by level" in page


@pytest.mark.parametrize("curve", [None, [[0, 1], [0.5, 1]]])
def test_boxes_without_their_curve_are_damaged(tmp_path: Path, curve: object) -> None:
    its = about(3, methods=(cdam.Cdam(), cdam.Anchor.RANDOM), metrics=(cdam.Localisation(points=2),))
    written(tmp_path, its, boxes(its, curve))
    with pytest.raises(click.ClickException, match=r"samples.jsonl, line 3: damaged; .*--overwrite"):
        written(tmp_path, its, [])


@pytest.mark.parametrize("text", ["somebody's notes\nof two lines\n", '{"my":"data"}\n', '{"my":"data"}', "notes"])
def test_a_file_of_somebody_else_is_left_alone(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text)
    with pytest.raises(click.ClickException, match="line 1: damaged"):
        written(tmp_path, about(3), [])
    assert (tmp_path / FILE).read_text() == text


def test_a_journal_has_the_defaults_that_the_server_filled_in(tmp_path: Path) -> None:
    its = about(3)
    filled = {"metrics": [{"kind": "fidelity", "points": 3, "blur_sigma": 14.0}], "input_size": (64, 64)}
    with Journal.open(tmp_path, its.header()) as journal:
        assert journal.protocol is None
        journal.note(filled)
        journal.add(records(its)[0], 1)
    with Journal.open(tmp_path, its.header()) as journal:
        assert journal.protocol == {**filled, "input_size": [64, 64]}
        journal.note(filled)
        with pytest.raises(click.ClickException, match="fills in other defaults than it was begun with"):
            journal.note({**filled, "input_size": None})
        assert [record.id for record in journal.records(ids(its.dataset))] == ids(its.dataset)[:1]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"methods": (cdam.Cdam(),)}, "its methods: cdam, random, attention, mask, now: cdam;"),
        (
            {"metrics": (cdam.Fidelity(points=4),)},
            "its metrics: fidelity:points=3, counterfactual, randomisation, now: fid",
        ),
        ({"seed": 1}, "its seed: 0, now: 1;"),
        ({"resize": "squash"}, "its resize: none, now: squash;"),
        ({"input_size": (32, 32)}, "its input size: none, now: 32, 32;"),
    ],
)
def test_a_journal_of_another_evaluation_is_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    written(tmp_path, about(), records(about())[:1])
    other = about(**changes)
    with pytest.raises(click.ClickException, match=re.escape(said)):
        written(tmp_path, other, [])
    assert len(read(tmp_path, about())) == 1
    assert written(tmp_path, about(resamples=300), []) == ids(about().dataset)[:1]  # that is made anew each time
    assert written(tmp_path, other, [], overwrite=True) == []
    assert written(tmp_path, about(), []) == []  # there was nothing in it


def test_a_journal_of_another_dataset_or_model_is_refused(tmp_path: Path) -> None:
    its = about()
    written(tmp_path, its, records(its)[:1])
    with pytest.raises(click.ClickException, match="it has another model fingerprint;"):
        Journal.open(tmp_path, its.header() | {"model_fingerprint": "0" * 64})
    with pytest.raises(click.ClickException, match="its dataset: csv, now: folder;"):
        Journal.open(tmp_path, its.header() | {"dataset": "folder"})
    Journal.open(tmp_path, its.header() | {"dataset_name": "/by/another/path"}).close()


def test_a_dataset_may_change(tmp_path: Path) -> None:
    its, more = about(3), about(5)
    written(tmp_path, its, records(its))
    assert written(tmp_path, more, records(more)[3:]) == ids(its.dataset)
    assert len(read(tmp_path, more)) == 5
    assert len(read(tmp_path, its)) == 3  # what is no longer there is left out


def test_a_journal_is_written_by_one_process(tmp_path: Path) -> None:
    with Journal.open(tmp_path, about().header()), pytest.raises(click.ClickException, match="another `cdam evaluate`"):
        Journal.open(tmp_path, about().header())


def test_results_do_not_depend_on_the_order_in_which_samples_came(tmp_path: Path) -> None:
    its = about()
    made = records(its, fail=[4])
    written(tmp_path / "one", its, made)
    written(tmp_path / "other", its, [made[7], made[4], *reversed(made[8:])])
    written(tmp_path / "other", its, [*made[:4], made[6], made[5]])
    one, other = (results(its, read(tmp_path / name, its)) for name in ("one", "other"))
    assert one.table == other.table  # to the last bit: they are put together in the dataset's order
    assert (one.table.samples, one.table.failures) == (11, 1)
    curve, again = one.curves[0, 0, "a_mif"], other.curves[0, 0, "a_mif"]
    values = np.array([record.values[0][4] for record in made if not record.failed])
    np.testing.assert_array_equal(curve.mean, again.mean)
    np.testing.assert_allclose(curve.mean, values[:, 1].mean(0), rtol=1e-6)
    np.testing.assert_allclose(curve.standard_error, values[:, 1].std(0, ddof=1) / math.sqrt(11), rtol=1e-5)
    assert len(one.points[0, 1]) == 11


def test_differences_both_ways() -> None:
    its = about()
    come = results(its, records(its))
    there, back = come.difference(0, 1, 0, "a_mif"), come.difference(1, 0, 0, "a_mif")
    assert there is not None
    assert back is not None
    assert there.interval_low is not None
    assert back.mean_difference == -there.mean_difference
    assert back.interval_high == -there.interval_low
    assert (tells(there), tells(back), tells(come.difference(0, 1, 0, "mean_lif"))) == (True, True, False)
    assert come.difference(0, 0, 0, "a_mif") is None
    single = results(its, records(its)[:1])
    assert tells(single.difference(0, 1, 0, "a_mif")) is None


def test_which_way_is_better() -> None:
    assert quantity("a_mif").best({0: 1.0, 1: -2.0, 2: 3.0}) == 1
    assert quantity("a_lif").best({0: 1.0, 1: -2.0, 2: 3.0}) == 2
    assert quantity("randomisation_all").best({0: 1.0, 1: -2.0, 2: 0.5, 3: -0.4}) == 3
    assert quantity("true_change").best({0: 1.0}) is None
    assert quantity("of a newer server").best({0: 1.0}) is None
    assert quantity("a_mif").improves(1.0, -0.5)
    assert quantity("randomisation_all").improves(0.1, 0.4)  # from -0.3
    assert not quantity("randomisation_all").improves(-0.3, -0.4)  # from 0.1


def test_every_quantity_is_described() -> None:
    for form in cdam.METRICS.values():
        for name in form.quantities:
            assert quantity(name).says != name
    for name in ("change_correlation", "max_box_acc"):
        assert quantity(name).says != name
        assert quantity(name).better == "higher"


# --- what is written


def test_tables_have_a_line_for_each_number(tmp_path: Path) -> None:
    its = about()
    made = records(its, fail=[1])
    files.write_csv(tmp_path / "samples.csv", its, made)
    assert files.write_parquet(tmp_path / "samples.parquet", its, made)
    with (tmp_path / "samples.csv").open(newline="") as file:
        head, *rows = csv.reader(file)
    assert head == ["id", "method", "metric", "quantity", "value"]
    expected = [
        [record.id, its.method_names[m], its.metric_names[k], name, repr(float(value))]
        for record in made
        for m, k, name, value, _ in record.values
    ]
    assert rows == expected
    columns = parquet.read_table(tmp_path / "samples.parquet").to_pydict()
    assert (
        list(
            map(
                list,
                zip(
                    columns["id"],
                    columns["method"],
                    columns["metric"],
                    columns["quantity"],
                    map(repr, columns["value"]),
                    strict=True,
                ),
            )
        )
        == expected
    )
    assert columns["curve_x"][:3] == [[0, 50, 100], [0, 50, 100], None]
    np.testing.assert_array_equal(columns["curve_y"][1], made[0].values[1][4][1])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["samples.csv", "samples.parquet"]


def test_tables_of_many_samples_are_written_in_parts(tmp_path: Path) -> None:
    its = about(600, methods=(cdam.Cdam(),), metrics=(cdam.Sparseness(),))
    files.write_parquet(tmp_path / "samples.parquet", its, iter(records(its)))
    assert parquet.ParquetFile(tmp_path / "samples.parquet").num_row_groups == 3
    assert parquet.read_table(tmp_path / "samples.parquet").num_rows == 600


def test_without_pyarrow_there_is_one_file_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "find_spec", lambda _name: None)
    assert not files.write_parquet(tmp_path / "samples.parquet", about(), [])
    assert list(tmp_path.iterdir()) == []


def test_what_can_not_be_written_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "samples.csv").write_text("of before")

    def broken() -> Iterator[Record]:
        yield records(about())[0]
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        files.write_csv(tmp_path / "samples.csv", about(), broken())
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"samples.csv": "of before"}


def test_the_summary_as_json(tmp_path: Path) -> None:
    its = about()
    come = results(its, records(its, fail=[1]))
    files.write_summary(tmp_path / "summary.json", its, come, 12.5)
    said = json.loads((tmp_path / "summary.json").read_text())
    assert (said["samples"], said["failures"], said["seconds"]) == (11, 1, 12.5)
    assert said["failed"] == [
        {"id": come.failed[0].id, "code": "INVALID_ARGUMENT", "message": f"mask: is empty {EVIL}"}
    ]
    assert said["model"]["fingerprint"] == "f00d" * 16
    assert said["protocol"]["metrics"][0]["points"] == 3
    assert said["protocol"]["methods"][1] == {"anchor": "random"}
    assert len(said["rows"]) == 4 * (5 + 4 + 2)
    assert said["rows"][0].keys() == {
        *("method", "metric", "quantity", "mean", "standard_error", "interval_low", "interval_high", "samples"),
    }
    assert (said["rows"][0]["method"], said["rows"][0]["metric"]) == ("cdam", "fidelity:points=3")
    assert (said["comparisons"][0]["method"], said["comparisons"][0]["other_method"]) == ("cdam", "random")
    assert len(said["comparisons"]) == 6 * (5 + 4 + 2)


def test_the_summary_on_a_terminal() -> None:
    its = about()
    lines = summary(its, results(its, records(its, fail=[1]))).splitlines()
    assert lines[0].endswith("demo, 11 samples, 1 failed; mean ± standard error")
    assert lines[1] == ""
    assert "\u202e" not in lines[0]
    assert lines[2].split() == [
        "fidelity:points=3",
        "a_mif",
        "↓",
        "a_lif",
        "↑",
        "a_lif_mif",
        "↑",
        "mean_mif",
        "↓",
        "mean_lif",
        "↑",
        "(unfit)",
    ]
    assert [line.split("  ")[1] for line in lines[3:7]] == ["cdam", "attention", "random (anchor)", "mask (anchor)"]
    assert re.search(r"-2\.\d+ ± 0\.0\d+", lines[3])
    assert len({len(line) for line in lines[2:7]}) == 1
    lines = summary(its, results(its, records(its)[:1])).splitlines()
    assert lines[0].endswith("demo, 1 sample; mean ± standard error")
    assert lines[1] == "1 sample: differences and intervals from so few carry little"
    assert "±" not in "\n".join(lines[1:])


class Page(HTMLParser):
    """A page's elements, and what is wrong with how they nest."""

    VOID = frozenset({"meta", "img", "br", "link", "wbr"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text += data

    def all(self, name: str) -> list[str | None]:
        return [attributes[name] for _, attributes in self.tags if name in attributes]


def page(tmp_path: Path, its: About, made: Sequence[Record], examples: Sequence[Example] = ()) -> Page:
    write_page(tmp_path / "report.html", its, results(its, made), examples, 61.0)
    return Page((tmp_path / "report.html").read_text(encoding="utf-8"))


def test_the_page_needs_nothing_else(tmp_path: Path) -> None:
    image = Image.new("RGB", (64, 48), "red")
    its = about()
    made = records(its, fail=[1])
    shown = page(tmp_path, its, made, [Example(made[0].id, EVIL, 0.5, image, image, {0: image, 2: image})])
    assert not {tag for tag, _ in shown.tags} & {"script", "link", "iframe", "object", "base", "meta http-equiv"}
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not re.findall(r"@import|@font-face|url\((?!#)", text)
    for name in ("src", "href", "xlink:href"):
        assert all(value and value.startswith(("data:image/webp;base64,", "#")) for value in shown.all(name))
    inside = set(shown.all("id"))
    assert len(inside) == len(shown.all("id"))
    assert {value[1:] for name in ("href", "xlink:href") for value in shown.all(name) if value} <= inside
    assert set(re.findall(r"url\(#([^)]*)\)", text)) <= inside
    assert len([tag for tag, _ in shown.tags if tag == "img"]) == 4
    assert all(attributes.get("alt") for tag, attributes in shown.tags if tag == "img")


def test_the_page_escapes_what_others_wrote(tmp_path: Path) -> None:
    its = about(command=f"cdam evaluate {EVIL}")
    shown = page(tmp_path, its, records(its, fail=[1]))
    assert EVIL.replace("\u202e", "\\u202e") in shown.text  # as text
    assert "\u202e" not in (tmp_path / "report.html").read_text(encoding="utf-8")  # and nothing turns its direction
    assert f"mask: is empty {EVIL}".replace("\u202e", "\\u202e") in shown.text
    assert not [tag for tag, _ in shown.tags if tag == "script"]


def test_the_page_says_what_is_best_and_what_is_unfit(tmp_path: Path) -> None:
    its = about()
    shown = page(tmp_path, its, records(its))
    text = " ".join(shown.text.split())
    assert "mean_lif is unfit here: it does not tell the object's mask from random scores" in text
    assert re.findall(r"(\w+) is unfit here", text) == ["mean_lif", "change_correlation"]
    marks = [attributes.get("class") for tag, attributes in shown.tags if tag == "td"]
    assert marks.count("best") == 4 + 1 + 2  # of all that are fit and have a better way
    verdicts = [
        attributes["class"] for _, attributes in shown.tags if (attributes.get("class") or "").startswith("verdict")
    ]
    assert {"verdict better", "verdict worse", "verdict same"} >= set(verdicts)
    assert len(verdicts) == 3 * (4 + 1 + 2)  # nothing is judged by what is unfit
    assert text.count("mean_lif ↑ unfit") == 2
    assert "carry little" not in text
    assert "Against cdam" in text
    assert len([1 for tag, attributes in shown.tags if tag == "svg" and attributes.get("role") == "img"]) == 2 + 4
    assert "Failures" not in text


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("methods", [(cdam.Cdam(),), (cdam.Anchor.RANDOM,), (cdam.Cdam(), cdam.Attention())])
def test_pages_of_little(tmp_path: Path, count: int, methods: tuple[Any, ...]) -> None:
    its = about(count, methods=methods)
    shown = page(tmp_path, its, records(its))
    assert "unfit here: it" not in shown.text
    assert f"Intervals from {count} sample{'' if count == 1 else 's'} carry little" in shown.text
    assert ("At a glance" in shown.text) == (len(methods) == 2)


def test_a_page_of_many_methods_tells_them_apart(tmp_path: Path) -> None:
    methods = tuple(cdam.IntegratedCdam(steps=steps) for steps in range(1, 13))
    its = about(3, methods=methods, metrics=(cdam.Sparseness(),))
    values = [(method, 0, "gini", float(method), None) for method in range(12)]
    shown = page(tmp_path, its, [Record(name, "aa", values) for name in ids(its.dataset)])
    keys = [(a.get("style"), a.get("stroke-dasharray")) for tag, a in shown.tags if tag == "line"]
    assert len(set(keys)) == 12


# --- the command, as far as it comes without a server


def invoke(*words: object) -> Any:
    return CliRunner().invoke(main, ["evaluate", *map(str, words), "--server", "127.0.0.1:1"])


def test_what_is_missing_is_said_before_anything_else(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(command, "find_spec", lambda name: None if name == "jinja2" else name)
    come = invoke("demo-scenes:2", "-o", tmp_path / "out")
    assert come.exit_code == 1
    assert come.stderr == "Error: the report needs jinja2: install cdam-serve with its extra `report`\n"


def test_usage(tmp_path: Path) -> None:
    for nothing in (tmp_path / "nowhere", "demo-scenes:0"):
        come = invoke(nothing, "-o", tmp_path / "out")  # before any server is asked
        assert (come.exit_code, "demo-scenes:" in come.stderr, "server" in come.stderr) == (2, True, False)
    assert "is given twice" in invoke("x", "-o", tmp_path, "-m", "cdam", "-m", "cdam").stderr
    assert "Missing option '-o'" in invoke("x").stderr
    come = invoke("demo-scenes:2", "-o", tmp_path / "out")
    assert come.exit_code == 1
    assert come.stderr == "Error: 127.0.0.1:1: no server answers there (Connection refused); start one: cdam serve\n"
    assert not (tmp_path / "out").exists()


def test_defaults_are_what_the_dataset_has(folder: Path) -> None:
    def names(dataset: Dataset, its_model: cdam.Model) -> tuple[list[str], list[str]]:
        settings = {"seed": 0, "resamples": 10, "resize": None, "input_size": None}
        its = command._about(dataset, its_model, (), (), settings)
        return its.method_names, its.metric_names

    methods = ["cdam", "smooth_cdam", "integrated_cdam", "attention", "random"]
    assert names(found(folder), model()) == (methods, ["fidelity", "compactness"])
    everything = ["mask_agreement", "class_discrimination:box_sensitivity.boxes=25", "counterfactual"]
    assert names(found("demo-scenes:1"), model()) == ([*methods, "mask"], ["fidelity", "compactness", *everything])
    less = table(folder, "image,target,mask,wrong_target\na.png,7,m.png,3\nb.png,7,m.png,3\n")
    kept = ["fidelity", "compactness", *everything[:2]]
    assert names(found(less), model()) == (methods, kept)  # the mask anchor would need a mask for the wrong target
    poor = cdam.Model(**{**vars(model()), "unsupported": {"attention": "no"}})
    assert names(found(folder), poor)[0] == ["cdam", "smooth_cdam", "integrated_cdam", "random"]


def test_defaults_that_are_left_out_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = table(tmp_path, "image,target,mask,id\na.png,7,m.png,s1\nb.png,7,,s2\nc.png,7,,s3\n")
    settings = {"seed": 0, "resamples": 10, "resize": None, "input_size": None}
    its = command._about(found(path, limit=1), model(), (), (), settings)
    assert its.metric_names == ["fidelity", "compactness"]
    assert capsys.readouterr().err == (
        "mask_agreement is left out: s2 has no mask\nthe anchor mask is left out: s2 has no mask\n"
    )


def test_the_command_can_be_repeated(tmp_path: Path) -> None:
    its = about(methods=(cdam.Cdam(), cdam.Anchor.RANDOM), metrics=(cdam.Fidelity(points=3),), input_size=(32, 64))
    words = shlex.split(command._command(its, tmp_path / "a folder", 2, ["one:8001", "two:8001"]))
    context = evaluate.make_context("evaluate", words[2:])
    given = context.params
    assert (given["dataset"], given["out"], given["examples"]) == (its.dataset.name, tmp_path / "a folder", 2)
    assert (given["methods"], given["metrics"], given["resamples"]) == (its.methods, its.metrics, its.resamples)
    assert (given["input_size"], given["addresses"]) == ((32, 64), ("one:8001", "two:8001"))


def test_a_name_that_is_no_text_has_a_sentence() -> None:
    with pytest.raises(UnicodeEncodeError) as error:
        "7/\udcff.png".encode()
    assert command._said(error.value) == "its name is not UTF-8; give the file another"


@pytest.mark.parametrize(
    ("methods", "metrics", "said"),
    [
        ((), ("mask_agreement",), "mask_agreement needs samples with a mask, which"),
        ((), ("counterfactual",), "counterfactual needs samples with a counterfactual, which"),
        ((), ("class_discrimination",), "class_discrimination needs samples with a wrong_target, which"),
        (("cdam", "inverted_mask"), (), "inverted_mask needs samples with a mask, which"),
    ],
)
def test_what_the_dataset_lacks_is_said_at_once(
    folder: Path, methods: tuple[str, ...], metrics: tuple[str, ...], said: str
) -> None:
    with pytest.raises(click.UsageError, match=said):
        command._about(
            found(folder),
            model(),
            tuple(map(parse_evaluated, methods)),
            tuple(map(parse_metric, metrics)),
            {"seed": 0, "resamples": 10, "resize": None, "input_size": None},
        )


def test_what_somebody_else_wrote_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("mine")
    with pytest.raises(click.UsageError, match=r"report.html is there, but no samples.jsonl"):
        command._check_folder(tmp_path, overwrite=False)
    command._check_folder(tmp_path, overwrite=True)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def interrupt() -> Iterator[Callable[[], None]]:
    """Ctrl-C, as a terminal's process gets it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield lambda: signal.raise_signal(signal.SIGINT)
    signal.signal(signal.SIGINT, before)


def test_what_belongs_together_is_not_interrupted(interrupt: Callable[[], None]) -> None:
    done = []

    def write_and_count() -> None:
        with uninterrupted():
            done.append("written")
            interrupt()
            done.append("counted")
        done.append("went on")

    for _ in range(2):  # the second time as the first
        with pytest.raises(KeyboardInterrupt):
            write_and_count()
    assert done == ["written", "counted"] * 2
    with pytest.raises(ZeroDivisionError), uninterrupted():
        _ = 1 / 0
    with uninterrupted():
        pass
    with pytest.raises(KeyboardInterrupt):
        interrupt()


def test_who_ignores_ctrl_c_goes_on_to(interrupt: Callable[[], None]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with uninterrupted():
        interrupt()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
