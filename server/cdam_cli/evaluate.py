"""`cdam evaluate`."""

import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, Final, Self

import click

import cdam
from cdam.render import upright, upright_mask
from cdam_cli.connections import Server, connection_options, failures, server_from
from cdam_cli.evaluation import files, terminal
from cdam_cli.evaluation.about import About, resolved
from cdam_cli.evaluation.dataset import Dataset, check_there, digest, open_dataset
from cdam_cli.evaluation.journal import FILE, Journal, Record
from cdam_cli.evaluation.page import Example, outside_faded, picture, write_page
from cdam_cli.evaluation.results import Results, gather
from cdam_cli.failures import Aborted, Failure, describe, describe_os
from cdam_cli.interrupts import uninterrupted
from cdam_cli.report import printable
from cdam_cli.spelling import model_option, parse_evaluated, parse_metric, preprocessing_options, spelled

_METHODS: Final = (cdam.Cdam(), cdam.SmoothCdam(), cdam.IntegratedCdam(), cdam.Attention(), cdam.Anchor.RANDOM)
_FEWER_BOXES: Final = cdam.ClassDiscrimination(box_sensitivity=cdam.BoxSensitivity(boxes=25))
_MASKS: Final = (cdam.Anchor.MASK, cdam.Anchor.INVERTED_MASK)
_EXTRA: Final = ("jinja2", "matplotlib", "tqdm")  # of the extra `report`, what there is no report without
_EVERY: Final = 15.0  # seconds between two lines, where there is no terminal
_REASONS: Final = 3

_HELP = f"""Measure how true maps are, over a DATASET, and write a report.

\b
DATASET is one of
  photos/           a folder with a sub-folder of images for each class, called as the model's output; if none is, but
                    there are as many as outputs, they are the outputs in their order
  samples.csv       columns image and target, and as needed wrong_target, mask, counterfactual (the image without the
                    object), wrong_mask, id; paths are relative to the file, a target is an output's name or index, or
                    concept:NAME
  demo-scenes:100   so many scenes of two digits, with all of these, for the demo model (needs the extra `demo`)

METHODs are spelled as for `cdam explain`; the anchors random, mask and inverted_mask are maps that explain nothing, to
see what a metric can tell. Differences are taken against the first METHOD.

METRICs are spelled likewise: fidelity, box_sensitivity:boxes=50, fidelity:points=6,unit=patch,
class_discrimination:fidelity.points=6. Without any, those that take few passes, as far as the dataset has what they need:
fidelity, compactness, mask_agreement, {spelled(_FEWER_BOXES)} and counterfactual.

DIR gets report.html (one file that needs nothing else), samples.csv, samples.parquet (with pyarrow) and summary.json;
and {FILE}, to which every sample is written as soon as it is measured. A run that was interrupted or killed goes on from
there when the command is repeated; samples that failed are tried again, and so are those whose files or row changed.

\b
Examples
  cdam evaluate demo-scenes:50 -o out/
  cdam evaluate photos/ --limit 500 -m cdam -m attention -m random --metric fidelity --metric sparseness -o out/
  cdam evaluate samples.csv -m cdam -m smooth_cdam:samples=20 --metric box_sensitivity --server a:8001 --server b:8001 -o out/

Exits with 1 if no sample could be measured. Ctrl-C keeps what was measured.
"""


