"""`samples.csv`, `samples.parquet` and `summary.json`."""

import csv
import json
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, Final

import cdam
from cdam_cli.evaluation.about import About
from cdam_cli.evaluation.journal import Record
from cdam_cli.evaluation.results import Results

NAMES: Final = ("samples.csv", "samples.parquet", "summary.json", "report.html")
"""What may be written beside the journal."""

_VERSIONS: Final = ("numpy", "grpcio", "matplotlib", "pyarrow")
_GROUP: Final = 256  # samples that are held at once
_COLUMNS: Final = ("id", "method", "metric", "quantity", "value")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write to, which takes the other's place when all of it is there."""
    beside = path.with_name(f".{path.name}.part")
    try:
        yield beside
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def write_csv(path: Path, about: About, records: Iterable[Record]) -> None:
    """A line for each sample, method, metric and quantity; samples that failed have none."""
    with replacing(path) as part, part.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(_COLUMNS)
        for record in records:
            writer.writerows((*row, repr(value)) for *row, value, _ in _rows(about, record))


def write_parquet(path: Path, about: About, records: Iterable[Record]) -> bool:
    """The same with the curves, if pyarrow is there."""
    if find_spec("pyarrow") is None:
        return False
    import pyarrow as pa
    from pyarrow import parquet

    text, numbers = pa.dictionary(pa.int32(), pa.string()), pa.list_(pa.float64())
    kinds = [pa.string(), text, text, text, pa.float64(), numbers, numbers]
    schema = pa.schema(list(zip((*_COLUMNS, "curve_x", "curve_y"), kinds, strict=True)))
    rest = iter(records)
    with replacing(path) as part, parquet.ParquetWriter(part, schema) as writer:
        while group := list(islice(rest, _GROUP)):
            rows = [
                (*row, *(curve.tolist() if curve is not None else (None, None)))
                for record in group
                for *row, curve in _rows(about, record)
            ]
            if rows:
                columns = zip(*rows, strict=True)
                arrays = [pa.array(column, kind) for column, kind in zip(columns, kinds, strict=True)]
                writer.write_table(pa.Table.from_arrays(arrays, schema=schema))
    return True


def _rows(about: About, record: Record) -> Iterator[tuple[Any, ...]]:
    methods, metrics = about.method_names, about.metric_names
    sample_id = record.id.encode("utf-8", "replace").decode()
    for method, metric, quantity, value, curve in record.values:
        yield sample_id, methods[method], metrics[metric], quantity, value, curve


def write_summary(path: Path, about: About, results: Results, seconds: float) -> dict[str, Any]:
    """Everything but the single samples, in JSON's types."""
    table = results.table
    names = {"method": about.method_names, "other_method": about.method_names, "metric": about.metric_names}
    summary = {
        "command": about.command,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 3),
        "versions": _versions(),
        "model": {
            name: getattr(about.model, name)
            for name in ("name", "architecture", "fingerprint", "precision", "input_size", "patch_grid")
        },
        "dataset": {name: getattr(about.dataset, name) for name in ("name", "kind", "identity")}
        | {"samples": len(about.dataset), "notes": list(about.dataset.notes)},
        "protocol": about.protocol(),
        "samples": table.samples,
        "failures": table.failures,
        "rows": [_named(asdict(row), names) for row in table.rows],
        "comparisons": [_named(asdict(comparison), names) for comparison in table.comparisons],
        "failed": [{"id": record.id, "code": record.code, "message": record.message} for record in results.failed],
    }
    with replacing(path) as part:
        part.write_text(json.dumps(summary, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return summary


def _named(fields: dict[str, Any], names: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Names in the place of indices."""
    return {
        name.removesuffix("_index"): names[name.removesuffix("_index")][value] if name.endswith("_index") else value
        for name, value in fields.items()
    }


def _versions() -> dict[str, str]:
    found = {"cdam-serve": cdam.__version__, "python": platform.python_version()}
    for name in _VERSIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
