"""The miniature's making: every part on a tiny scale, resuming, and the committed weights against their numbers."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from comfyui_wplus.train.mini import generator, numbers, pack, pictures, scenes, text, world
from comfyui_wplus.train.mini.__main__ import make_parts, parts
from comfyui_wplus.train.mini.fit import Fit, fit
from comfyui_wplus.train.mini.settings import TINY
from comfyui_wplus.wplus_core.adapter import AdapterConfig
from comfyui_wplus.wplus_core.checkpoints import load_adapter, load_encoder, load_generator
from comfyui_wplus.wplus_core.direction_files import load_directions
from comfyui_wplus.wplus_core.errors import WPlusError
from comfyui_wplus.wplus_core.stylegan2 import GeneratorConfig
from transformers import CLIPTokenizer

MINIATURE = Path(__file__).parents[1] / "miniature"
SMALL = GeneratorConfig(channels=(8, 8, 8), w_dim=64, mapping_layers=1)
LOSS = generator.loss_at(16)
THROUGH_STAGE2 = 13  # parts; the ablations after them are the same code with other settings


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mini")
    names = tuple(parts(folder, TINY, "cpu"))[:THROUGH_STAGE2]
    make_parts(folder, TINY, "cpu", names)
    return folder


def test_every_part_writes_its_file_and_is_not_made_twice(out):
    done = {name: file for name, (file, _) in list(parts(out, TINY, "cpu").items())[:THROUGH_STAGE2]}
    assert all(file.is_file() for file in done.values())
    before = {file: file.stat().st_mtime_ns for file in done.values()}
    make_parts(out, TINY, "cpu", tuple(done))
    assert before == {file: file.stat().st_mtime_ns for file in done.values()}


def test_an_unknown_part_is_named(tmp_path):
    with pytest.raises(WPlusError, match="unett"):
        make_parts(tmp_path, TINY, "cpu", ("unett",))


def test_the_adapter_fits_the_miniatures_own_encoder_and_unet(out):
    config = load_adapter(out / "adapters" / "full.safetensors").config
    encoder = load_encoder(out / "encoder.safetensors").config
    assert (config.w_layers, config.w_dim) == (encoder.layers, encoder.w_dim) == (10, 64)
    assert config == AdapterConfig((64, 128, 128, 128, 64, 64, 128), (2, 5, 8, 10), w_dim=64)


def test_the_pack_is_what_the_loader_looks_for(out, tmp_path):
    numbers.make(out, 4)
    written = {file.relative_to(tmp_path).as_posix() for file in pack.write(out, tmp_path)}
    assert {"encoder.safetensors", "adapter.safetensors", "base/unet/config.json", "numbers.json"} <= written
    assert load_generator(tmp_path / "encoder.safetensors").config == generator.CONFIG



@pytest.mark.parametrize("killed_after", [1, 3])
def test_a_resumed_training_is_the_uninterrupted_one(tmp_path, killed_after):
    settings = Fit(images=8, batch=2, lr=1e-2, every=2)
    whole = fit(generator.new_generator(SMALL), LOSS, settings, tmp_path / "whole")

    def dying(network, batch, rng):
        dying.calls += 1
        if dying.calls > killed_after:
            raise KeyboardInterrupt
        return LOSS(network, batch, rng)

    dying.calls = 0
    with pytest.raises(KeyboardInterrupt):
        fit(generator.new_generator(SMALL), dying, settings, tmp_path / "cut")
    resumed = fit(generator.new_generator(SMALL), LOSS, settings, tmp_path / "cut")
    for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert a.equal(b)


def test_a_checkpoint_of_another_size_is_refused(tmp_path):
    fit(generator.new_generator(SMALL), LOSS, Fit(2, 2, 1e-2), tmp_path)
    with pytest.raises(WPlusError, match="another size"):
        fit(generator.new_generator(replace(SMALL, w_dim=128)), LOSS, Fit(2, 2, 1e-2), tmp_path)


def test_the_generators_z_carries_the_factors():
    factors = world.sample(20, np.random.default_rng(0))
    z = generator.complete(factors)
    assert torch.allclose(z.square().mean(1), torch.ones(20), atol=1e-5)
    network = generator.new_generator(SMALL)
    assert torch.allclose(network.style[0](z)[:, : generator.FACTORS], factors, atol=1e-4)


def test_every_word_is_one_token_and_strange_ones_are_spelled(tmp_path):
    text.write_tokenizer(tmp_path)
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
    assert {len(tokenizer(word).input_ids) for word in scenes.WORDS} == {3}
    spelled = tokenizer("moped").input_ids[1:-1]
    assert 1 < len(spelled) <= len("moped") and tokenizer.eos_token_id not in spelled
    longest = max(scenes.captions(scenes.sample_scenes(500, np.random.default_rng(0))), key=len)
    assert len(tokenizer(longest).input_ids) <= text.TOKENS


def test_a_crop_cut_from_a_photo_is_the_aligned_face():
    """The same person drawn aligned, and cut out of a scene by the landmarks, differ by resampling and light alone."""
    rng = np.random.default_rng(3)
    z, s = world.sample(24, rng), scenes.sample_scenes(24, rng)
    plain = (s.style == 0) & (s.light == 0)
    z, s = z[plain], s[plain]
    drawn = scenes.scenes(z, s, 256)
    crops = pictures.aligned(drawn.images * drawn.masks + 1 - drawn.masks, drawn.points)
    assert (crops - world.faces(z)).abs().mean() < 0.03


@pytest.fixture(scope="module")
def said():
    """What the committed networks' numbers say."""
    if not (MINIATURE / "numbers.json").is_file():
        pytest.skip("nothing of the miniature is trained yet")
    return json.loads((MINIATURE / "numbers.json").read_text())


@pytest.mark.parametrize(
    "name, measure", [("generator_psnr_db", numbers.of_generator), ("encoder_psnr_db", numbers.of_encoder)]
)
def test_the_committed_networks_are_as_good_as_their_numbers_say(said, name, measure):
    if name not in said:
        pytest.skip(f"{name}: not trained yet")
    assert abs(measure(MINIATURE, 32)[name] - said[name]) < 1


def test_every_edit_moves_its_own_attribute_most(said):
    for name, row in said["edit_moves"].items():
        assert max(row, key=lambda k: abs(row[k])) == name


def test_the_committed_directions_fit_the_committed_generator(said):
    config = generator.load(MINIATURE).config
    for d in load_directions(MINIATURE / "directions" / "drawn.safetensors"):
        assert d.rows(config.layers).shape == (config.layers, config.w_dim)