@click.command(help=_HELP, short_help="Measure how true maps are, and write a report.")
@click.argument("dataset", metavar="DATASET")
@click.option(
    "-m",
    "--method",
    "--methods",
    "methods",
    multiple=True,
    callback=lambda _ctx, _param, texts: tuple(map(parse_evaluated, texts)),
    metavar="METHOD",
    help="What to compare; repeatable.  [cdam, smooth_cdam, integrated_cdam, attention, random; mask, where there are]",
)
@click.option(
    "--metric",
    "--metrics",
    "metrics",
    multiple=True,
    callback=lambda _ctx, _param, texts: tuple(map(parse_metric, texts)),
    metavar="METRIC",
    help=f"What to measure; repeatable: {', '.join(cdam.METRICS)}.  [see above]",
)
@click.option(
    "-o",
    "--out",
    required=True,
    metavar="DIR",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where to write.",
)
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Take the first N samples.")
@model_option
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Of all that is random.")
@preprocessing_options()
@click.option(
    "--resamples",
    type=click.IntRange(1, 100_000),
    default=1000,
    show_default=True,
    help="Bootstrap resamples for the intervals.",
)
@click.option(
    "--examples", type=click.IntRange(min=0), default=6, show_default=True, help="Samples whose maps the report shows."
)
@click.option("--overwrite", is_flag=True, help="Begin anew, whatever is in DIR.")
@partial(connection_options, several=True)
def evaluate(
    *,
    dataset: str,
    methods: tuple[cdam.Method | cdam.Anchor, ...],
    metrics: tuple[cdam.Metric, ...],
    out: Path,
    limit: int | None,
    model: str,
    addresses: tuple[str, ...],
    examples: int,
    overwrite: bool,
    **options: Any,
) -> None:
    """Measure what is not measured yet, put all of it together, and write the report."""
    _check_extra()
    _check_distinct(methods, metrics)
    check_there(dataset)
    settings = {name: options.pop(name) for name in ("seed", "resamples", "resize", "input_size")}
    servers = [server_from(address=address, **options) for address in dict.fromkeys(addresses)]
    request: dict[str, Any] = {"model": model}
    if len(servers) > 1:
        servers = _answering_first(servers, model)
    with failures(servers[0], request), servers[0].client() as client:
        samples = open_dataset(dataset, client.model(model), _finder(client, model), limit)
        about = _about(samples, client.model(model), methods, metrics, settings)
        about = replace(about, command=_command(about, out, examples, addresses))
        request |= {"methods": about.methods, "metrics": about.metrics}
        _check_folder(out, overwrite=overwrite)
        with Journal.open(out, about.header(), overwrite=overwrite) as journal:
            _tell_known(about, journal)
            measuring = _Measuring(about, journal, client, servers)
            measuring.run()
            about = replace(about, resolved=journal.protocol)
            results = _gather(about, journal)
            if not results.table.samples:
                raise Failure(f"no sample could be measured: {_reasons(results, out / FILE)}")
            shown = _examples(about, journal, client, examples)
            written = _write(out, about, journal, results, shown)
    click.echo(terminal.summary(about, results))
    if results.table.failures:
        click.echo(f"{results.table.failures} failed: {_reasons(results, out / 'report.html')}", err=True)
    click.echo("\n" + "\n".join(map(str, written)))


def _check_extra() -> None:
    if missing := [name for name in _EXTRA if find_spec(name) is None]:
        raise Failure(f"the report needs {', '.join(missing)}: install cdam-serve with its extra `report`")


def _answering_first(servers: Sequence[Server], model: str) -> list[Server]:
    """The servers, those that do not answer last; a line is said of each of these."""
    answering, silent = [], []
    for server in servers:
        try:
            with server.client() as client:
                client.model(model)
        except (cdam.Unavailable, cdam.DeadlineExceeded):
            silent.append(server)
        except cdam.CdamError:  # which the evaluation itself will say
            answering.append(server)
        else:
            answering.append(server)
    if answering:
        for server in silent:
            click.echo(f"no server answers at {server.address}; going on with the others", err=True)
    return answering + silent


def _tell_known(about: About, journal: Journal) -> None:
    if known := sum(map(journal.has, _ids(about.dataset))):
        click.echo(f"going on: {known} of {len(about.dataset)} samples are known", err=True)


def _check_distinct(*given: Sequence[Any]) -> None:
    for values in given:
        if twice := [value for index, value in enumerate(values) if value in values[:index]]:
            raise click.UsageError(f"{spelled(twice[0])} is given twice")


