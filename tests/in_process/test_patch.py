"""The patch through ComfyUI's own samplers on a small SD1.5: what must be equal, is."""

import comfy.model_base
import comfy.sample
import comfy.samplers
import comfy.supported_models
import comfy_extras.nodes_freelunch
import comfy_extras.nodes_hypertile
import comfy_extras.nodes_pag
import comfy_extras.nodes_perpneg
import comfy_extras.nodes_sag
import comfy_extras.nodes_tomesd
import pytest
import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy_setup import CHANNELS, small_model
from comfyui_wplus.nodes.apply import Apply, parse_layers, stack_masks
from comfyui_wplus.nodes.identity import EditInPlace
from comfyui_wplus.nodes.patch import cross_attention_sites, latent_indices
from comfyui_wplus.nodes.types import Placed
from comfyui_wplus.wplus_core.errors import WPlusError
from comfyui_wplus.wplus_core.identity import Identity
from torch.utils._python_dispatch import TorchDispatchMode

OPTIONS = dict(weight=1.0, start_percent=0.0, end_percent=1.0, negative="zeros", layers="all", layer_weights="")


def person(seed, batch=1, **kw):
    w = torch.randn(batch, 18, 512, generator=torch.Generator().manual_seed(seed))
    return Identity(w, f"person {seed}", **kw)


ANNA, BEN = person(1), person(2)


def apply(model, adapter, *people, **options):
    identities = {f"identity{i}": p for i, p in enumerate(people)}
    return Apply.execute(model, adapter, identities, **{**OPTIONS, **options}).args[0]


def in_place(identity, edited, start=0.4, mask=None):
    return EditInPlace.execute(identity, edited, start, mask).args[0]


def cond(seed, tokens=77, **options):
    return [[torch.randn(1, tokens, 768, generator=torch.Generator().manual_seed(seed)), options]]


POSITIVE, NEGATIVE = cond(11), cond(12)


def noise(batch=1, h=8, w=8, same=False):
    x = torch.randn(1 if same else batch, 4, h, w, generator=torch.Generator().manual_seed(5))
    return x.repeat(batch, 1, 1, 1) if same else x


@torch.inference_mode()
def sample(model, x=None, positive=POSITIVE, negative=NEGATIVE, steps=2, cfg=4.0, callback=None, sampler="euler", **kw):
    x = noise() if x is None else x
    latent = torch.zeros_like(x)
    return comfy.sample.sample(
        model, x, steps, cfg, sampler, "normal", positive, negative, latent, callback=callback, seed=3, **kw
    )


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.fixture(scope="module")
def plain(model):
    return sample(model)


