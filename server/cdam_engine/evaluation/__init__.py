"""How true a map is: the papers' metrics, measured on samples."""

from cdam_engine.evaluation.evaluator import Evaluator
from cdam_engine.evaluation.protocol import (
    METRICS,
    Anchor,
    BoxSensitivity,
    ClassDiscrimination,
    Compactness,
    Counterfactual,
    Enlargement,
    Evaluated,
    Fidelity,
    InsertionDeletion,
    Localisation,
    MaskAgreement,
    Metric,
    Protocol,
    Randomisation,
    Sparseness,
    Unit,
)
from cdam_engine.evaluation.sample import Measured, Sample, SampleError, Value

__all__ = [
    "METRICS",
    "Anchor",
    "BoxSensitivity",
    "ClassDiscrimination",
    "Compactness",
    "Counterfactual",
    "Enlargement",
    "Evaluated",
    "Evaluator",
    "Fidelity",
    "InsertionDeletion",
    "Localisation",
    "MaskAgreement",
    "Measured",
    "Metric",
    "Protocol",
    "Randomisation",
    "Sample",
    "SampleError",
    "Sparseness",
    "Unit",
    "Value",
]
