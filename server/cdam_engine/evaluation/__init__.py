"""How true a map is: the papers' metrics, measured on samples."""

from cdam_engine.evaluation.evaluated import Anchor, Evaluated
from cdam_engine.evaluation.evaluator import Evaluator
from cdam_engine.evaluation.geometry import Enlargement, Geometry
from cdam_engine.evaluation.metrics import (
    METRICS,
    BoxSensitivity,
    ClassDiscrimination,
    Compactness,
    Counterfactual,
    Fidelity,
    InsertionDeletion,
    Localisation,
    MaskAgreement,
    Metric,
    Normalisation,
    ParameterError,
    Randomisation,
    Sparseness,
)
from cdam_engine.evaluation.perturbation import Unit
from cdam_engine.evaluation.protocol import Protocol
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
    "Geometry",
    "InsertionDeletion",
    "Localisation",
    "MaskAgreement",
    "Measured",
    "Metric",
    "Normalisation",
    "ParameterError",
    "Protocol",
    "Randomisation",
    "Sample",
    "SampleError",
    "Sparseness",
    "Unit",
    "Value",
]
