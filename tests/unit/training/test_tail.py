"""The part that is trained, on every architecture: together with what enters it, it is the model."""

from __future__ import annotations

import pytest
import torch

from cdam_engine import SplitViT
from cdam_server.compute.weights.heads import linear_head
from cdam_server.settings.load_error import LoadError
from cdam_training.tail import Tail
from reference.models import CASES, Case, available, build, images


def is_trained(case: Case) -> bool:
    """Not DeiT with two heads; and with images of the model's own size, as training has them."""
    own = getattr(build(case).patch_embed, "img_size", None)
    return case.id != "deit_distilled" and (own is None or tuple(own) == case.image_size)  # type: ignore[arg-type]


TAKEN = [case for case in CASES if available(case) and is_trained(case)]
DEEP = [case for case in TAKEN if case.id != "single_block"]


def tail_of(case: Case, blocks: int, **more: float) -> tuple[Tail, torch.nn.Module]:
    model = build(case)
    head = linear_head(model, 5, "model").double()
    torch.nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(1))
    model.eval()
    return Tail(SplitViT(model), head, blocks=blocks, **more), model


@pytest.mark.parametrize(
    ("case", "blocks"),
    [*((case, 0) for case in TAKEN), *((case, 1) for case in DEEP)],
    ids=lambda value: getattr(value, "id", None),
)
def test_trunk_and_tail_are_the_model(case: Case, blocks: int) -> None:
    tail, model = tail_of(case, blocks)
    pixels = images(case, 3)
    entering = tail.entering(pixels)
    assert tuple(entering.shape[1:]) == tail.entering_shape
    found = tail(entering)
    with torch.no_grad():
        torch.testing.assert_close(found.logits.detach(), model(pixels), rtol=1e-10, atol=1e-10)
    found.logits.sum().backward()
    trained = {id(parameter) for parameter in (*tail.head.parameters(), *tail.tuned.values())}
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) <= (id(parameter) in trained), name
    assert all(p.grad is not None for p in tail.head.parameters())


def test_several_blocks_hold_all_that_comes_after_them() -> None:
    case = next(case for case in CASES if case.id == "vit_tiny")
    tail, model = tail_of(case, 2)
    after = {name for name, _ in model.named_parameters() if name.startswith(("blocks.1.", "blocks.2.", "norm."))}
    assert set(tail.tuned) == after
    assert tail.parameters_trained == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_more_blocks_than_can_be_trained_are_refused() -> None:
    case = next(case for case in CASES if case.id == "vit_tiny")
    with pytest.raises(LoadError, match="train-blocks: the model has 3 blocks: at most all but the first"):
        tail_of(case, 3)


@pytest.mark.parametrize(("name", "blocks"), [("vit_tiny", 0), ("beit", 1), ("eva02", 1)])
def test_tokens_that_need_their_places_are_not_left_out(name: str, blocks: int) -> None:
    case = next(case for case in DEEP if case.id.startswith(name))
    with pytest.raises(LoadError, match="token-dropout"):
        tail_of(case, blocks, token_dropout=0.2)


def test_two_heads_are_refused() -> None:
    case = next(case for case in CASES if case.id == "deit_distilled")
    with pytest.raises(LoadError, match="does not take a single linear head"):
        tail_of(case, 0)


def test_dropout_is_of_training_alone() -> None:
    case = next(case for case in CASES if case.id == "vit_tiny")
    tail, _ = tail_of(case, 1, dropout=0.3, token_dropout=0.5)
    x = tail.entering(images(case, 2))
    tail.eval()
    assert torch.equal(tail(x).logits, tail(x).logits)
    tail.train()
    assert not torch.equal(tail(x).logits, tail(x).logits)
    assert tail.leave(tail._drop(x)).shape[1] == 1 + 98


def test_dropout_is_of_projections_and_not_of_attention() -> None:
    case = next(case for case in CASES if case.id == "vit_tiny")
    tail, _ = tail_of(case, 2, dropout=0.3)
    found = {name: part.p for name, part in tail.parts.named_modules() if isinstance(part, torch.nn.Dropout)}
    assert len(found) == 8
    assert {name: p for name, p in found.items() if p == 0} == {f"{block}.attn.attn_drop": 0.0 for block in (0, 1)}
