"""The client of cdam-serve: explanations of Vision Transformers over gRPC.

    import cdam

    with cdam.Client("localhost:8001") as client:
        explanation = client.explain("scene.png", targets=["7", cdam.TopK(3)])
        for relevance in explanation:
            print(relevance.label, relevance.method.kind, relevance.scores.sum())
        explanation["7"].overlay().save("seven.png")

        loops = client.register_concept("loops", Path("loops").glob("*.png"))
        client.explain("scene.png", [loops, cdam.Contrast(cdam.Concept("loops"), "7")])

`AsyncClient` is the same for asyncio. Errors are drawn as a tree in `CdamError`'s module and all derive from it.
"""

from cdam import render
from cdam._async_client import AsyncClient
from cdam._channel import TLS, Connection
from cdam._client import Client
from cdam._concept_file import load_concept, save_concept
from cdam._concepts import ConceptExample, RegisteredConcept
from cdam._encode import Priority, Resize, encode_explain
from cdam._errors import (
    Aborted,
    AlreadyExists,
    CdamError,
    ConceptFileError,
    DeadlineExceeded,
    FailedPrecondition,
    FieldViolation,
    ImageError,
    Internal,
    InvalidArgument,
    MalformedResponse,
    NotFound,
    Overloaded,
    PermissionDenied,
    ResourceExhausted,
    RpcError,
    Unauthenticated,
    Unavailable,
    Unimplemented,
    VersionMismatch,
)
from cdam._evaluation import (
    EvaluationProgress,
    EvaluationProtocol,
    EvaluationStarted,
    MetricValue,
    Sample,
    SampleResult,
)
from cdam._explanation import AppliedPreprocessing, ExplainedTarget, Explanation, Geometry, Parts, RelevanceMap, Timing
from cdam._images import ImageLike, MaskLike
from cdam._items import Item, ItemResult
from cdam._methods import (
    METHODS,
    Attention,
    AttentionRollout,
    Cdam,
    InputXGradient,
    IntegratedCdam,
    IntegratedGradients,
    Method,
    MethodKind,
    MethodLike,
    Noise,
    PartialLrp,
    PatchMaskPrediction,
    Quadrature,
    RelevancePropagation,
    SmoothCdam,
    SmoothGrad,
    TokenAblation,
)
from cdam._metrics import (
    BETTER,
    METRICS,
    Anchor,
    BoxSensitivity,
    ClassDiscrimination,
    Compactness,
    Counterfactual,
    EvaluatedLike,
    Fidelity,
    InsertionDeletion,
    Localisation,
    MaskAgreement,
    Metric,
    MetricKind,
    MetricLike,
    Randomisation,
    Sparseness,
)
from cdam._models import Model, ModelInput
from cdam._outcome import AsyncEvaluation, Evaluation
from cdam._overlay import Background, Interpolation, Region
from cdam._targets import Concept, Contrast, Output, Similarity, Target, TargetLike, TopK
from cdam._version import __version__
from cdam.statistics import Comparison, Row, Statistics, Table

__all__ = [
    "BETTER",
    "METHODS",
    "METRICS",
    "TLS",
    "Aborted",
    "AlreadyExists",
    "Anchor",
    "AppliedPreprocessing",
    "AsyncClient",
    "AsyncEvaluation",
    "Attention",
    "AttentionRollout",
    "Background",
    "BoxSensitivity",
    "Cdam",
    "CdamError",
    "ClassDiscrimination",
    "Client",
    "Compactness",
    "Comparison",
    "Concept",
    "ConceptExample",
    "ConceptFileError",
    "Connection",
    "Contrast",
    "Counterfactual",
    "DeadlineExceeded",
    "EvaluatedLike",
    "Evaluation",
    "EvaluationProgress",
    "EvaluationProtocol",
    "EvaluationStarted",
    "ExplainedTarget",
    "Explanation",
    "FailedPrecondition",
    "Fidelity",
    "FieldViolation",
    "Geometry",
    "ImageError",
    "ImageLike",
    "InputXGradient",
    "InsertionDeletion",
    "IntegratedCdam",
    "IntegratedGradients",
    "Internal",
    "Interpolation",
    "InvalidArgument",
    "Item",
    "ItemResult",
    "Localisation",
    "MalformedResponse",
    "MaskAgreement",
    "MaskLike",
    "Method",
    "MethodKind",
    "MethodLike",
    "Metric",
    "MetricKind",
    "MetricLike",
    "MetricValue",
    "Model",
    "ModelInput",
    "Noise",
    "NotFound",
    "Output",
    "Overloaded",
    "PartialLrp",
    "Parts",
    "PatchMaskPrediction",
    "PermissionDenied",
    "Priority",
    "Quadrature",
    "Randomisation",
    "Region",
    "RegisteredConcept",
    "RelevanceMap",
    "RelevancePropagation",
    "Resize",
    "ResourceExhausted",
    "Row",
    "RpcError",
    "Sample",
    "SampleResult",
    "Similarity",
    "SmoothCdam",
    "SmoothGrad",
    "Sparseness",
    "Statistics",
    "Table",
    "Target",
    "TargetLike",
    "Timing",
    "TokenAblation",
    "TopK",
    "Unauthenticated",
    "Unavailable",
    "Unimplemented",
    "VersionMismatch",
    "__version__",
    "encode_explain",
    "load_concept",
    "render",
    "save_concept",
]
