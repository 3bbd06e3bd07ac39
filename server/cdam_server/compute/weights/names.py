"""Which tensors of a checkpoint are the model's, judged by the names that the model itself has.

Training code puts names before the model's own (`module.`, `model.`, `student.backbone.`), keeps averages and optimisers
beside it, and a classifier of any name. What stands before the names is found by looking for the model's own names at
the end of the checkpoint's: no list of prefixes, and no order of taking them off. Whatever is neither the model's, nor
known to be of training alone, stays and makes the file be refused; two sources for one tensor are never decided here.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor

from cdam_server.compute.weights.files import Checkpoint, StateDict
from cdam_server.settings.load_error import LoadError, few

# Modules that wrap another one, anywhere in a model, and no module of anybody's own is called so.
_TRANSPARENT: Final = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
# What wraps a network of foreign names.
_WRAPPERS: Final = frozenset(
    {"state_dict", "model_state_dict", "state_dict_ema", "model_ema", "model", "module", "net", "network", "params"}
    | {"weights", "backbone", "student", "teacher", "ema"}
)
# timm's: of a checkpoint with both, the average is the model (`use_ema` of timm.models.load_checkpoint).
_AVERAGES: Final = {"state_dict_ema": "state_dict", "model_ema": "model"}
# Counters of averages, which are no weights.
_COUNTERS: Final = {"n_averaged", "num_updates", "decay", "initted", "step", "epoch", "global_step", "iteration"}
_LOSSES: Final = {"criterion", "loss", "loss_fct", "loss_fn", "loss_func", "loss_function"}
_CHUNK: Final = re.compile(r"(^|\.)blocks\.\d+\.(\d+)\.")  # DINOv2 trains blocks in chunks, numbered through
# Under which outermost keys training keeps its own state.
_TRAINING: Final = re.compile(
    r"(\w*optim\w*|\w*sched\w*|\w*scaler\w*|amp|loops|callbacks|\w*rng\w*|args|config|hparams|hyper_parameters|history|metrics|random\w*)$"
)
# Heads of self-supervised training, and decoders of masked images.
PRETEXT_HEADS: Final = frozenset({"dino_head", "ibot_head", "projector", "projection_head", "predictor", "prototypes"})
_SURE_PRETEXT: Final = {"dino_head", "ibot_head"}
_PRETEXT: Final = re.compile(r"(mask_token|queue|queue_ptr)$|decoder_(embed|pos_embed|blocks|norm|pred)(\.|$)")
_NORMED: Final = re.compile(r"last_layer\.(weight_[gv]|parametrizations\.)")  # DINO's prototypes
CLASSIFIERS: Final = frozenset(
    {"head", "heads", "fc", "classifier", "linear", "mlp_head", "cls_head", "class_head", "classification_head"}
    | {"classifier_head", "linear_head", "prediction_head", "output_layer", "fc_out", "logits", "head_dist", "clf"}
    | {"predictor"}
)
"""Names under which a classifier may stand beside a backbone, or in it."""
_NATIVE: Final = 0.3  # of its own names found, the checkpoint is in the model's naming
_COPY: Final = 0.5  # of the tensors found, another place holds the network a second time


@dataclass
class Selection:
    """What a checkpoint has for a model.

    Attributes:
        prefix: What stood before the model's names, with its last dot; "" if nothing.
        weights: The backbone's tensors, under the model's names where these are known, and whatever stood among them.
        classifiers: Tensors of classifiers by the classifier's name in the file, then by the name within.
        left_out: What is not the model's, for the log.
        outside: What of the weights stands outside the network and is of no known kind.
        native: Whether the names are the model's own; else they are for a conversion.
    """

    prefix: str = ""
    weights: StateDict = field(default_factory=dict)
    classifiers: dict[str, StateDict] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)
    native: bool = True


def select(checkpoint: Checkpoint, own: Collection[str], setting: str, key: str | None = None) -> Selection:
    """Find a model's tensors in a checkpoint.

    Args:
        checkpoint: All tensors of the file.
        own: Names of the model's state dict without its classifier.
        setting: Name of the setting, for errors.
        key: The part of the file that holds the weights, where its author says so.

    Raises:
        LoadError: The part is not there, there are two sources for one tensor, or what is there is no plain weights.
    """
    tensors = without_wrappers(checkpoint.tensors, setting)
    _refuse_adapters(tensors, setting)
    found = _places(tensors, own)
    if key is not None:
        found = {prefix: names for prefix, names in found.items() if _names_part(key, prefix)}
        if not any(_names_part(key, name) for name in tensors):
            raise LoadError("weights_key", f"there is no {key!r} in {checkpoint.source}; it has {_parts(tensors)}")
    best = max(found, key=lambda prefix: len(found[prefix]), default=None)
    if best is None or len(found[best]) < _NATIVE * min(len(own), len(tensors)):
        return _foreign(checkpoint, tensors, key, setting)
    best, copies = _one_place(checkpoint, tensors, found, best, setting)
    return _sort(checkpoint, tensors, own, found, best, copies, strict=key is None)


def without_wrappers(tensors: Mapping[str, Tensor], setting: str) -> StateDict:
    """Names without the wrappers that stand between them."""
    plain: StateDict = {}
    origins: dict[str, str] = {}
    for name, tensor in tensors.items():
        short = ".".join(part for part in name.split(".") if part not in _TRANSPARENT)
        short = _CHUNK.sub(r"\1blocks.\2.", short)
        if short in plain and not _equal(plain[short], tensor):
            raise LoadError(setting, f"there are two sources for {short}: {origins[short]} and {name}")
        plain[short], origins[short] = tensor, name
    return plain


def _refuse_adapters(tensors: Mapping[str, Tensor], setting: str) -> None:
    """What is no plain weights, though its names look so.

    Raises:
        LoadError: Adapters, shards, or integers that stand for numbers.
    """
    if found := [name for name in tensors if re.search(r"\blora_|\.lora\.|hada_w|adapter_layer", name)]:
        raise LoadError(
            setting,
            f"it holds an adapter ({few(found, 2)}): merge it into its base model (peft: merge_and_unload) and save that",
        )
    if found := [name for name in tensors if re.search(r"(^|\.|_)flat_param", name)]:
        raise LoadError(
            setting, f"it is a shard of FSDP ({few(found, 2)}): save a full state dict (StateDictType.FULL_STATE_DICT)"
        )
    quantised = re.compile(
        r"(zero_point|_packed_params\w*|weight_scale|scale_inv|\.SCB|absmax|quant_map|qzeros|qweight)$"
    )
    found = [name for name, tensor in tensors.items() if quantised.search(name) or tensor.is_quantized]
    found += [name for name, tensor in tensors.items() if name.endswith(".weight") and tensor.dtype in _INTEGERS]
    if found:
        raise LoadError(setting, f"it holds quantised weights ({few(found, 2)}): save them as floating-point numbers")


_INTEGERS: Final = {torch.int8, torch.uint8, torch.int16, torch.int32}


def _places(tensors: Mapping[str, Tensor], own: Collection[str]) -> dict[str, dict[str, str]]:
    """What stands before the model's names: prefix -> {the model's name: the file's name}."""
    names = set(own)
    dotless = {name.replace(".", ""): name for name in names}  # averages of latent-diffusion code
    places: dict[str, dict[str, str]] = {}
    for name in tensors:
        parts = name.split(".")
        for start in range(len(parts)):
            prefix, rest = "".join(f"{part}." for part in parts[:start]), ".".join(parts[start:])
            if rest in names:
                places.setdefault(prefix, {})[rest] = name
            elif start == len(parts) - 1 and start and rest in dotless:
                places.setdefault(prefix, {})[dotless[rest]] = name
    return places


