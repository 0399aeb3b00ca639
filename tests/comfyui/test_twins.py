"""The workflows' twins on the trained miniature, through ComfyUI: what the pictures show, not only their shapes."""

import json
import sys

import pytest
import torch
from comfyui_wplus.client import load, title_of
from comfyui_wplus.train.mini import autoencoder, judge, pack, scenes, world
from comfyui_wplus.train.mini.witness import Witness
from comfyui_wplus.wplus_core.photos import load_photo

from .server import REPOSITORY
from .workflows import FOLDER, NAMES, fetched, newest_only

sys.path.append(str(REPOSITORY / "scripts"))
import twins  # noqa: E402

TWINS = FOLDER / twins.FOLDER
STORY, FIND_FACE = "story", "find_face"  # of the miniature alone
NAMES_OF_TWINS = sorted(path.stem for path in TWINS.glob("*.json"))
SMILE, AGE, GLASSES, SKIN, HAIR = map(world.NAMES.index, ("smile", "age", "glasses", "skin", "hair_colour"))
SIDE = 128


@pytest.fixture(scope="module")
def look():
    """The miniature's judge."""
    return judge.load(REPOSITORY / "miniature")


def graph(name, **settings):
    """A twin with inputs set by `NodeType__input`."""
    workflow = load(TWINS / "api" / f"{name}.json")
    for key, value in settings.items():
        kind, _, name = key.partition("__")
        for node in workflow.values():
            if node["class_type"] == kind and name.replace("__", ".") in node["inputs"]:
                node["inputs"][name.replace("__", ".")] = value
    return workflow


def pictures(client, workflow, folder):
    saved, _, _ = fetched(client, client.run(workflow), folder)
    return torch.stack([load_photo(path).pixels for path in saved])


def cells(sheet, columns, rows):
    """The pictures [N, 3, 128, 128] of a sheet with labels above or left of them."""
    left, top = sheet.shape[2] - columns * SIDE, sheet.shape[1] - rows * SIDE
    assert 0 <= left and 0 <= top < SIDE
    x = sheet[:, top:, left:].unflatten(2, (columns, SIDE)).unflatten(1, (rows, SIDE))
    return x.permute(1, 3, 0, 2, 4).flatten(0, 1)


def test_every_workflow_has_its_twin():
    assert sorted([*NAMES_OF_TWINS, *twins.WITHOUT]) == sorted([*NAMES, STORY])
    for name in set(NAMES) - set(twins.WITHOUT):
        original, twin = (json.loads((f / "api" / f"{name}.json").read_text()) for f in (FOLDER, TWINS))
        assert twin == json.loads(json.dumps(twins.twin(name, original))), name


@pytest.mark.parametrize("name", NAMES_OF_TWINS)
def test_a_twin_runs(client, name, tmp_path):
    if name == "identity_file":
        client.run(graph("portrait", KSampler__steps=1, WPlusSaveIdentity__filename_prefix="miniature_identity"))
    found = pictures(
        client, graph(name, KSampler__steps=1, WPlusSweep__along__count=3, WPlusSweep__along__second_count=2), tmp_path
    )
    assert found.shape[-1] >= SIDE and found.std() > 0.05


@newest_only
@pytest.mark.parametrize("name", NAMES_OF_TWINS)
def test_the_editor_opens_a_twin_and_exports_it(frontend, name):
    frontend.load(json.loads((TWINS / f"{name}.json").read_text(encoding="utf-8")))
    assert frontend.prompt() == json.loads((TWINS / "api" / f"{name}.json").read_text(encoding="utf-8"))


def test_the_storys_codes_smile_age_and_wear_glasses(client, look, tmp_path):
    """As the generator paints them: five frames of three people, as they are, smiling, sad, old, with glasses."""
    rows = []
    for person in range(3):
        workflow = graph("story", ImageFromBatch__batch_index=person)
        titles = {title_of(workflow, node_id): node_id for node_id in workflow}
        workflow[titles["Save sheet"]]["inputs"]["images"] = [titles["Faces by StyleGAN2"], 0]
        for title in ("Sheet", "Faces", "What the generator makes of the codes"):
            workflow.pop(titles[title])
        rows.append(look.reader.read_face(pictures(client, workflow, tmp_path / str(person))))
    plain, smiling, sad, old, glasses = torch.stack(rows).mean(0)
    assert smiling[SMILE] > plain[SMILE] + 0.7 and sad[SMILE] < plain[SMILE] - 0.7
    assert old[AGE] > plain[AGE] + 0.5 and glasses[GLASSES] > plain[GLASSES] + 0.7