def _check_folder(out: Path, *, overwrite: bool) -> None:
    """Refuse to write over what a run of this command has not written; with --overwrite, nothing old stays."""
    there = [name for name in files.NAMES if (out / name).exists()]
    if overwrite:
        for name in there:
            (out / name).unlink()
    elif there and not (out / FILE).exists():
        raise click.UsageError(f"{out / there[0]} is there, but no {FILE}; -o another folder, or --overwrite")


def _finder(client: cdam.Client, model: str) -> Callable[[cdam.Concept], cdam.Concept]:
    def find(concept: cdam.Concept) -> cdam.Concept:
        found = client.concept(concept.name, id=concept.id, model="" if concept.id else model)
        return cdam.Concept(id=found.id, similarity=concept.similarity, label=found.name)

    return find


def _about(
    dataset: Dataset,
    model: cdam.Model,
    methods: Sequence[cdam.Method | cdam.Anchor],
    metrics: Sequence[cdam.Metric],
    settings: dict[str, Any],
) -> About:
    """What is to be evaluated, with the command's defaults filled in.

    Raises:
        click.UsageError: if the dataset has not what it needs.
    """
    metrics = metrics or _default_metrics(dataset)
    methods = methods or _default_methods(dataset, model, metrics)
    for need, kind in _needs(methods, metrics):
        if need not in dataset.somewhere:
            raise click.UsageError(f"{kind} needs samples with a {need}, which {dataset.name} has not")
    return About(model, dataset, methods, metrics, **settings)


def _command(about: About, out: Path, examples: int, addresses: Sequence[str]) -> str:
    """How to have the same again, but for credentials."""
    words = ["cdam", "evaluate", about.dataset.name, "-o", str(out)]
    if about.dataset.limit is not None:
        words += ["--limit", str(about.dataset.limit)]
    words += [word for name in about.method_names for word in ("-m", name)]
    words += [word for name in about.metric_names for word in ("--metric", name)]
    words += ["--model", about.model.name, "--seed", str(about.seed)]
    if about.resize:
        words += ["--resize", about.resize]
    if about.input_size:
        words += ["--input-size", "{}x{}".format(*about.input_size)]
    words += ["--resamples", str(about.resamples), "--examples", str(examples)]
    return shlex.join([*words, *(word for address in addresses for word in ("--server", address))])


def _default_metrics(dataset: Dataset) -> list[cdam.Metric]:
    every: list[cdam.Metric] = [
        cdam.Fidelity(),
        cdam.Compactness(),
        cdam.MaskAgreement(),
        _FEWER_BOXES,
        cdam.Counterfactual(),
    ]
    return [metric for metric in every if _fits(dataset, metric.kind, metric.requires)]


def _default_methods(
    dataset: Dataset, model: cdam.Model, metrics: Sequence[cdam.Metric]
) -> list[cdam.Method | cdam.Anchor]:
    methods: list[cdam.Method | cdam.Anchor] = [method for method in _METHODS if method.kind not in model.unsupported]
    needs = [need for need, what in _needs([cdam.Anchor.MASK], metrics) if what.startswith("mask")]
    if _fits(dataset, "the anchor mask", needs):
        methods.append(cdam.Anchor.MASK)
    return methods


def _fits(dataset: Dataset, what: str, needs: Sequence[str]) -> bool:
    """Whether every sample has what is needed; said if only some have."""
    missing = [need for need in needs if need not in dataset.everywhere]
    if missing and set(missing) <= dataset.somewhere:
        need = missing[0]
        click.echo(f"{what} is left out: {printable(dataset.lacking[need])} has no {need}", err=True)
    return not missing


def _needs(methods: Sequence[cdam.Method | cdam.Anchor], metrics: Sequence[cdam.Metric]) -> Iterator[tuple[str, str]]:
    """What samples need to have, and for what."""
    masks = [method.kind for method in methods if method in _MASKS]
    for metric in metrics:
        for need in metric.requires:
            yield need, metric.kind
        if metric.kind == "class_discrimination" and masks:
            yield "wrong_mask", f"{masks[0]} with class_discrimination"
    for kind in masks:
        yield "mask", kind


