"""The geometry of a checkpoint against the architecture's: patches, positions, depth, width.

timm resamples patch embedding and positions to whatever the model has, and the top class may be another then. Here the
file's geometry is read off its tensors; where it is not the model's, the settings that match are named, and only what
was asked for is resampled.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import timm
from torch import Tensor, nn

from cdam_server.settings.load_error import LoadError

Size = tuple[int, int]

_PATCHES: Final = re.compile(r"(patch_embed(ding|dings)?\.(proj|projection)|(^|visual\.)conv1|conv_proj)\.weight$")
_POSITIONS: Final = re.compile(r"(^|\.)(pos_embed|positional_embedding|pos_embedding|position_embeddings?(\.weight)?)$")
_PREFIX_TOKENS: Final = re.compile(r"(^|\.)(cls_token|dist_token|reg(ister)?_tokens?|storage_tokens)$")
_TABLE: Final = "relative_position_bias_table"
_EXTRA_ROWS: Final = 3  # of BEiT's table: [CLS] to patch, patch to [CLS], [CLS] to itself
# Widths of the common sizes, with their names and depths.
_SIZES: Final = {192: ("tiny", 12), 384: ("small", 12), 768: ("base", 12), 1024: ("large", 24)}


@dataclass(frozen=True)
class Geometry:
    """What tensors say of the network that they are of; None or 0 where they don't.

    Attributes:
        patch: (height, width) of a patch in pixels.
        channels: Of the image.
        width: D.
        depth: Number of blocks.
        positions: Number of learned positions, prefix tokens included as they are in the file.
        grid: Of positions that are kept as a grid (SAM), (down, across).
        prefix: Number of positions of prefix tokens, where the names tell another than the model's: DINOv2's own
            checkpoints with registers have one for [CLS].
        rows: Of the first table of relative positions.
    """

    patch: Size | None = None
    channels: int | None = None
    width: int | None = None
    depth: int = 0
    positions: int | None = None
    grid: Size | None = None
    prefix: int | None = None
    rows: int | None = None


def geometry_of(tensors: Mapping[str, Tensor]) -> Geometry:
    """What can be seen in a checkpoint or in a model's own state dict."""
    patches = next((t for name, t in tensors.items() if _PATCHES.search(name) and t.ndim == 4), None)
    towers = [name for name in tensors if name.startswith("visual.")] or tensors  # of CLIP's two
    positions = next((tensors[name] for name in towers if _POSITIONS.search(name)), None)
    table = next((t for name, t in tensors.items() if name.endswith(_TABLE)), None)
    blocks = {int(match[1]) for name in tensors if (match := re.match(r"blocks\.(\d+)\.", name))}
    return Geometry(
        patch=None if patches is None else (patches.shape[-2], patches.shape[-1]),
        channels=None if patches is None else patches.shape[1],
        width=None if patches is None else patches.shape[0],
        depth=max(blocks) + 1 if blocks else 0,
        positions=None if positions is None or positions.ndim not in {2, 3} else positions.shape[-2],
        grid=None if positions is None or positions.ndim != 4 else (positions.shape[1], positions.shape[2]),
        prefix=1 if any(name.rpartition(".")[2] == "register_tokens" for name in tensors) else None,
        rows=None if table is None else table.shape[0],
    )


@dataclass(frozen=True)
class Resampling:
    """How a model must be laid out for the file's tensors, before it takes the layout that was asked for.

    Attributes:
        size: Input size of the file's positions, in pixels.
        patch: Patch size of the file.
        text: What is resampled, for people.
    """

    size: Size
    patch: Size
    text: str