def test_the_person_comes_into_the_scene(client, look, tmp_path):
    """Eight people in the same scene and noise, by the judge; by chance one of them would be recognised."""
    who = pack.people()
    runs = [graph("portrait", ImageFromBatch__batch_index=i) for i in range(len(who))]
    painted = torch.cat([pictures(client, run, tmp_path / str(i)) for i, run in enumerate(runs)])
    seen = look(painted).factors
    for factor in (SKIN, HAIR):
        assert torch.corrcoef(torch.stack([seen[:, factor], who[:, factor]]))[0, 1] > 0.6
    nearest = Witness(look, who, autoencoder.load(REPOSITORY / "miniature"), 128).distances(seen).argmin(1)
    assert (nearest == torch.arange(len(who))).sum() >= 4


def test_edits_show_in_the_scenes(client, look, tmp_path):
    """Of three people in three scenes, the same noise in a row: the mean of the judge's reading."""
    rows = []
    for person in range(3):
        (sheet,) = pictures(client, graph("story", ImageFromBatch__batch_index=person), tmp_path / str(person))
        rows.append(look(cells(sheet, 5, 3)).factors.unflatten(0, (3, 5)))
    plain, smiling, sad, old, glasses = torch.cat(rows).mean(0)
    assert smiling[SMILE] > sad[SMILE] + 0.1 and old[AGE] > plain[AGE] + 0.1 and glasses[GLASSES] > plain[GLASSES] + 0.1


@newest_only
def test_an_edit_in_place_shows_as_well_and_leaves_the_rest_of_the_picture(client, look, tmp_path):
    """Smile and glasses of three people, beside the same edits from the start and everywhere."""

    def changes(name, **settings):
        """How far each attribute moved, and what changed outside the face's rectangle of the workflow."""
        shown, around = [], []
        for edit, factor in (("drawn/smile=2", SMILE), ("drawn/glasses=2", GLASSES)):
            for person in range(3):
                settings |= {"ImageFromBatch__batch_index": person, "WPlusEditStack__edits": edit}
                folder = tmp_path / f"{name}-{factor}-{person}"
                pair = pictures(client, graph("edit_in_place", **settings), folder)
                change = pair.diff(dim=0).abs().mean((0, 1))
                change[8:96, 24:104] = torch.nan
                shown.append(look(pair).factors.diff(dim=0)[0, factor])
                around.append(change.nanmean())
        return torch.stack(shown).unflatten(0, (2, 3)).mean(1), torch.stack(around).mean()

    shown, around = changes("in_place")
    shown_anyway, around_anyway = changes("whole", WPlusEditInPlace__start_percent=0, SolidMask__value=1)
    print(f"moved {shown} (anyway {shown_anyway}), around the face {around:.4f} ({around_anyway:.4f})")  # for docs
    assert (shown_anyway > 0.5).all() and (shown > 0.7 * shown_anyway).all()
    assert around < 0.5 * around_anyway


def test_pictures_show_what_the_prompt_says(client, look, tmp_path):
    """Clothes, place, light and style of the three rows of the story, by the judge."""
    (sheet,) = pictures(client, graph("story"), tmp_path)
    seen = look(cells(sheet, 5, 3))
    prompts = [node["inputs"]["text"] for node in graph("story").values() if node["class_type"] == "CLIPTextEncode"]
    prompts = [text for text in prompts if text]
    right = [
        values[found] in prompt
        for name, values in scenes.LABELS.items()
        if name != "action"
        for found, prompt in zip(seen.labels[name].argmax(1), [p for p in prompts for _ in range(5)], strict=True)
    ]
    assert sum(right) / len(right) > 0.75 and (seen.person > 0).float().mean() > 0.8


def test_at_weight_0_it_is_the_plain_model(client, tmp_path):
    plain = graph("portrait")
    (sampler,) = (node for node in plain.values() if node["class_type"] == "KSampler")
    sampler["inputs"]["model"] = plain[sampler["inputs"]["model"][0]]["inputs"]["model"]
    without = pictures(client, plain, tmp_path / "plain")
    assert pictures(client, graph("portrait", WPlusApply__weight=0), tmp_path / "0").equal(without)
    assert not pictures(client, graph("portrait"), tmp_path / "1").equal(without)
