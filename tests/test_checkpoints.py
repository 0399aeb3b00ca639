"""Every file that users have: there and back, told apart by keys, and refused with a reason."""

import io
import json
import os
import pickle
import random
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from comfyui_wplus.wplus_core import checkpoints as ck
from comfyui_wplus.wplus_core.adapter import AdapterConfig, WPlusAdapter
from comfyui_wplus.wplus_core.direction_files import load_directions, save_directions
from comfyui_wplus.wplus_core.directions import Direction
from comfyui_wplus.wplus_core.encoder import EncoderConfig, build_encoder
from comfyui_wplus.wplus_core.errors import FileError
from comfyui_wplus.wplus_core.files import ENTRIES, read, sha256, write_whole
from comfyui_wplus.wplus_core.formats import adapter_from_reference, adapter_to_reference, kind_of
from comfyui_wplus.wplus_core.identity import Identity
from comfyui_wplus.wplus_core.parsing import FaceParser, ParserConfig
from comfyui_wplus.wplus_core.stylegan2 import Generator, GeneratorConfig
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

DATA = Path(__file__).parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"REAL CODES AND DIRECTIONS NOT FOUND at {DATA}")


def make_adapter():
    torch.manual_seed(0)
    return WPlusAdapter(AdapterConfig(channels=(8, 16), token_dim=8))


def make_encoder(kind="e4e"):
    torch.manual_seed(0)
    side = 256 if kind == "single" else 32  # of a single-code encoder, the published layout does not tell
    config = EncoderConfig(kind, 10, 32, units=(1, 2, 1, 1), channels=(16, 32, 48, 64), image_size=side)
    encoder = build_encoder(config)
    encoder.latent_avg.normal_()
    return encoder


def make_generator():
    torch.manual_seed(0)
    return Generator(GeneratorConfig(channels=(16, 16, 8), w_dim=32, mapping_layers=2))


def make_parser():
    torch.manual_seed(0)
    return FaceParser(ParserConfig(channels=(4, 8), body=1))


NETWORKS = {
    "adapter": (make_adapter, ck.load_adapter, ck.save_adapter, ck.save_reference_adapter),
    "encoder": (make_encoder, ck.load_encoder, ck.save_encoder, ck.save_reference_encoder),
    "psp": (lambda: make_encoder("psp"), ck.load_encoder, ck.save_encoder, ck.save_reference_encoder),
    "single": (lambda: make_encoder("single"), ck.load_encoder, ck.save_encoder, ck.save_reference_encoder),
    "generator": (make_generator, ck.load_generator, ck.save_generator, ck.save_reference_generator),
    "parser": (make_parser, ck.load_parser, ck.save_parser, ck.save_reference_parser),
}


def assert_same(network, other):
    a, b = network.state_dict(), other.state_dict()
    assert list(a) == list(b)
    for k in a:
        assert a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]), k


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("ours", [True, False])
def test_a_network_comes_back_bit_for_bit(tmp_path, name, dtype, ours):
    make, load, save_ours, save_reference = NETWORKS[name]
    network = make().to(dtype)
    path = tmp_path / "named.like-nothing"
    (save_ours if ours else save_reference)(network, path)
    back = load(path)
    assert_same(back, network)
    assert back.config == network.config
    assert not back.training and not any(p.requires_grad for p in back.parameters())


def test_a_crossed_path_of_formats_keeps_the_bits(tmp_path):
    adapter = make_adapter()
    ck.save_reference_adapter(adapter, tmp_path / "a.bin")
    ck.save_adapter(ck.load_adapter(tmp_path / "a.bin"), tmp_path / "b.safetensors")
    ck.save_reference_adapter(ck.load_adapter(tmp_path / "b.safetensors"), tmp_path / "c.bin")
    assert_same(ck.load_adapter(tmp_path / "c.bin"), adapter)


def test_the_references_layout_is_written(tmp_path):
    ck.save_reference_adapter(make_adapter(), tmp_path / "a.bin")
    saved = torch.load(tmp_path / "a.bin", weights_only=True)
    assert list(saved) == ["w_proj", "wplus_adapter"]
    assert set(saved["w_proj"]) == {f"proj_{i}.weight" for i in range(4)} | {"norm.weight", "norm.bias"}
    assert set(saved["wplus_adapter"]) == {f"{n}.to_{x}_wplus.weight" for n in (1, 3) for x in "qkv"}


