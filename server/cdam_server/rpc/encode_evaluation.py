"""From the use case's answers to the messages of an evaluation."""

from cdam.statistics import Comparison, Row, Table
from cdam.v1 import common_pb2, evaluation_pb2
from cdam_engine.evaluation import Anchor, Evaluated, Measured, Value
from cdam_server.rpc.encode import preprocessing, tensor
from cdam_server.rpc.methods import encode_method
from cdam_server.rpc.metrics import ANCHORS, encode_metric
from cdam_server.usecases.evaluate import Evaluation


def started(evaluation: Evaluation, expected_samples: int) -> evaluation_pb2.EvaluateResponse:
    """What the evaluation is of, every choice made.

    Args:
        evaluation: The evaluation.
        expected_samples: As the request says.
    """
    protocol, model = evaluation.protocol, evaluation.model
    message = evaluation_pb2.EvaluationProtocol(
        model=model.name,
        methods=map(_evaluated, protocol.methods),
        metrics=map(encode_metric, protocol.metrics),
        seed=protocol.seed,
        preprocessing=preprocessing(evaluation.resize, evaluation.input_size),
        expected_samples=expected_samples,
        bootstrap_resamples=evaluation.resamples,
    )
    return evaluation_pb2.EvaluateResponse(
        started=evaluation_pb2.EvaluationStarted(
            model=model.name, model_fingerprint=model.fingerprint, protocol=message
        )
    )


def measured(sample_id: str, answer: Measured) -> evaluation_pb2.EvaluateResponse:
    """All that was measured of a sample."""
    values = evaluation_pb2.MetricValues(values=map(_value, answer.values))
    return evaluation_pb2.EvaluateResponse(result=evaluation_pb2.SampleResult(sample_id=sample_id, measured=values))


def failure(sample_id: str, error: common_pb2.ItemError) -> evaluation_pb2.EvaluateResponse:
    """Why a sample could not be measured."""
    return evaluation_pb2.EvaluateResponse(result=evaluation_pb2.SampleResult(sample_id=sample_id, error=error))


def table(found: Table) -> evaluation_pb2.EvaluateResponse:
    """The final table."""
    message = evaluation_pb2.EvaluationTable(
        rows=map(_row, found.rows),
        comparisons=map(_comparison, found.comparisons),
        samples=found.samples,
        failures=found.failures,
    )
    return evaluation_pb2.EvaluateResponse(table=message)


def _value(item: Value) -> evaluation_pb2.MetricValue:
    return evaluation_pb2.MetricValue(
        method_index=item.method_index,
        metric_index=item.metric_index,
        quantity=item.quantity,
        value=item.value,
        curve=None if item.curve is None else tensor(item.curve),
    )


def _row(row: Row) -> evaluation_pb2.EvaluationRow:
    return evaluation_pb2.EvaluationRow(
        method_index=row.method_index,
        metric_index=row.metric_index,
        quantity=row.quantity,
        mean=row.mean,
        standard_error=row.standard_error,
        interval_low=row.interval_low,
        interval_high=row.interval_high,
        samples=row.samples,
    )


def _comparison(comparison: Comparison) -> evaluation_pb2.EvaluationComparison:
    return evaluation_pb2.EvaluationComparison(
        method_index=comparison.method_index,
        other_method_index=comparison.other_method_index,
        metric_index=comparison.metric_index,
        quantity=comparison.quantity,
        mean_difference=comparison.mean_difference,
        interval_low=comparison.interval_low,
        interval_high=comparison.interval_high,
    )


# --- the protocol


def _evaluated(item: Evaluated) -> evaluation_pb2.EvaluatedMethod:
    if isinstance(item, Anchor):
        return evaluation_pb2.EvaluatedMethod(anchor=ANCHORS[item])
    return evaluation_pb2.EvaluatedMethod(method=encode_method(item))