def reference_patch(model, adapter, tokens, negative_tokens):
    """The reference form as a plain attn2 replacement, written independently of the patch."""
    patched = model.clone()
    for i, ((block, number, _), _) in enumerate(cross_attention_sites(model.model.diffusion_model)):

        def attention(q, k, v, options, layer=adapter.adapter.layers[i]):
            h = optimized_attention(q, k, v, options["n_heads"])
            chunks = options["cond_or_uncond"]
            t = torch.cat([(negative_tokens if c == 1 else tokens).repeat(len(h) // len(chunks), 1, 1) for c in chunks])
            return h + layer(h, t)

        patched.set_model_attn2_replace(attention, block, number)
    return patched


def test_it_is_the_reference_form_with_the_zero_code_as_negative(model, adapter):
    mapping = adapter.adapter.mapping
    expected = sample(reference_patch(model, adapter, mapping(ANNA.w), mapping(torch.zeros_like(ANNA.w))))
    got = sample(apply(model, adapter, ANNA))
    assert relative(got, expected) < 1e-4
    assert relative(got, sample(model)) > 0.05


def test_weight_zero_is_the_plain_model_bit_for_bit(model, adapter, plain):
    assert torch.equal(sample(apply(model, adapter, ANNA, weight=0.0)), plain)
    assert torch.equal(sample(apply(model, adapter, Placed(ANNA, 0.0))), plain)
    assert torch.equal(sample(apply(model, adapter, ANNA, layer_weights=", ".join(["0"] * 16))), plain)


def test_nothing_stays_on_the_device_between_runs(model, adapter):
    patched = apply(model, adapter, Placed(ANNA, 1.0, torch.ones(1, 64, 64)))
    sample(patched)
    (patch,) = patched.wrappers["apply_model"]["wplus"]
    assert not patch._rows and not patch._masks and not patch._on_device


def test_the_input_model_never_changes(model, adapter, plain):
    before = repr(model.model_options), repr(model.wrappers)
    sample(apply(model, adapter, ANNA))
    assert (repr(model.model_options), repr(model.wrappers)) == before
    assert torch.equal(sample(model), plain)


def test_running_again_and_clones_of_clones_do_not_stack_up(model, adapter):
    patched = apply(model, adapter, ANNA)
    once = sample(patched)
    assert torch.equal(sample(patched), once)
    assert torch.equal(sample(patched.clone().clone()), once)
    assert torch.equal(sample(apply(model, adapter, ANNA)), once)


def test_two_nodes_in_a_row_are_two_residuals(model, adapter):
    twice = apply(apply(model, adapter, ANNA), adapter, BEN)
    assert torch.equal(sample(apply(twice, adapter, ANNA, weight=0.0)), sample(twice))
    assert relative(sample(twice), sample(apply(model, adapter, ANNA))) > 0.01


def test_people_side_by_side_is_the_sum_whatever_their_order(model, adapter):
    together = sample(apply(model, adapter, ANNA, Placed(BEN, 0.5)))
    assert relative(sample(apply(model, adapter, Placed(BEN, 0.5), ANNA)), together) < 1e-4
    assert torch.equal(sample(apply(model, adapter, ANNA, Placed(BEN, 0.0))), sample(apply(model, adapter, ANNA)))


def test_one_identity_per_latent(model, adapter):
    strip = Identity(torch.cat([ANNA.w, BEN.w]))
    both = sample(apply(model, adapter, strip), noise(2, same=True))
    alone = [sample(apply(model, adapter, p), noise(2, same=True))[:1] for p in (ANNA, BEN)]
    assert relative(both, torch.cat(alone)) < 1e-4
    assert relative(both[:1], both[1:]) > 0.01


def test_more_latents_than_identities_start_again_and_more_identities_are_left_out(model, adapter):
    strip = Identity(torch.cat([ANNA.w, BEN.w]))
    four = sample(apply(model, adapter, strip), noise(4, same=True))
    assert relative(four[2:], four[:2]) < 1e-4
    one = sample(apply(model, adapter, strip), noise(1))
    assert relative(one, sample(apply(model, adapter, ANNA), noise(1))) < 1e-4


def test_split_calls_are_the_batched_call(model, adapter, monkeypatch):
    patched, strip = apply(model, adapter, ANNA), apply(model, adapter, Identity(torch.cat([ANNA.w, BEN.w])))
    batched = sample(patched), sample(strip, noise(2))
    monkeypatch.setattr(comfy.model_base.BaseModel, "memory_required", lambda *a, **k: 1e18)
    assert relative(sample(patched), batched[0]) < 1e-4
    assert relative(sample(strip, noise(2)), batched[1]) < 1e-4


def test_prompts_of_different_length(model, adapter):
    out = sample(apply(model, adapter, ANNA), positive=cond(11, 154), negative=cond(12, 50))
    assert torch.isfinite(out).all()


def test_cfg_one_runs_the_identity_alone(model, adapter):
    patched = sample(apply(model, adapter, ANNA), cfg=1.0)
    assert relative(patched, sample(apply(model, adapter, ANNA, negative="none"), cfg=1.0)) == 0
    assert relative(patched, sample(model, cfg=1.0)) > 0.05


def test_negatives(model, adapter):
    zeros, none = (sample(apply(model, adapter, ANNA, negative=n)) for n in ("zeros", "none"))
    anna = person(1, average=torch.zeros(18, 512))
    assert relative(sample(apply(model, adapter, anna, negative="average face")), zeros) < 1e-6
    assert relative(zeros, none) > 0.01
    with pytest.raises(WPlusError, match="average face"):
        apply(model, adapter, ANNA, negative="average face")


def test_combined_prompts_and_areas(model, adapter):
    """Two positives, one of them over the left half: the masks are cut where the conditioning is."""
    left = cond(13, area=(8, 4, 0, 0), strength=1.0, set_area_to_bounds=False)
    positive = POSITIVE + left
    everywhere = sample(apply(model, adapter, ANNA), positive=positive)
    ones = sample(apply(model, adapter, Placed(ANNA, 1.0, torch.ones(1, 128, 128))), positive=positive)
    assert relative(ones, everywhere) < 1e-4
    mask = torch.ones(1, 128, 128)
    mask[..., :64] = 0
    only_left = [[left[0][0], {**left[0][1]}]]
    masked = sample(apply(model, adapter, Placed(ANNA, 1.0, mask), negative="none"), positive=only_left, cfg=1.0)
    assert relative(masked, sample(model, positive=only_left, cfg=1.0)) < 1e-6


@pytest.mark.parametrize("negative", ["zeros", "none"])
@pytest.mark.parametrize("side", ["positive", "negative"])
def test_a_prompt_for_an_area_keeps_its_person(model, adapter, negative, side):
    """Over the whole picture it is the prompt without an area; ComfyUI gives the other side a copy of it."""
    area = {"area": (8, 8, 0, 0), "strength": 1.0, "set_area_to_bounds": False}
    prompts = {side: [[{"positive": POSITIVE, "negative": NEGATIVE}[side][0][0], area]]}
    patched = apply(model, adapter, ANNA, negative=negative)
    assert relative(sample(patched, **prompts), sample(patched)) < 1e-4
    assert relative(sample(patched), sample(model)) > 0.05


def test_two_people_with_masks(model, adapter):
    left = torch.zeros(1, 64, 64)
    left[..., :32] = 1

    def sides(a, b):
        return sample(apply(model, adapter, Placed(a, 1.0, left), Placed(b, 1.0, 1 - left)))

    assert relative(sides(ANNA, ANNA), sample(apply(model, adapter, ANNA))) < 1e-4
    assert relative(sides(ANNA, BEN), sides(BEN, ANNA)) > 0.01


def test_a_mask_per_frame(model, adapter):
    masks = torch.stack([torch.ones(32, 32), torch.zeros(32, 32)])
    out = sample(apply(model, adapter, Placed(ANNA, 1.0, masks)), noise(2, same=True))
    assert relative(out[:1], sample(apply(model, adapter, ANNA), noise(2, same=True))[:1]) < 1e-4
    assert relative(out[1:], sample(model, noise(2, same=True))[1:]) < 1e-6


def test_an_edit_in_place_between_its_ends(model, adapter):
    before, edited = sample(apply(model, adapter, ANNA)), sample(apply(model, adapter, BEN))
    assert relative(sample(apply(model, adapter, in_place(ANNA, BEN, start=0.0))), edited) < 1e-4
    assert relative(sample(apply(model, adapter, in_place(ANNA, BEN, 0.0, torch.ones(16, 16)))), edited) < 1e-4
    assert relative(sample(apply(model, adapter, in_place(ANNA, BEN, start=1.0))), before) < 1e-4
    assert relative(sample(apply(model, adapter, in_place(ANNA, BEN, 0.0, torch.zeros(16, 16)))), before) < 1e-4
    assert relative(edited, before) > 0.01


@pytest.mark.parametrize("negative", ["zeros", "none"])
def test_an_edit_in_place_is_one_node_until_it_sets_in_and_another_after_it(model, adapter, negative):
    own, face = torch.zeros(1, 64, 64), torch.zeros(1, 32, 32)
    own[:, :48], face[..., :16] = 1, 1
    large = face.repeat_interleave(2, 1).repeat_interleave(2, 2)
    together = apply(model, adapter, in_place(Placed(ANNA, 0.7, own), BEN, 0.4, face), negative=negative)
    after = Placed(BEN, 0.7, own * large), Placed(ANNA, 0.7, own * (1 - large))
    first = apply(model, adapter, Placed(ANNA, 0.7, own), end_percent=0.4, negative=negative)
    apart = apply(first, adapter, *after, start_percent=0.4, negative=negative)
    assert relative(sample(together, steps=4), sample(apart, steps=4)) < 1e-4
    assert relative(sample(together, steps=4), sample(first, steps=4)) > 0.001


def test_each_persons_edit_sets_in_at_its_own_time_beside_people_without_one(model, adapter):
    carl = Placed(person(3), 0.5)
    together = apply(model, adapter, in_place(ANNA, BEN, 0.3), carl, in_place(BEN, ANNA, 0.7))
    first = apply(model, adapter, ANNA, carl, BEN, end_percent=0.3)
    second = apply(first, adapter, BEN, carl, BEN, start_percent=0.3, end_percent=0.7)
    third = apply(second, adapter, BEN, carl, ANNA, start_percent=0.7)
    assert relative(sample(together, steps=4), sample(third, steps=4)) < 1e-4


def test_a_strip_of_edits_in_place(model, adapter):
    edits = Identity(torch.cat([ANNA.w, BEN.w]), "edits")
    x = noise(2, same=True)
    out = sample(apply(model, adapter, in_place(ANNA, edits)), x)
    assert relative(out[:1], sample(apply(model, adapter, ANNA), x)[:1]) < 1e-4
    assert relative(out[1:], sample(apply(model, adapter, in_place(ANNA, BEN)), x)[1:]) < 1e-4


def test_an_edit_in_place_of_an_edit_in_place_is_refused():
    with pytest.raises(WPlusError, match=r"W\+ Edit Stack"):
        in_place(in_place(ANNA, BEN), BEN)
    with pytest.raises(WPlusError, match="Edit in Place: the mask holds NaN"):
        in_place(ANNA, BEN, mask=torch.full((1, 8, 8), torch.nan))


@pytest.mark.parametrize("h, w", [(20, 12), (9, 7)])
def test_latents_of_any_shape(model, adapter, h, w):
    x = noise(1, h, w)
    out = sample(apply(model, adapter, Placed(ANNA, 1.0, torch.ones(1, 33, 65))), x)
    assert relative(out, sample(apply(model, adapter, ANNA), x)) < 1e-4


def test_start_and_end(model, adapter):
    def steps(m):
        seen = []
        sample(m, steps=4, callback=lambda step, x0, x, total: seen.append(x0.clone()))
        return seen

    plain, late, early = steps(model), steps(apply(model, adapter, ANNA, start_percent=0.5)), None
    changed = [not torch.equal(a, b) for a, b in zip(plain, late, strict=True)]
    assert changed[0] is False and changed[-1] is True and changed == sorted(changed)
    full, early = steps(apply(model, adapter, ANNA)), steps(apply(model, adapter, ANNA, end_percent=0.5))
    assert torch.equal(full[0], early[0]) and not torch.equal(full[-1], early[-1])
    assert torch.equal(steps(apply(model, adapter, ANNA, start_percent=1.0, end_percent=0.0))[-1], plain[-1])


def test_layer_presets(model, adapter):
    sites = [site for site, _ in cross_attention_sites(model.model.diffusion_model)]
    count = {p: sum(parse_layers(p, "", sites, CHANNELS)) for p in ("all", "down", "up", "deep", "shallow")}
    assert count == {"all": 16, "down": 6, "up": 9, "deep": 6, "shallow": 10}
    ones = sample(apply(model, adapter, ANNA, layer_weights=" ".join(["1"] * 16)))
    assert torch.equal(ones, sample(apply(model, adapter, ANNA)))
    for bad in ("1, 2", "a, b", " ".join(["99"] * 16)):
        with pytest.raises(WPlusError, match="expected 16 numbers"):
            apply(model, adapter, ANNA, layer_weights=bad)


# --- beside other patches ---------------------------------------------------------------------------------------------


class Doubler:
    """Another pack's attn2 replacement; packs of the IP-Adapter family keep such an object and call `.add` on it."""

    def __init__(self):
        self.factors = [2.0]

    def add(self, factor):
        self.factors.append(factor)

    def __call__(self, q, k, v, options):
        h = optimized_attention(q, k, v, options["n_heads"])
        for f in self.factors:
            h = h * f
        return h


def with_doubler(model, key=("input", 1)):
    m = model.clone()
    m.set_model_attn2_replace(Doubler(), *key)
    return m


@pytest.mark.parametrize("key", [("input", 1), ("input", 1, 0), ("middle", 0)])
def test_another_attn2_pack_in_either_order(model, adapter, key):
    before = sample(apply(with_doubler(model, key), adapter, ANNA))
    after = sample(with_doubler(apply(model, adapter, ANNA), key))
    assert torch.equal(before, after)
    assert relative(before, sample(apply(model, adapter, ANNA))) > 1e-3
    without = sample(apply(with_doubler(model, key), adapter, ANNA, weight=0.0))
    assert torch.equal(without, sample(with_doubler(model, key)))


def test_packs_that_add_to_what_they_find_never_find_us(model, adapter):
    patched = apply(with_doubler(model), adapter, ANNA)
    found = patched.model_options["transformer_options"]["patches_replace"]["attn2"]
    assert [type(p) for p in found.values()] == [Doubler]
    sample(patched)
    assert [type(p) for p in found.values()] == [Doubler]


def nodes_output(result):
    return result.args[0] if hasattr(result, "args") else result[0]


OTHERS = {
    "PAG": lambda m: nodes_output(comfy_extras.nodes_pag.PerturbedAttentionGuidance.execute(m, 2.0)),
    "SAG": lambda m: nodes_output(comfy_extras.nodes_sag.SelfAttentionGuidance.execute(m, 0.5, 2.0)),
    "FreeU": lambda m: nodes_output(comfy_extras.nodes_freelunch.FreeU_V2.execute(m, 1.3, 1.4, 0.9, 0.2)),
    "HyperTile": lambda m: nodes_output(comfy_extras.nodes_hypertile.HyperTile.execute(m, 64, 2, 0, False)),
    "ToMe": lambda m: nodes_output(comfy_extras.nodes_tomesd.TomePatchModel.execute(m, 0.3)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_beside_core_patches_in_either_order(model, adapter, name):
    other = OTHERS[name]
    x = noise(1, 16, 16)
    torch.manual_seed(0)
    alone = sample(other(model), x)
    torch.manual_seed(0)
    assert torch.equal(sample(other(apply(model, adapter, ANNA, weight=0.0)), x), alone)
    results = []
    for m in (other(apply(model, adapter, ANNA)), apply(other(model), adapter, ANNA)):
        torch.manual_seed(0)
        results.append(sample(m, x))
    assert torch.equal(*results)
    assert relative(results[0], alone) > 0.01


class Reads(TorchDispatchMode):
    """Counts reads of a tensor's value on the host; in inference mode `item` and `bool` come as themselves."""

    KINDS = {torch.ops.aten.item.default, torch.ops.aten.is_nonzero.default, torch.ops.aten._local_scalar_dense.default}

    def __init__(self):
        super().__init__()
        self.reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.reads += func in self.KINDS
        return func(*args, **(kwargs or {}))


def test_no_tensor_is_read_back_inside_the_forward(model, adapter):
    """Reads in a run of six steps less those in a run of three: what a step costs, with and without the adapter."""

    def reads_per_three_steps(m):
        counts = []
        sample(m)  # loads the model, which reads too
        for steps in (3, 6):
            with Reads() as mode:
                sample(m, steps=steps)
            counts.append(mode.reads)
        return counts[1] - counts[0]

    mask = torch.ones(1, 64, 64)
    people = Placed(ANNA, 1.0, mask), Placed(BEN, 0.5), in_place(ANNA, BEN)
    patched = apply(model, adapter, *people, start_percent=0.1, end_percent=0.9)
    assert reads_per_three_steps(patched) == reads_per_three_steps(model)


def test_three_conditionings_are_told_apart_by_name_not_by_number(model, adapter):
    """PerpNeg's `empty_negative_prompt` has cond_or_uncond 2, and is a negative."""
    guider = comfy_extras.nodes_perpneg.Guider_PerpNeg
    seen = {}

    def run(m):
        g = guider(m)
        g.set_conds(POSITIVE, NEGATIVE, cond(14))
        g.set_cfg(4.0, 1.0)
        x = noise()
        sigmas = comfy.samplers.calculate_sigmas(m.get_model_object("model_sampling"), "normal", 2)
        with torch.inference_mode():
            return g.sample(x, torch.zeros_like(x), comfy.samplers.sampler_object("euler"), sigmas, seed=1)

    patched = apply(model, adapter, ANNA)
    for patch in patched.wrappers["apply_model"]["wplus"]:
        call = patch.call

        def spy(model, x, t, options, call=call):
            for index, uuid in zip(options["cond_or_uncond"], options["uuids"], strict=True):
                seen[index] = uuid in options["wplus_conds"].negative
            return call(model, x, t, options)

        patch.call = spy
    run(patched)
    assert seen == {0: False, 1: True, 2: True}  # PerpNeg hands over positive, negative, empty


def test_frames_of_context_windows():
    class Window:
        dim, index_list = 0, [4, 5, 6]

    class Anchored(Window):
        causal_anchor_index = 3

    assert latent_indices({"context_window": Window()}, 3) == [4, 5, 6]
    assert latent_indices({"context_window": Anchored()}, 4) == [3, 4, 5, 6]
    assert latent_indices({"ad_params": {"sub_idxs": [2, 3]}}, 2) == [2, 3]
    assert latent_indices({"ad_params": {"sub_idxs": None}}, 2) == [0, 1]
    assert latent_indices({}, 2) == [0, 1]


def test_context_windows_give_each_frame_its_identity(model, adapter):
    from comfy.context_windows import IndexListContextHandler, get_matching_context_schedule, get_matching_fuse_method

    strip = Identity(torch.cat([person(i).w for i in range(6)]))
    x = noise(6, same=True)
    windowed = apply(model, adapter, strip).clone()
    windowed.model_options["context_handler"] = IndexListContextHandler(
        context_schedule=get_matching_context_schedule("standard_static"),
        fuse_method=get_matching_fuse_method("flat"),
        context_length=3,
        context_overlap=0,
        context_stride=1,
        closed_loop=False,
        dim=0,
    )
    assert relative(sample(windowed, x), sample(apply(model, adapter, strip), x)) < 1e-4


@pytest.mark.parametrize("before", [True, False])
def test_torch_compile_makes_one_graph(model, adapter, before):
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    def compiled(m):
        m = m.clone()
        set_torch_compile_wrapper(m, backend="eager", fullgraph=True)
        return m

    expected = [sample(apply(model, adapter, ANNA, start_percent=0.3)), sample(apply(model, adapter, BEN, weight=0.5))]
    torch._dynamo.reset()
    graphs = torch._dynamo.utils.counters["stats"]
    graphs.clear()
    for person_, options, want in ((ANNA, {"start_percent": 0.3}, expected[0]), (BEN, {"weight": 0.5}, expected[1])):
        patched = (
            apply(compiled(model), adapter, person_, **options)
            if before
            else compiled(apply(model, adapter, person_, **options))
        )
        assert relative(sample(patched), want) < 1e-5
    assert graphs["unique_graphs"] == 1  # one for all: neither another person nor when the adapter acts needs a second
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_half_precision_models(adapter, dtype, bound):
    full, half = (sample(apply(small_model(dtype=d), adapter, ANNA), steps=2) for d in (torch.float32, dtype))
    assert torch.isfinite(half).all()
    assert relative(half, full) < bound


def test_img2img_inpainting_and_other_samplers(model, adapter):
    patched = apply(model, adapter, ANNA)
    mask = torch.zeros(1, 8, 8)
    mask[:, 2:6, 2:6] = 1
    x = noise()
    for sampler in ("dpmpp_2m", "uni_pc", "heun"):
        assert torch.isfinite(sample(patched, x, sampler=sampler, denoise=0.6)).all()
    with torch.inference_mode():
        latent = torch.ones_like(x)
        out = comfy.sample.sample(
            patched, x, 3, 4.0, "euler", "normal", POSITIVE, NEGATIVE, latent, noise_mask=mask, seed=3
        )
    outside = mask[0] == 0
    assert torch.allclose(out[0, :, outside], latent[0, :, outside], atol=1e-3)


def test_merged_and_lora_patched_models_keep_the_adapter(model, adapter):
    patched = apply(model, adapter, ANNA).clone()
    key = "diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_q.weight"
    patched.add_patches({key: ("diff", (torch.randn(128, 128),))}, 0.1)
    changed = model.clone()
    changed.add_patches({key: ("diff", (torch.randn(128, 128),))}, 0.0)
    assert torch.isfinite(sample(patched)).all()
    assert torch.equal(sample(apply(changed, adapter, ANNA)), sample(apply(model, adapter, ANNA)))


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_another_family_is_refused_by_name(adapter):
    xl = small_model(comfy.supported_models.SD20, context_dim=1024, model_channels=64)
    with pytest.raises(WPlusError, match="SD1.x models, this one is SD20"):
        apply(xl, adapter, ANNA)


def test_an_adapter_of_other_sizes_is_refused(model, adapter):
    with pytest.raises(WPlusError, match=r"16 layers of \[32, 64, 128\] channels, the model \(SD15\) has 16 of \[64,"):
        apply(small_model(channel_mult=[2, 2, 4, 4]), adapter, ANNA)


def test_codes_of_another_generator_are_refused(model, adapter):
    with pytest.raises(WPlusError, match=r"\[B, 18, 512\]"):
        apply(model, adapter, Identity(torch.randn(1, 14, 512)))


def test_no_identity_is_refused(model, adapter):
    with pytest.raises(WPlusError, match="at least one identity"):
        apply(model, adapter)


def test_masks_are_stacked_at_the_largest_size():
    masks = stack_masks([torch.ones(1, 8, 8), None, torch.zeros(3, 16, 4)])
    assert masks.shape == (3, 3, 8, 8)
    assert masks[:, :2].eq(1).all() and masks[:, 2].eq(0).all()
    assert stack_masks([None, None]) is None
    assert stack_masks([torch.zeros(8, 8), None]).shape == (1, 2, 8, 8)