def compare(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    *,
    trained_size: Size | None,
    input_size: Size | None,
    allowed: bool,
    setting: str,
) -> Resampling | None:
    """Compare a file's geometry with the model's.

    Args:
        model: As it is to be served.
        weights: The file's tensors, before timm's conversion.
        trained_size: (height, width) that the settings say the file was made for (`model_kwargs.img_size`).
        input_size: (height, width) that the settings ask for: positions may be resampled to it.
        allowed: Whether anything may be resampled.
        setting: Name of the setting, for errors.

    Returns:
        What must be resampled, or None.

    Raises:
        LoadError: The geometries differ, and resampling was not asked for; the message has the settings that match.
    """
    embedding: Any = getattr(model, "patch_embed", None)
    if embedding is None or not hasattr(embedding, "grid_size") or _other_prefix(model.state_dict(), weights):
        return None  # in the last case the names differ, which says more
    file, own = geometry_of(weights), geometry_of(model.state_dict())
    stride: Size = tuple(embedding.feat_ratio(as_scalar=False)) if hasattr(embedding, "feat_ratio") else (16, 16)
    same_patch = file.patch is None or own.patch is None or file.patch == own.patch
    patch = stride if same_patch else (file.patch or stride)
    grid = tuple(embedding.grid_size)
    source = _grid(file, model, patch, grid, trained_size, input_size, setting)
    if not same_patch and not allowed:
        raise LoadError(setting, _other_patch(file, own, patch, source))
    if (source is None or source == grid) and same_patch:
        return None
    source = source or grid
    size = (source[0] * patch[0], source[1] * patch[1])
    if not hasattr(model, "set_input_size"):
        raise LoadError(
            setting,
            f"the file is for inputs of {_times(size)} pixels, and timm {timm.__version__} can't resample this "
            f"architecture: set {_paste(input_size=size)}",
        )
    if not allowed and (input_size is None or trained_size not in {None, size}):
        raise LoadError(setting, _other_positions(size, source, embedding))
    return Resampling(size, patch, "; ".join(_texts(same_patch, patch, stride, source, grid)))


