"""The demo model: loads as a plain timm ViT, reads its scenes, and its maps and shipped figures hold."""

import numpy as np
import pytest
import torch
from timm.data import resolve_model_data_config
from timm.models import VisionTransformer

from cdam_server.demo import model as demo_model


@pytest.fixture(scope="module")
def model() -> VisionTransformer:
    return demo_model.load()


def test_loads_as_a_plain_vit_in_eval_mode(model: VisionTransformer) -> None:
    assert type(model) is VisionTransformer
    assert not model.training
    assert model.patch_embed.grid_size == (16, 16)
    assert model.num_prefix_tokens == 1
    assert model(torch.zeros(2, 3, 64, 64)).shape == (2, len(demo_model.LABELS))


def test_loading_leaves_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    demo_model.load()
    assert torch.equal(before, torch.get_rng_state())


def test_timm_resolves_its_preprocessing(model: VisionTransformer) -> None:
    config = resolve_model_data_config(model)
    assert config["input_size"] == (3, 64, 64)
    assert config["crop_pct"] == 1.0
    assert config["interpolation"] == "bicubic"
    assert config["mean"] == config["std"] == (0.5, 0.5, 0.5)


def test_weights_stay_small() -> None:
    assert len((demo_model.ASSETS / "weights.safetensors").read_bytes()) <= 8_000_000


def test_shipped_figures_meet_the_bars() -> None:
    held_out = demo_model.shipped_figures()["held_out"]
    assert held_out["split"] == "test"
    assert held_out["single_scenes"] >= 1000
    assert held_out["pair_scenes"] >= 500
    assert held_out["single_top1"] >= 0.95
    assert held_out["pair_top2"] >= 0.80
    assert held_out["map_right_scenes"] >= 0.90


class TestOnScenes:
    """What needs scenes, and so scikit-learn."""

    @pytest.fixture(autouse=True)
    def _need_scikit_learn(self) -> None:
        pytest.importorskip("sklearn", reason="demo scenes need the extra `demo`")

    def test_measured_again_on_fewer_scenes(self, model: VisionTransformer) -> None:
        from demo_model import figures

        again = figures.measure(model, "test", singles=200, pairs=200, triples=10)
        assert again.single_top1 >= 0.95
        assert again.pair_top2 >= 0.90
        assert again.map_right_digits >= 0.95
        assert again.map_right_scenes >= 0.90

    def test_maps_equal_plain_autograd(self, model: VisionTransformer) -> None:
        from cdam_server.demo.scenes import draw_scene
        from demo_model import figures

        inputs = figures.to_input(np.stack([draw_scene("test", seed, 2).image for seed in range(3)]))
        classes = torch.tensor([[0, 1], [2, 3], [4, 5]])
        maps = figures.cdam_maps(model, inputs, classes)
        assert maps.shape == (3, 2, 16, 16)
        block, x = model.blocks[-1], model.pos_drop(model._pos_embed(model.patch_embed(inputs)))
        x = model.blocks[:-1](x).detach()
        for i in range(3):
            for k in range(2):
                tokens = block.norm1(x[i : i + 1]).detach().requires_grad_()
                mid = x[i : i + 1] + block.attn(tokens)
                logit = model.forward_head(model.norm(mid + block.mlp(block.norm2(mid))))[0, classes[i, k]]
                (grad,) = torch.autograd.grad(logit, tokens)
                expected = (tokens * grad).sum(-1)[0, 1:].reshape(16, 16)
                np.testing.assert_allclose(maps[i, k], expected.detach(), rtol=1e-4, atol=1e-5)

    def test_shipped_samples_are_the_scenes_they_name(self) -> None:
        import json

        from PIL import Image

        from cdam_server.demo.scenes import draw_scene

        folder = demo_model.ASSETS / "samples"
        samples = json.loads((folder / "samples.json").read_text())["samples"]
        assert len(samples) == 6
        for sample in samples:
            scene = draw_scene(sample["split"], sample["seed"], len(sample["objects"]))
            with (folder / sample["image"]).open("rb") as file:
                assert np.array_equal(np.asarray(Image.open(file)), scene.image)
            for entry, o in zip(sample["objects"], scene.objects, strict=True):
                with (folder / entry["mask"]).open("rb") as file:
                    assert np.array_equal(np.asarray(Image.open(file)), o.mask)
                assert entry["class"] == o.label


class TestTraining:
    """The training script's own parts."""

    @pytest.fixture(autouse=True)
    def _need_scikit_learn(self) -> None:
        pytest.importorskip("sklearn", reason="demo scenes need the extra `demo`")

    def test_whole_scene_as_a_window_is_the_plain_model(self, model: VisionTransformer) -> None:
        import demo_train as train

        inputs = torch.rand(2, 3, 64, 64)
        places = torch.arange(256).expand(2, -1)
        torch.testing.assert_close(train.window_logits(model, inputs, places), model(inputs))