def _names_part(key: str, path: str) -> bool:
    """Whether a dotted path goes through the part that a key names."""
    return f".{key}." in f".{_dotless(path)}."


def _one_place(
    checkpoint: Checkpoint,
    tensors: Mapping[str, Tensor],
    places: Mapping[str, Mapping[str, str]],
    best: str,
    setting: str,
) -> tuple[str, list[str]]:
    """The place of the network, and those of its equal or averaged copies.

    Raises:
        LoadError: There are two that differ.
    """
    copies = []
    for place in places:
        shared = [name for name in places[place] if name in places[best]]
        if place == best or len(places[place]) < _COPY * len(places[best]) or not shared:
            continue
        pairs = [(name, places[best][name], places[place][name]) for name in shared]
        pairs += _around(tensors, best, place)
        other = next((pair for pair in pairs if not _equal(tensors.get(pair[1]), tensors.get(pair[2]))), None)
        if other is None:
            copies.append(place)
            continue
        average = _average(checkpoint, place, best)
        if average is None:
            keys = " or ".join(filter(None, (_dotless(best), _dotless(place))))
            raise LoadError(
                setting,
                f"there are two sources for {other[0]}: {other[1]} and {other[2]}; say which with weights_key: {keys}",
            )
        copies.append(place if average == best else best)
        best = average
    return best, copies


