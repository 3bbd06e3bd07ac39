"""How true a map is: the papers' metrics, measured on samples."""

from cdam_engine.evaluation.evaluated import Anchor, Evaluated
from cdam_engine.evaluation.evaluator import Evaluator
from cdam_engine.evaluation.geometry import Enlargement, Geometry
from cdam_engine.evaluation.metrics import (
    METRICS,
    BoxSensitivity,
    ClassDiscrimination,
    Compactness,
    Cost,
    Counterfactual,
    Fidelity,
    Found,
    InsertionDeletion,
    Localisation,
    MaskAgreement,
    Metric,
    Normalisation,
    OfMaps,
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
    "Cost",
    "Counterfactual",
    "Enlargement",
    "Evaluated",
    "Evaluator",
    "Fidelity",
    "Found",
    "Geometry",
    "InsertionDeletion",
    "Localisation",
    "MaskAgreement",
    "Measured",
    "Metric",
    "Normalisation",
    "OfMaps",
    "ParameterError",
    "Protocol",
    "Randomisation",
    "Sample",
    "SampleError",
    "Sparseness",
    "Unit",
    "Value",
]
