"""The metrics, one file a family."""

from __future__ import annotations

from typing import Final

from cdam_engine.evaluation.metrics.base import Better, Cost, Found, Metric, OfMaps, ParameterError
from cdam_engine.evaluation.metrics.boxes import BoxSensitivity
from cdam_engine.evaluation.metrics.counterfactual import Counterfactual
from cdam_engine.evaluation.metrics.curves import Fidelity, InsertionDeletion
from cdam_engine.evaluation.metrics.discrimination import ClassDiscrimination
from cdam_engine.evaluation.metrics.localisation import Localisation, Normalisation
from cdam_engine.evaluation.metrics.maps import Compactness, Sparseness
from cdam_engine.evaluation.metrics.masks import MaskAgreement
from cdam_engine.evaluation.metrics.randomisation import Randomisation

METRICS: Final[dict[str, type[Metric]]] = {
    metric.kind: metric
    for metric in (
        Fidelity,
        BoxSensitivity,
        ClassDiscrimination,
        Compactness,
        MaskAgreement,
        InsertionDeletion,
        Sparseness,
        Randomisation,
        Counterfactual,
        Localisation,
    )
}
"""Every metric by its name; each can be made without parameters."""

__all__ = [
    "METRICS",
    "Better",
    "BoxSensitivity",
    "ClassDiscrimination",
    "Compactness",
    "Cost",
    "Counterfactual",
    "Fidelity",
    "Found",
    "InsertionDeletion",
    "Localisation",
    "MaskAgreement",
    "Metric",
    "Normalisation",
    "OfMaps",
    "ParameterError",
    "Randomisation",
    "Sparseness",
]
