"""The drawn world: what it says about its pictures is true, and people can be told apart in them."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from comfyui_wplus.train.mini import world
from comfyui_wplus.train.mini.draw import palette
from comfyui_wplus.train.mini.scenes import (
    COLOURS,
    LABELS,
    WORDS,
    captions,
    landmarks,
    sample_scenes,
    scenes,
)
from comfyui_wplus.wplus_core.align import align, ffhq_transform
from comfyui_wplus.wplus_core.faces import from_5

ATTRIBUTES = [i for i, f in enumerate(world.FACTORS) if f.kind == "attribute"]
# Of the 64 px of a face: the rows that an attribute may change.
ROWS = {"smile": (18, 60), "mouth_open": (36, 64), "eyes_open": (18, 44), "brows": (10, 36), "glasses": (18, 44)}


def rng(seed=0):
    return np.random.default_rng(seed)


def people(n, seed=0):
    """Without beards, glasses and the marks of age, looking straight ahead."""
    z = world.sample(n, rng(seed))
    z[:, ATTRIBUTES] = 0
    z[:, world.NAMES.index("glasses")] = z[:, world.NAMES.index("beard")] = -2
    return z


def with_factor(z, name, value):
    z = z.clone()
    z[:, world.NAMES.index(name)] = value
    return z


def plain_scenes(n, seed=1, **labels):
    """Photos by day."""
    values = {"style": "photo", "light": "by day"} | labels
    numbers = {k: torch.full((n,), LABELS[k].index(v)) for k, v in values.items()}
    return replace(sample_scenes(n, rng(seed)), **numbers)


def test_points_in_the_crop_are_where_the_alignment_puts_them():
    """FFHQ's crop is centred a tenth of the way from the eyes to the mouth, and four eye distances wide or more."""
    points = world.points_in_crop(world.sample(20, np.random.default_rng(1)), 64)
    eyes, mouth = points[:, :2].mean(1), points[:, 3:].mean(1)
    assert torch.allclose(eyes + 0.1 * (mouth - eyes), torch.full((20, 2), 31.5), atol=1e-3)
    assert ((points[:, 1] - points[:, 0]).norm(dim=1) <= 16.01).all()


def test_the_seed_decides_everything():
    z, s = world.sample(3, rng(4)), sample_scenes(3, rng(4))
    again = scenes(world.sample(3, rng(4)), sample_scenes(3, rng(4)), 64)
    assert all(torch.equal(a, b) for a, b in zip(scenes(z, s, 64), again, strict=True))
    assert not torch.equal(z, world.sample(3, rng(5)))


def test_a_picture_does_not_depend_on_the_others_of_its_batch():
    z, s = world.sample(70, rng()), sample_scenes(6, rng())  # over 64 faces are drawn in two parts
    torch.testing.assert_close(world.faces(z)[-1:], world.faces(z[-1:]))
    torch.testing.assert_close(scenes(z[:6], s, 64).images[[2]], scenes(z[[2]], s[[2]], 64).images)


def test_pictures_are_in_range_for_any_person():
    z = torch.cat([10 * world.sample(20, rng()), torch.zeros(1, len(world.FACTORS))])
    drawn = scenes(z, sample_scenes(21, rng()), 64)
    for x in (world.faces(z), drawn.images, drawn.masks):
        assert torch.isfinite(x).all() and x.min() >= 0 and x.max() <= 1


@pytest.mark.parametrize("name", world.NAMES)
def test_each_factor_is_seen(name):
    z = people(8)
    low, high = (world.faces(with_factor(z, name, v)) for v in (-2.0, 2.0))
    changed = ((low - high).abs().amax(1) > 0.1).flatten(1).sum(1)
    assert changed.median() >= 12  # pixels of 64 x 64


@pytest.mark.parametrize("name", ROWS)
def test_an_attribute_changes_its_own_region_only(name):
    z = people(8)
    low, high = (world.faces(with_factor(z, name, v)) for v in (-2.0, 2.0))
    changed = (low - high).abs().amax(dim=(0, 1, 3)) > 0.02
    rows = changed.nonzero()[:, 0]
    top, bottom = ROWS[name]
    assert rows.min() >= top and rows.max() < bottom


def test_a_smile_bends_the_mouth_more_and_more():
    person = people(1)
    for name, value in {"skin": -1.5, "lips": 1.5, "mouth_open": -1.0, "freckles": -2.0}.items():
        person = with_factor(person, name, value)
    bends = [mouth_bend(world.faces(with_factor(person, "smile", v), 128)[0]) for v in torch.linspace(-3, 3, 9)]
    assert np.all(np.diff(bends) > 0) and bends[0] < 0 < bends[-1]


def mouth_bend(face):
    """How far the middle of the mouth lies below its corners, in pixels of a 128 px face, from the pixels alone."""
    red, green, _ = face[:, 76:110, 40:88]
    lips = (red - green > 0.25) & (green < 0.45)
    columns = lips.any(0).nonzero()[:, 0]
    rows = torch.arange(len(lips), dtype=torch.float32)[:, None]
    middles = ((rows * lips).sum(0) / lips.sum(0))[columns]
    return -np.polyfit(columns.numpy(), middles.numpy(), 2)[0] * (len(columns) / 2) ** 2


def test_the_mask_is_where_the_head_is():
    z, s = people(6), plain_scenes(6, place="on the beach")
    here, there = scenes(z, s), scenes(z, replace(s, place=torch.full((6,), LABELS["place"].index("in a room"))))
    assert torch.equal(here.masks, there.masks)
    inside, outside = here.masks == 1, here.masks == 0
    assert 0.03 < inside.float().mean() < 0.5
    assert ((here.images - there.images) * inside).abs().max() < 1e-6
    dyed = scenes(with_factor(z, "hair_colour", 2.0), s)
    assert torch.equal(dyed.images * outside, here.images * outside)