def _other_prefix(own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> bool:
    """Whether the file, in the model's own naming, has other prefix tokens."""
    kinds = [{match[2][:3] for name in names if (match := _PREFIX_TOKENS.search(name))} for names in (own, weights)]
    return kinds[0] != kinds[1] and bool(kinds[1])


def _grid(
    file: Geometry,
    model: nn.Module,
    patch: Size,
    grid: Size,
    trained_size: Size | None,
    input_size: Size | None,
    setting: str,
) -> Size | None:
    """The file's grid of positions, (down, across); None if the file has none that the model's could differ from."""
    if file.rows is not None or file.grid is not None:
        return file.grid or _grid_of_table(file.rows or 0, grid, setting)
    embedded = getattr(model, "pos_embed", None)
    if file.positions is None or not isinstance(embedded, Tensor):
        return None
    own_prefix = embedded.shape[1] - grid[0] * grid[1]
    count = file.positions - (own_prefix if file.prefix is None else file.prefix)
    candidates = {trained_size: "model_kwargs"} if trained_size else {}
    for size in candidates:
        trained = (size[0] // patch[0], size[1] // patch[1])
        if math.prod(trained) == count:
            return trained
    side = math.isqrt(max(count, 0))
    square = side * side == count
    if math.prod(grid) == count and (grid[0] == grid[1] or not square):
        return grid
    if math.prod(grid) == count and input_size is not None:
        height, width = (side * patch[0], side * patch[1])
        raise LoadError(
            setting,
            f"its {count} positions may be a grid of {_times((side, side))} or of {_times(grid)}, which no file says: "
            f"set model_kwargs: {{img_size: {_brief((height, width))}}} or {{img_size: {list(input_size)}}}, as it was "
            "trained",
        )
    if square and side:
        return side, side
    if math.prod(grid) == count:
        return grid
    if math.isqrt(file.positions) ** 2 == file.positions and hasattr(model, "no_embed_class"):
        raise LoadError(
            setting,
            f"its {file.positions} positions are a square grid without one for [CLS]: it may need "
            "model_kwargs: {no_embed_class: true}",
        )
    raise LoadError(
        setting,
        f"its {file.positions} positions are no square grid and {_prefix(file.positions, embedded, grid)}: say for which "
        "input it was trained with model_kwargs: {img_size: [HEIGHT, WIDTH]}",
    )


def _prefix(positions: int, embedded: Tensor, grid: Size) -> str:
    """What prefix tokens the model expects, and with how many the file's positions would be a square."""
    own = embedded.shape[1] - grid[0] * grid[1]
    fitting = [n for n in range(10) if n != own and positions > n and math.isqrt(positions - n) ** 2 == positions - n]
    others = f" (with {' or '.join(map(str, fitting[:2]))} it would be one)" if fitting else ""
    return f"{own} prefix tokens, as this architecture has them{others}"


def _grid_of_table(rows: int, grid: Size, setting: str) -> Size:
    """BEiT's tables have (2h - 1)(2w - 1) + 3 rows."""
    if rows in {(2 * grid[0] - 1) * (2 * grid[1] - 1) + extra for extra in (0, _EXTRA_ROWS)}:
        return grid
    for extra in (_EXTRA_ROWS, 0):
        side = math.isqrt(max(rows - extra, 0))
        if side * side == rows - extra and side % 2:
            return (side + 1) // 2, (side + 1) // 2
    raise LoadError(setting, f"its tables of {rows} relative positions are of no square grid: set input_size to theirs")


def misfit(file: Geometry, own: Geometry) -> str:
    """What of a file's geometry can't be resampled, with the settings that match it; "" if nothing."""
    kwargs = {"channels": "in_chans", "width": "embed_dim", "depth": "depth"}
    other = {
        name: getattr(file, name)
        for name in kwargs
        if getattr(file, name) and getattr(own, name) and getattr(file, name) != getattr(own, name)
    }
    if not other:
        return ""
    found = [f"{name} {value} (the architecture {getattr(own, name)})" for name, value in other.items()]
    wrong = {kwargs[name]: value for name, value in other.items()}
    return f"the file has {', '.join(found)}: {_fits(file, wrong)}"


def _fits(file: Geometry, wrong: Mapping[str, Any]) -> str:
    """An architecture of timm's that fits, or the keyword arguments."""
    name, depth = _SIZES.get(file.width or 0, ("", 0))
    patch = file.patch[0] if file.patch else 0
    known = f"vit_{name}_patch{patch}_224"
    if "embed_dim" in wrong and depth == file.depth and timm.is_model(known):
        return f"is it {known}?"
    kwargs = _paste(**wrong)
    if "embed_dim" in wrong:
        return f"set {kwargs[:-1]}, num_heads: ...}} with the heads that it was trained with, which no file says"
    return f"set {kwargs}"


def _other_patch(file: Geometry, own: Geometry, patch: Size, source: Size | None) -> str:
    size = None if source is None else (source[0] * patch[0], source[1] * patch[1])
    assert file.patch is not None
    assert own.patch is not None
    return (
        f"the file has patches of {_times(file.patch)} pixels, the architecture of {_times(own.patch)}: set "
        f"{_paste(patch_size=file.patch, img_size=size)}, or resample: true to have them resampled"
    )


def _other_positions(size: Size, source: Size, embedding: Any) -> str:
    grid, own = tuple(embedding.grid_size), tuple(embedding.img_size)
    return (
        f"the file's positions are a grid of {_times(source)} for {_times(size)} pixels, the architecture's one of "
        f"{_times(grid)} for {_times(own)}: set {_paste(img_size=size)}, or input_size: {list(own)} to have them resampled"
    )


def _texts(same_patch: bool, patch: Size, own: Size, source: Size, grid: Size) -> Iterator[str]:
    if not same_patch:
        yield f"patch embedding from {_times(patch)} to {_times(own)} pixels"
    if source != grid:
        yield f"positions from {_times(source)} to {_times(grid)}"


def _paste(**settings: Any) -> str:
    """Settings of a model, as YAML that can be pasted."""
    kwargs = {name: value for name, value in settings.items() if value is not None and name != "input_size"}
    words = ", ".join(f"{name}: {_brief(value)}" for name, value in kwargs.items())
    size = settings.get("input_size")
    return f"model_kwargs: {{{words}}}" if size is None else f"input_size: {list(size)}"


def _brief(value: Any) -> Any:
    if isinstance(value, tuple):
        return value[0] if value[0] == value[1] else list(value)
    return value


def _times(size: Size) -> str:
    return " x ".join(map(str, size))