def _around(tensors: Mapping[str, Tensor], best: str, place: str) -> list[tuple[str, str, str]]:
    """What stands around two copies of the network, a classifier above all: (name, in the one, in the other)."""
    ends = best.split(".")[:-1], place.split(".")[:-1]
    while all(ends) and ends[0][-1] == ends[1][-1]:  # what is called the same in both
        for end in ends:
            end.pop()
    roots = ["".join(f"{part}." for part in end) for end in ends]
    if not all(roots):
        return []
    rests = {name.removeprefix(root) for root in roots for name in tensors if name.startswith(root)}
    return [
        (rest, roots[0] + rest, roots[1] + rest) for rest in sorted(rests) if rest.rpartition(".")[2] not in _COUNTERS
    ]


def _average(checkpoint: Checkpoint, *places: str) -> str | None:
    """Which of two places is timm's average of the other, where both are containers of the file."""
    by_container = {place.partition(".")[0]: place for place in places}
    for average, plain in _AVERAGES.items():
        if {average, plain} == by_container.keys() and {average, plain} <= set(checkpoint.keys):
            return by_container[average]
    return None


def _sort(
    checkpoint: Checkpoint,
    tensors: Mapping[str, Tensor],
    own: Collection[str],
    places: Mapping[str, Mapping[str, str]],
    prefix: str,
    copies: list[str],
    *,
    strict: bool,
) -> Selection:
    """Every tensor to where it belongs; what is of no known kind goes to the weights, where it is refused."""
    found = places[prefix]
    chosen = Selection(prefix, {name: tensors[origin] for name, origin in found.items()})
    used = set(found.values())
    copied = {name for copy in copies for name in places[copy].values()}
    roots = tuple(filter(None, (_root(copy, prefix) for copy in copies)))
    container = _container(checkpoint, prefix)
    for name, tensor in tensors.items():
        if name in used:
            continue
        if name in copied or any(name.startswith(root) for root in roots):
            chosen.left_out.append(name)
        elif (classifier := _classifier(name, prefix)) is not None:
            chosen.classifiers.setdefault(classifier[0], {})[classifier[1]] = tensor
        elif name.startswith(prefix) and not _foreign_container(checkpoint, name, container):
            inner = name.removeprefix(prefix)
            if _is_counter(inner, tensor) or _is_loss(inner, tensor) or (_PRETEXT.match(inner) and inner not in own):
                chosen.left_out.append(name)
                if inner != "mask_token":
                    continue
            chosen.weights[inner] = tensor  # for the architecture's conversion, or to be refused
        elif not strict or is_of_training(checkpoint, name, prefix):
            chosen.left_out.append(name)
        else:
            chosen.weights[name] = tensor
            chosen.outside.append(name)
    return chosen


def _root(copy: str, place: str) -> str:
    """Where a copy of the network at `place` begins, with all that is around it: the first part that differs."""
    root = ""
    for part in copy.split(".")[:-1]:
        root += f"{part}."
        if not place.startswith(root):
            return root
    return ""


def _classifier(name: str, prefix: str) -> tuple[str, str] | None:
    """(the classifier's name, the tensor's name in it), for one in the backbone or in what wraps it."""
    parts = name.split(".")
    for start, part in enumerate(parts[:-1]):
        if part in CLASSIFIERS or part in PRETEXT_HEADS:
            outer = "".join(f"{each}." for each in parts[:start])
            return (f"{outer}{part}", ".".join(parts[start + 1 :])) if prefix.startswith(outer) else None
    return None