def test_landmarks_give_the_crop_that_faces_draws():
    z, s = world.sample(6, rng(3)), plain_scenes(6, place="in the snow")
    drawn, faces = scenes(z, s, 256), world.faces(z, 64)
    points = landmarks(z, s, 256)
    assert torch.equal(points, drawn.points)
    for i in range(6):
        face = from_5(points[i].numpy())
        torch.testing.assert_close(
            torch.linalg.inv(ffhq_transform(face, 64)), world.ffhq(points[i, None].double(), 64)[0]
        )
        crop, mask = (align(x[i].expand(3, -1, -1), [face], 64).images[0] for x in (drawn.images, drawn.masks))
        inside = mask[:1] > 0.99
        assert ((crop - faces[i]).abs() * inside).sum() / (3 * inside.sum()) < 0.02
        assert ((crop - faces[i - 1]).abs() * inside).sum() / (3 * inside.sum()) > 0.04  # someone else


def test_the_face_has_the_size_and_place_of_its_scene():
    s = sample_scenes(300, rng())
    points = landmarks(people(300), s, 100)
    assert 0.50 <= s.height.min() < 0.52 and 0.66 < s.height.max() <= 0.68
    assert points.min() > 2 and points.max() < 97
    middle = points[:, [0, 1, 3, 4]].mean(1)
    assert (middle - torch.stack([s.x, s.y], 1) * 100).abs().max() < 14


def labels_of(caption):
    """From the text alone."""
    text, style = caption.removeprefix("a person in a").removeprefix("n").strip().split(", ")
    colour, garment, rest = text.split(" ", 2)
    light = next(v for v in LABELS["light"] if rest.endswith(v))
    place = next(v for v in LABELS["place"] if rest.removesuffix(light).strip().endswith(v))
    action = rest.removesuffix(light).strip().removesuffix(place).strip()
    return [colour, garment, action, place, light, style]


def test_captions_say_all_labels_and_use_few_words():
    s = sample_scenes(400, rng())
    texts = captions(s)
    for i, text in enumerate(texts):
        assert labels_of(text) == [values[getattr(s, name)[i]] for name, values in LABELS.items()]
    used = {word for text in [*texts, world.NEUTRAL] for word in text.replace(",", "").split()}
    assert used <= set(WORDS) and {"cat", "a", "an", "sketch"} <= used and len(WORDS) <= 120


@pytest.mark.parametrize("name", world.LOOKS)
def test_words_of_looks_follow_their_factor(name):
    words, person = world.LOOKS[name], people(1)
    said = [set(world.looks(with_factor(person, name, v))[0]) & set(words) for v in torch.linspace(-3, 3, 200)]
    order = [next(iter(w), "") for w in said]
    assert [w for i, w in enumerate(order) if not i or w != order[i - 1]] == list(dict.fromkeys(words))
    assert sum(w in others for w in words if w for others in world.LOOKS.values()) == len([w for w in words if w])


def test_a_caption_with_looks_is_a_sentence():
    assert world.looking("a face on white", ["old", "sad"]) == "an old sad face on white"
    assert world.looking("a person in a red dress", []) == "a person in a red dress"
    some = world.some_looks(world.sample(300, rng()), rng(1), 3)
    lengths = [len(words) for words in some]
    assert set(lengths) == {0, 1, 2, 3} and 0.5 < lengths.count(3) / 300 < 0.75


@pytest.mark.parametrize("label", LABELS)
def test_each_label_is_seen(label):
    n = len(LABELS[label])
    s = replace(plain_scenes(1)[[0] * n], **{label: torch.arange(n)})
    images = scenes(people(1).expand(n, -1), s).images
    for one, two in combinations(images, 2):
        assert ((one - two).abs().amax(0) > 0.1).sum() > 80  # pixels of 128 x 128


def test_the_shirt_has_the_colour_of_the_label():
    n = 24
    s = replace(plain_scenes(n, garment="shirt", action=""), colour=torch.arange(n) % len(COLOURS))
    drawn = scenes(people(n), s)
    px = s.height * 128 / 1.53
    at = torch.stack([s.x * 128 + 0.35 * px, (s.y * 128 + 1.6 * px)], 1).long().clamp(max=127)  # right of the buttons
    seen = drawn.images[torch.arange(n), :, at[:, 1], at[:, 0]]
    known = palette(torch.linspace(0, 1, len(COLOURS)), tuple(COLOURS.values()))[..., 0, 0]
    assert torch.cdist(seen, known).argmin(1).tolist() == s.colour.tolist()


def retrieved(a, b):
    return (torch.cdist(a.flatten(1), b.flatten(1)).argmin(1) == torch.arange(len(a))).float().mean()


def test_people_are_known_again_whatever_their_expression():
    z = world.sample(60, rng(8))
    other = z.clone()
    other[:, ATTRIBUTES] = world.sample(60, rng(9))[:, ATTRIBUTES]
    assert retrieved(world.faces(z), world.faces(other)) > 0.4  # 1 in 60 by chance


def test_people_are_known_again_in_scenes():
    z, s = people(40), plain_scenes(40)
    drawn = scenes(z, s)
    crops = torch.cat(
        [align(x, [from_5(p.numpy())], 64).images for x, p in zip(drawn.images, drawn.points, strict=True)]
    )
    assert retrieved(crops[:, :, 12:56, 16:48], world.faces(z)[:, :, 12:56, 16:48]) > 0.9