class _Measuring:
    """Measures what the journal has not."""

    def __init__(self, about: About, journal: Journal, client: cdam.Client, servers: Sequence[Server]) -> None:
        self._about = about
        self._journal = journal
        self._client = client
        self._servers = servers
        self._digests: dict[str, str] = {}  # of those under way
        self._progress = _Progress(len(about.dataset))
        self._noted = False  # the protocol, of this run

    def run(self) -> None:
        """Measure until all samples are answered.

        Raises:
            Aborted: if the user ends it.
            Failure: if the evaluation as a whole fails.
        """
        start = time.monotonic()
        try:
            with self._progress, self._evaluation() as evaluation:
                for result in evaluation:
                    self._note(evaluation)
                    record = _record(result, self._digests.pop(result.id))
                    with uninterrupted():  # else what is kept and what is counted could differ
                        self._journal.add(record, time.monotonic() - start)
                        self._progress.done(failed=record.failed)
        except KeyboardInterrupt:
            raise Aborted(self._kept() or "nothing was measured") from None
        except (cdam.RpcError, cdam.MalformedResponse) as error:
            if kept := self._kept():
                raise Failure(f"{self._of_all(error)}; {kept}") from error
            raise
        finally:
            self.seconds = time.monotonic() - start

    def _note(self, evaluation: cdam.Evaluation) -> None:
        started = evaluation.started
        if started is not None and not self._noted:
            self._journal.note(resolved(started.protocol))
            self._noted = True

    def _evaluation(self) -> cdam.Evaluation:
        about = self._about
        return self._client.evaluate(
            self._samples(),
            methods=about.methods,
            metrics=about.metrics,
            model=about.model.name,
            seed=about.seed,
            resize=about.resize,
            input_size=about.input_size,
            servers=[server.address for server in self._servers[1:]],
            bootstrap_resamples=about.resamples,
        )

    def _samples(self) -> Iterator[cdam.Sample]:
        for sample in self._about.dataset:
            its_digest = digest(sample)
            if self._journal.measured(sample.id, its_digest):
                self._progress.skipped()
            else:
                self._digests[sample.id] = its_digest
                self._progress.begun()
                yield sample

    def _of_all(self, error: cdam.RpcError | cdam.MalformedResponse) -> str:
        if isinstance(error, cdam.Unavailable | cdam.Unauthenticated | cdam.PermissionDenied):
            return f"{', '.join(server.address for server in self._servers)}: {describe(error)}"
        return _said(error)

    def _kept(self) -> str:
        """What is in the journal, and how to go on."""
        measured = self._progress.measured
        if not measured:
            return ""
        total = len(self._about.dataset)
        return f"{measured} of {total} samples are measured and kept; the same command goes on from there"


def _record(result: cdam.SampleResult, its_digest: str) -> Record:
    error = result.error
    if error is None:
        values = [(v.method_index, v.metric_index, v.quantity, v.value, v.curve) for v in result.values]
        return Record(result.id, its_digest, values)
    return Record(result.id, its_digest, (), _code(error), _said(error))


def _code(error: Exception) -> str:
    """The gRPC code, also of what did not come as far as the server."""
    match error:
        case cdam.RpcError():
            return error.code.name
        case FileNotFoundError():
            return "NOT_FOUND"
        case PermissionError():
            return "PERMISSION_DENIED"
        case cdam.MalformedResponse():
            return "INTERNAL"
        case _:
            return "INVALID_ARGUMENT"


def _said(error: Exception) -> str:
    match error:
        case cdam.RpcError():
            return describe(error)
        case OSError():
            return describe_os(error)
        case UnicodeEncodeError():
            return "its name is not UTF-8; give the file another"
        case _:
            return str(error)