def test_the_key_table_is_a_bijection_at_full_size():
    with torch.device("meta"):
        state = WPlusAdapter(AdapterConfig()).state_dict()
    theirs = adapter_to_reference(state)
    assert "wplus_adapter.31.to_v_wplus.weight" in theirs and len(theirs) == len(state) == 54
    assert list(adapter_from_reference(theirs)) == list(state)


def test_a_training_runs_file(tmp_path):
    adapter = make_adapter()
    flat = adapter_to_reference(adapter.state_dict())
    run = {"unet.conv_in.weight": torch.randn(4, 4, 3, 3)}
    for k, x in flat.items():
        run[k.replace("w_proj.", "w_proj_model.").replace("wplus_adapter.", "adapter_modules.")] = x
    torch.save(run, tmp_path / "pytorch_model.bin")
    assert_same(ck.load_adapter(tmp_path / "pytorch_model.bin"), adapter)


def test_data_parallel_prefixes_and_legacy_torch_files(tmp_path):
    parser = make_parser()
    state = {f"module.{k}": x for k, x in parser.state_dict().items()}
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert_same(ck.load_parser(tmp_path / "old.pth"), parser)


@pytest.mark.parametrize("rows", [(32,), (1, 32), (10, 32)])
def test_latent_avg_in_either_shape_with_or_without_decoder(tmp_path, rows):
    encoder, generator = make_encoder(), make_generator()
    ck.save_reference_encoder(encoder, tmp_path / "e4e.pt", generator)
    saved = torch.load(tmp_path / "e4e.pt", weights_only=True)
    saved["latent_avg"] = torch.randn(rows)
    torch.save(saved, tmp_path / "e4e.pt")
    loaded = ck.load_encoder(tmp_path / "e4e.pt")
    assert torch.equal(loaded.latent_avg, saved["latent_avg"].expand(10, 32))
    assert_same(ck.load_generator(tmp_path / "e4e.pt"), generator)
    ck.save_reference_encoder(encoder, tmp_path / "alone.pt")
    with pytest.raises(FileError, match="no generator in it"):
        ck.load_generator(tmp_path / "alone.pt")


def test_an_encoder_and_its_generator_in_one_file_of_ours(tmp_path):
    ck.save_encoder(make_encoder(), tmp_path / "e4e.safetensors", make_generator())
    assert_same(ck.load_encoder(tmp_path / "e4e.safetensors"), make_encoder())
    assert_same(ck.load_generator(tmp_path / "e4e.safetensors"), make_generator())


def test_our_files_say_what_they_are(tmp_path):
    ck.save_adapter(make_adapter(), tmp_path / "a.safetensors", {"stage": "2"})
    with safetensors.safe_open(tmp_path / "a.safetensors", "pt") as f:
        metadata = f.metadata()
    assert (metadata["format"], metadata["version"], metadata["stage"]) == ("wplus-adapter", "1", "2")
    assert json.loads(metadata["config"])["channels"] == [8, 16]


def test_heads_come_from_the_file(tmp_path):
    adapter = WPlusAdapter(AdapterConfig(channels=(8,), heads=4, token_dim=8))
    ck.save_adapter(adapter, tmp_path / "a.safetensors")
    assert ck.load_adapter(tmp_path / "a.safetensors").layers[0].heads == 4


@pytest.mark.parametrize("suffix", [".pth", ".npy", ".safetensors"])
@pytest.mark.parametrize("shape", [(1, 18, 512), (18, 512), (3, 14, 512)])
def test_bare_codes(tmp_path, suffix, shape):
    w, path = torch.randn(shape), tmp_path / f"anna{suffix}"
    if suffix == ".npy":
        np.save(path, w.double().numpy())
    elif suffix == ".safetensors":
        safetensors.torch.save_file({"latent": w}, path)
    else:
        torch.save(w.requires_grad_(), path)
    identity = ck.load_identity(path)
    assert identity.name == "anna" and not identity.w.requires_grad
    assert torch.equal(identity.w, w.detach().reshape(-1, *shape[-2:]))


def test_an_identity_comes_back_whole(tmp_path):
    thumbnail = torch.randint(0, 256, (16, 16, 3), dtype=torch.uint8)
    provenance, average = {"edits": [["smile", 2.0]], "source": "é.jpg"}, torch.randn(18, 512)
    identity = Identity(torch.randn(2, 18, 512), "Anna", provenance, thumbnail, average)
    ck.save_identity(identity, tmp_path / "anna.safetensors")
    back = ck.load_identity(tmp_path / "anna.safetensors")
    assert torch.equal(back.w, identity.w) and torch.equal(back.thumbnail, thumbnail)
    assert torch.equal(back.average, average)
    assert (back.name, back.provenance) == (identity.name, identity.provenance)
    assert repr(back) == "Identity(Anna: 2 codes of 18 x 512)"