def is_pretext(name: str, tensors: Iterable[str]) -> bool:
    """Whether a head is one of self-supervised training, which nobody asks for its outputs."""
    names = list(tensors)
    several = len({tensor.rpartition(".")[0] for tensor in names}) > 1  # one linear layer may be a classifier
    last = name.rpartition(".")[2]
    return (
        last in _SURE_PRETEXT or (several and last in PRETEXT_HEADS) or any(_NORMED.search(tensor) for tensor in names)
    )


def _is_counter(name: str, tensor: Tensor) -> bool:
    return tensor.numel() == 1 and name.rpartition(".")[2] in _COUNTERS


def _is_loss(name: str, tensor: Tensor) -> bool:
    """Weights of classes in a loss; a matrix may be a classifier that lives in one."""
    return tensor.ndim < 2 and name.partition(".")[0] in _LOSSES


def is_of_training(checkpoint: Checkpoint, name: str, prefix: str) -> bool:
    """Whether a tensor outside the network is one of training alone.

    A number may be a temperature where it lies in one mapping with the network; elsewhere it is a figure of training.

    Args:
        checkpoint: The file.
        name: The tensor's, wrappers within names being off.
        prefix: What stands before the network's names.
    """
    tensor, parts = checkpoint.tensors.get(name), name.split(".")
    small = tensor is not None and tensor.ndim < 2
    container = _container(checkpoint, prefix)
    apart = bool(container) and not name.startswith(f"{container}.")
    return (
        (tensor is not None and tensor.numel() == 1 and (apart or parts[-1] in _COUNTERS))
        or _PRETEXT.match(parts[-1]) is not None
        or (small and any(part in _LOSSES for part in parts))
        or _is_trainings(checkpoint, name)
    )


def _is_trainings(checkpoint: Checkpoint, name: str) -> bool:
    """Whether a tensor lies under a key of the file that holds training's own state."""
    key = name.partition(".")[0]
    return key in checkpoint.keys and _TRAINING.match(key) is not None


def _container(checkpoint: Checkpoint, prefix: str) -> str:
    """The innermost mapping of the file in which the network is."""
    path = _dotless(prefix)
    within = [c for c in checkpoint.containers if not c or path == c or path.startswith(f"{c}.")]
    return max(within, key=len, default="")


def _foreign_container(checkpoint: Checkpoint, name: str, container: str) -> bool:
    """Whether a tensor lies in another mapping of the file than the network."""
    return any(
        len(other) > len(container) and other.startswith(container) and name.startswith(f"{other}.")
        for other in checkpoint.containers
    )


def _foreign(checkpoint: Checkpoint, tensors: StateDict, key: str | None, setting: str) -> Selection:
    """All that may be weights, in names that are not the model's, without what wraps it."""
    kept = {
        name: tensor
        for name, tensor in tensors.items()
        if (key is None or _names_part(key, name)) and not _is_trainings(checkpoint, name)
    }
    if not kept:
        raise LoadError(setting, f"there are no weights in {checkpoint.source}, but {_parts(tensors)}")
    prefix = ""
    while True:
        first = {name.partition(".")[0] for name in kept}
        if len(first) != 1 or not (first <= _WRAPPERS or (key is not None and key.split(".")[0] in first)):
            break
        (part,) = first
        if any("." not in name for name in kept):
            break
        prefix += f"{part}."
        kept = {name.partition(".")[2]: tensor for name, tensor in kept.items()}
    left_out = [name for name in tensors if name.removeprefix(prefix) not in kept]
    return Selection(prefix, kept, {}, left_out, native=False)


def _parts(tensors: Iterable[str]) -> str:
    """The outermost parts of a file's names."""
    return few([part for part, _ in Counter(name.partition(".")[0] for name in tensors).most_common()], 10)


def _dotless(prefix: str) -> str:
    return prefix.removesuffix(".")


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    plain = a.layout == b.layout == torch.strided and not a.is_meta and not b.is_meta
    return a is b or (plain and a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b))