class _Progress:
    """A bar on a terminal; elsewhere a line every so often."""

    def __init__(self, total: int) -> None:
        self.measured = 0
        self._total = total
        self._answered = 0
        self._failed = 0
        self._skipped = 0
        self._start = self._told = time.monotonic()
        self._bar: Any = None

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=self._total, unit="sample", file=sys.stderr, dynamic_ncols=True, smoothing=0.1)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def begun(self) -> None:
        """A sample is under way; until the first has its result the bar does not move."""
        if self._bar is not None and not self._answered and not self._bar.postfix:
            self._bar.set_postfix_str("first samples under way")

    def skipped(self) -> None:
        """A sample was measured by an earlier run."""
        self._skipped += 1
        self.measured += 1
        if self._bar is not None:
            self._bar.initial += 1  # of which the rate knows nothing
            self._bar.update(0)
            self._bar.n += 1

    def done(self, *, failed: bool) -> None:
        """A sample was answered."""
        self._answered += 1
        self._failed += failed
        self.measured += not failed
        if self._bar is not None:
            self._bar.set_postfix_str(f"failed={self._failed}" if self._failed else "", refresh=False)
            self._bar.update()
        elif time.monotonic() - self._told >= _EVERY:
            self._told = time.monotonic()
            self._tell()

    def _tell(self) -> None:
        done = self._skipped + self._answered
        rate = self._answered / (time.monotonic() - self._start)
        failed = f", {self._failed} failed" if self._failed else ""
        left = (self._total - done) / rate
        click.echo(f"{done} of {self._total} samples{failed}, {rate:.2g} a second, {left:.0f} s left", err=True)


def _ids(dataset: Dataset) -> Iterator[str]:
    return (sample.id for sample in dataset)


def _gather(about: About, journal: Journal) -> Results:
    records = journal.records(_ids(about.dataset))
    return gather(records, len(about.methods), seed=about.seed, resamples=about.resamples)


def _reasons(results: Results, rest: Path) -> str:
    reasons = [f"{printable(record.id)}: {printable(record.message)}" for record in results.failed]
    more = results.table.failures - _REASONS
    return "; ".join(reasons[:_REASONS]) + (f"; and {more} more in {rest}" if more > 0 else "")


def _examples(about: About, journal: Journal, client: cdam.Client, count: int) -> list[Example]:
    """The first samples that could be measured, explained."""
    measured = (sample for sample in about.dataset if journal.has(sample.id))
    try:
        return [_example(about, client, sample) for sample in islice(measured, count)]
    except (cdam.CdamError, OSError) as error:
        click.echo(f"the report goes without maps: {_said(error)}", err=True)
        return []


def _example(about: About, client: cdam.Client, sample: cdam.Sample) -> Example:
    methods = [method for method in about.methods if not isinstance(method, cdam.Anchor)]
    places = [index for index in range(len(about.methods)) if not about.is_anchor(index)]
    image = picture(upright(sample.image))
    # Without a method there is still the target's probability to be told.
    settings: dict[str, Any] = {"model": about.model.name, "resize": about.resize, "input_size": about.input_size}
    explanation = client.explain(sample.image, sample.target, methods=methods or (cdam.Cdam(),), **settings)
    target = explanation.targets[0]
    return Example(
        id=sample.id,
        target=target.label,
        probability=target.probability,
        image=image,
        mask=None if sample.mask is None else outside_faded(image, upright_mask(sample.mask)),
        maps={place: relevance.overlay(image) for place, relevance in zip(places, explanation.maps, strict=False)},
    )


def _write(out: Path, about: About, journal: Journal, results: Results, examples: Sequence[Example]) -> list[Path]:
    """Write everything, and return what was written."""
    written = [out / "report.html", out / "summary.json", out / "samples.csv"]
    files.write_csv(out / "samples.csv", about, journal.records(_ids(about.dataset)))
    if files.write_parquet(out / "samples.parquet", about, journal.records(_ids(about.dataset))):
        written.append(out / "samples.parquet")
    files.write_summary(out / "summary.json", about, results, journal.seconds)
    write_page(out / "report.html", about, results, examples, journal.seconds)
    return written