def test_directions_come_back_whole(tmp_path):
    directions = [
        Direction("smile/wide", torch.randn(1, 512), (0, 8), source="InterFaceGAN"),
        Direction("hair", torch.randn(18, 512), None, torch.randn(512)),
    ]
    save_directions(directions, tmp_path / "d.safetensors")
    w = torch.randn(2, 18, 512)
    for a, b in zip(directions, load_directions(tmp_path / "d.safetensors"), strict=True):
        assert (a.name, a.layers, a.source) == (b.name, b.layers, b.source)
        assert torch.equal(a.move(w, 1.5), b.move(w, 1.5))


@needs_data
def test_real_codes_and_directions():
    assert ck.load_identity(DATA / "codes/1.pth").w.shape == (1, 18, 512)
    groups = {p: load_directions(p) for p in (DATA / "directions").rglob("*") if p.suffix in (".pt", ".pth", ".npy")}
    named = {p.name: [d.name for d in ds] for p, ds in groups.items()}
    assert named["smile.npy"] == ["smile"] and named["pose.pt"] == ["pose"]
    assert len(named["att_direction_scale.pth"]) == 17 and len(set(named["att_direction_scale.pth"])) == 17
    assert len(named["ffhq_pca.pt"]) == 42 and "eye_openness" in named["ffhq_pca.pt"]
    by_layers = {p.name: ds[0].layers for p, ds in groups.items()}
    assert by_layers["smile.npy"] == (0, 8) and by_layers["pose.pt"] is None


# --- refusals ---------------------------------------------------------------------------------------------------------


FOREIGN = {
    "an SD checkpoint": ["model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.encoder.conv_in.weight"],
    "a LoRA": ["lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"],
    "an IP-Adapter": ["image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight"],
    "a ControlNet": ["control_model.input_blocks.0.0.weight"],
    "a diffusers UNet": ["down_blocks.0.attentions.0.norm.weight", "conv_in.weight"],
    "a VAE": ["encoder.down.0.block.0.conv1.weight", "decoder.up.0.block.0.conv1.weight"],
    "a CLIP text encoder": ["text_model.encoder.layers.0.mlp.fc1.weight"],
    "a textual inversion": ["emb_params"],
    "an ArcFace recogniser": ["input_layer.0.weight", "body.0.res_layer.0.weight", "output_layer.3.weight"],
}


@pytest.mark.parametrize("what", FOREIGN)
@pytest.mark.parametrize("load", [ck.load_adapter, ck.load_encoder, ck.load_parser, ck.load_identity])
def test_the_wrong_model_is_named(tmp_path, what, load):
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({k: torch.zeros(4, 4) for k in FOREIGN[what]}, path)
    with pytest.raises(FileError, match=f"this is {what}, not a W"):
        load(path)


@pytest.mark.parametrize("name", ["adapter", "encoder", "generator", "parser"])
def test_one_of_ours_in_the_wrong_place_is_named(tmp_path, name):
    make, _, save_ours, _ = NETWORKS[name]
    save_ours(make(), tmp_path / "a.safetensors")
    with pytest.raises(FileError, match=rf"this is a W\+ {name}, not a W\+ identity"):
        ck.load_identity(tmp_path / "a.safetensors")


def test_a_newer_format_asks_for_an_update(tmp_path):
    safetensors.torch.save_file({"w": torch.zeros(1)}, tmp_path / "a", {"format": "wplus-identity", "version": "2"})
    with pytest.raises(FileError, match="version '2'.*Update ComfyUI-WPlus"):
        ck.load_identity(tmp_path / "a")


def test_all_wrong_keys_are_reported_at_once(tmp_path):
    state = adapter_to_reference(make_adapter().state_dict())
    del state["w_proj.norm.bias"]
    state["wplus_adapter.3.to_q_wplus.weight"] = torch.zeros(16, 15)
    state["wplus_adapter.2.to_q_wplus.weight"] = torch.zeros(8, 8)
    state["w_proj.norm.weight"] = torch.zeros(8, dtype=torch.int32)
    torch.save(state, tmp_path / "a.bin")
    with pytest.raises(FileError) as e:
        ck.load_adapter(tmp_path / "a.bin")
    for part in (
        "a.bin",
        "1 missing: mapping.norm.bias",
        "1 unexpected: wplus_adapter.2.to_q_wplus.weight",
        "1 misshapen: layers.1.to_q.weight [16, 15] instead of [16, 16]",
        "mapping.norm.weight torch.int32",
    ):
        assert part in str(e.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", NETWORKS)
def test_nan_and_inf_are_refused(tmp_path, name, value):
    make, load, _, save_reference = NETWORKS[name]
    network = make()
    with torch.no_grad():
        list(network.parameters())[-1].flatten()[0] = value
    save_reference(network, tmp_path / "a.pt")
    with pytest.raises(FileError, match="NaN or Inf in 1 tensors"):
        load(tmp_path / "a.pt")


class Payload:
    """A pickle that leaves a mark when it is executed."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


def torch_zip(path, payload):
    torch.save({"w_proj": payload}, path)


def torch_legacy(path, payload):
    torch.save({"w_proj": payload}, path, _use_new_zipfile_serialization=False)


def plain_pickle(path, payload):
    path.write_bytes(pickle.dumps({"w_proj": payload}))


def numpy_objects(path, payload):
    np.save(path, np.array([payload], dtype=object), allow_pickle=True)
    path.with_name(path.name + ".npy").rename(path)


@pytest.mark.parametrize("write", [torch_zip, torch_legacy, plain_pickle, numpy_objects])
@pytest.mark.parametrize("load", [ck.load_adapter, ck.load_encoder, ck.load_identity, load_directions])
def test_a_file_that_would_execute_code_is_refused(tmp_path, write, load):
    mark, path = tmp_path / "executed", tmp_path / "model"
    write(path, Payload(mark))
    with pytest.raises(FileError, match="refused, because loading it would run code"):
        load(path)
    assert not mark.exists()


def test_a_torchscript_program_is_refused(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "model.pt")
    with pytest.raises(FileError, match="TorchScript program"):
        ck.load_encoder(tmp_path / "model.pt")


def test_bombs_are_refused(tmp_path):
    torch.save(torch.zeros(1).expand(1 << 40, 18, 512), tmp_path / "strides.pth")
    with pytest.raises(FileError, match="claims"):
        ck.load_identity(tmp_path / "strides.pth")
    nested = torch.zeros(1, 18, 512)
    for _ in range(20):
        nested = [nested]
    torch.save(nested, tmp_path / "nested.pth")
    with pytest.raises(FileError, match="levels deep"):
        ck.load_identity(tmp_path / "nested.pth")
    buffer = io.BytesIO()
    torch.save(torch.zeros(1000, 18, 512), buffer)
    with zipfile.ZipFile(buffer) as stored, zipfile.ZipFile(tmp_path / "zipped.pth", "w", zipfile.ZIP_DEFLATED) as z:
        for e in stored.infolist():
            z.writestr(e.filename, stored.read(e))
    with pytest.raises(FileError, match="compressed"):
        ck.load_identity(tmp_path / "zipped.pth")


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", "no safetensors, torch or numpy file"),
        (b"<!DOCTYPE html><html>not found</html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"GGUF\x03\x00\x00\x00", "GGUF"),
    ],
)
def test_things_that_are_no_model(tmp_path, data, message):
    (tmp_path / "model.bin").write_bytes(data)
    with pytest.raises(FileError, match=message):
        ck.load_adapter(tmp_path / "model.bin")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileError, match="gone.bin: there is no such file"):
        ck.load_adapter(tmp_path / "gone.bin")


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that even root cannot read")
@pytest.mark.parametrize("look", [read, sha256])
def test_a_file_that_cannot_be_read_is_named(tmp_path, look):
    (tmp_path / "locked.bin").symlink_to("/proc/self/mem")
    with pytest.raises(FileError, match=r"locked.bin: cannot be read \(Input/output error\)"):
        look(tmp_path / "locked.bin")


def test_a_dangling_link_has_no_hash(tmp_path):
    (tmp_path / "a").symlink_to(tmp_path / "gone")
    with pytest.raises(FileError, match="cannot be read"):
        sha256(tmp_path / "a")
    with pytest.raises(FileError, match="no such file"):
        read(tmp_path / "a")


def test_shared_references_do_not_multiply(tmp_path):
    item = [1] * 10
    for _ in range(6):
        item = [item] * 10
    torch.save(item, tmp_path / "bomb.pth")
    assert (tmp_path / "bomb.pth").stat().st_size < 2000
    with pytest.raises(FileError, match=f"more than {ENTRIES:,} entries"):
        read(tmp_path / "bomb.pth")


FOREIGN_METADATA = {"format": "pt", "version": "4.51.3"}  # as Hugging Face's writers have it


def test_other_writers_metadata_is_not_ours(tmp_path):
    adapter, path = make_adapter(), tmp_path / "a.safetensors"
    safetensors.torch.save_file(adapter_to_reference(adapter.state_dict()), path, FOREIGN_METADATA)
    assert_same(ck.load_adapter(path), adapter)
    safetensors.torch.save_file(make_parser().state_dict(), path, FOREIGN_METADATA)
    assert_same(ck.load_parser(path), make_parser())
    steps = {"smile": torch.randn(1, 512), "age": torch.randn(18, 512)}
    safetensors.torch.save_file(steps, path, FOREIGN_METADATA)
    assert {d.name: d.vector.tolist() for d in load_directions(path)} == {k: x.tolist() for k, x in steps.items()}


def overwrite(path):
    with open(path, "r+b") as f:
        f.write(bytes(path.stat().st_size))


@pytest.mark.parametrize("save", [ck.save_identity, lambda i, path: torch.save(i.w, path)])
def test_an_identity_does_not_change_with_its_file(tmp_path, save):
    identity = Identity(torch.randn(1, 18, 512), average=torch.randn(18, 512))
    save(identity, tmp_path / "a")
    back = ck.load_identity(tmp_path / "a")
    overwrite(tmp_path / "a")
    assert torch.equal(back.w, identity.w)
    assert back.average is None or torch.equal(back.average, identity.average)


def test_directions_do_not_change_with_their_file(tmp_path):
    d = Direction("smile", torch.randn(18, 512), None, torch.randn(512))
    save_directions([d], tmp_path / "a")
    torch.save({"smile": d.vector}, tmp_path / "b")
    ours, plain = load_directions(tmp_path / "a") + load_directions(tmp_path / "b")
    overwrite(tmp_path / "a")
    overwrite(tmp_path / "b")
    assert torch.equal(ours.vector, d.vector) and torch.equal(ours.origin, d.origin)
    assert torch.equal(plain.vector, d.vector)


@pytest.mark.parametrize("name, value", [("heads", 4), ("w_dim", 64), ("parallel", True)])
def test_what_the_references_layout_cannot_say_is_refused(tmp_path, name, value):
    adapter = WPlusAdapter(AdapterConfig(channels=(8,), token_dim=8, **{name: value}))
    with pytest.raises(FileError, match=f"cannot say that it has {name} {value}"):
        ck.save_reference_adapter(adapter, tmp_path / "a.bin")
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def whole_files(tmp_path_factory):
    """One small file of every kind and container, with the loader that takes it."""
    d = tmp_path_factory.mktemp("whole")
    files = {}
    for name, (make, load, save_ours, save_reference) in NETWORKS.items():
        for save in (save_ours, save_reference):
            path = d / f"{name}-{save.__name__}"
            save(make(), path)
            files[path.name] = (path.read_bytes(), load)
    ck.save_identity(Identity(torch.randn(1, 4, 512)), d / "identity")
    save_directions([Direction("a", torch.randn(1, 512), (0, 2), torch.randn(512))], d / "directions")
    torch.save(torch.randn(1, 4, 512), d / "code.pth")
    torch.save(OrderedDict(a=torch.randn(4, 512)), d / "legacy.pth", _use_new_zipfile_serialization=False)
    np.save(d / "code.npy", np.random.randn(4, 512))
    loads = {"identity": ck.load_identity, "directions": load_directions, "code.pth": ck.load_identity}
    loads |= {"legacy.pth": ck.load_identity, "code.npy": load_directions}
    every = list((files | {n: ((d / n).read_bytes(), f) for n, f in loads.items()}).values())
    return lambda rng: rng.choice(every)  # a function, so that a failing example does not print the files


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32), how=st.sampled_from(["flip", "flip head", "flip tail", "cut", "zero", "insert"]))
def test_a_damaged_file_loads_or_gives_our_error(whole_files, tmp_path, seed, how):
    """Flipped bits in a weight cannot be told from weights; whatever can be told is a FileError, and nothing else."""
    rng = random.Random(seed)
    data, load = whole_files(rng)
    data = bytearray(data)
    ends = {"flip head": min(2000, len(data)), "flip": len(data), "flip tail": len(data)}
    if how in ends:
        for _ in range(rng.randint(1, 8)):
            first = max(0, len(data) - 2000) if how == "flip tail" else 0
            data[rng.randrange(first, ends[how])] ^= 1 << rng.randrange(8)
    else:
        at, n = rng.randrange(len(data)), rng.randint(1, 400)
        if how == "cut":
            del data[at:]
        elif how == "zero":
            data[at : at + n] = bytes(len(data[at : at + n]))
        else:
            data[at:at] = rng.randbytes(n)
    path = tmp_path / "damaged"
    path.write_bytes(data)
    try:
        load(path)
    except FileError as e:
        assert str(path) in str(e)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=300), head=st.sampled_from([b"", b"PK\x03\x04", b"\x80\x02", b"\x93NUMPY\x01\x00"]))
def test_noise_gives_our_error(tmp_path, data, head):
    path = tmp_path / "noise"
    path.write_bytes(head + data)
    for load in (ck.load_adapter, ck.load_identity):
        with pytest.raises(FileError):
            load(path)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    config=st.dictionaries(
        st.sampled_from(["channels", "splits", "w_dim", "token_dim", "heads", "units"]),
        st.one_of(st.integers(), st.text(max_size=3), st.none(), st.lists(st.integers(-9, 10**12), max_size=4)),
    )
)
def test_a_lying_config_gives_our_error(tmp_path, config):
    path = tmp_path / "lying.safetensors"
    metadata = {"format": "wplus-adapter", "version": "1", "config": json.dumps(config)}
    safetensors.torch.save_file(make_adapter().state_dict(), path, metadata)
    with pytest.raises(FileError):
        ck.load_adapter(path)


# --- sizes and writing ------------------------------------------------------------------------------------------------


def test_looking_at_a_file_reads_no_weights(tmp_path):
    for save in (ck.save_adapter, ck.save_reference_adapter):
        save(make_adapter(), tmp_path / "a")
        contents = read(tmp_path / "a", "meta")
        assert kind_of(contents) == "adapter" and all(x.is_meta for x in contents.tensors.values())


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize("container", ["bin", "safetensors"])
def test_loading_needs_little_more_memory_than_the_file(tmp_path, container):
    adapter = WPlusAdapter(AdapterConfig())
    path = tmp_path / f"adapter.{container}"
    (ck.save_adapter if container == "safetensors" else ck.save_reference_adapter)(adapter, path)
    script = (
        "import re, sys\n"
        "from comfyui_wplus.wplus_core.checkpoints import load_adapter\n"
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) * 1024\n"
        "before = peak()\n"
        "adapter = load_adapter(sys.argv[1])\n"
        "print(peak() - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, check=True)
    assert 0.5 * path.stat().st_size < int(done.stdout) < 1.2 * path.stat().st_size


@pytest.mark.skipif(sys.platform == "win32", reason="limits of a file's size are POSIX's")
@pytest.mark.parametrize("save", ["save_adapter", "save_reference_adapter"])
def test_a_full_disk_is_told_and_leaves_the_old_file(tmp_path, save):
    """With the system's limit of a file's size in place of a disk's end: both are an error of the same write."""
    path = tmp_path / "adapter"
    getattr(ck, save)(make_adapter(), path)
    before = path.read_bytes()
    script = (
        "import resource, signal, sys\n"
        "from comfyui_wplus.wplus_core import checkpoints as ck\n"
        "adapter = ck.load_adapter(sys.argv[1])\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try:\n"
        f"    ck.{save}(adapter, sys.argv[1])\n"
        "except ck.FileError as e:\n"
        "    print(e)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True)
    assert f"{path}: could not be written (" in done.stdout and "Is the disk full" in done.stdout, done.stderr[-2000:]
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_the_longest_name_is_written_and_a_longer_one_told(tmp_path):
    longest = os.pathconf(tmp_path, "PC_NAME_MAX") if hasattr(os, "pathconf") else 255
    write_whole(tmp_path / ("a" * longest), lambda p: p.write_text("x"))
    with pytest.raises(FileError, match="could not be written"):
        write_whole(tmp_path / ("b" * (longest + 1)), lambda p: p.write_text("x"))
    assert [p.name[0] for p in tmp_path.iterdir()] == ["a"]
