"""The workflows' twins on the trained miniature, through ComfyUI: what the pictures show, not only their shapes."""

import json
import sys

import pytest
import torch
from comfyui_wplus.client import load
from comfyui_wplus.train.mini import judge, pack, witness, world
from comfyui_wplus.wplus_core.photos import load_photo

from .server import REPOSITORY
from .workflows import FOLDER, NAMES, fetched

sys.path.append(str(REPOSITORY / "scripts"))
import twins  # noqa: E402

TWINS = FOLDER / twins.FOLDER
STORY, FIND_FACE = "story", "find_face"  # of the miniature alone
NAMES_OF_TWINS = sorted(path.stem for path in TWINS.glob("*.json"))
SMILE, AGE, GLASSES = (world.NAMES.index(name) for name in ("smile", "age", "glasses"))
SIDE = 128


@pytest.fixture(scope="module")
def look():
    """Reads pictures [B, 3, 128, 128] as the miniature's judge does."""
    network = judge.load(REPOSITORY / "miniature")
    return torch.no_grad()(lambda x: network(x))


@pytest.fixture(scope="module")
def people():
    """The factors [8, F] of the faces that the loader gives."""
    return pack.people()


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
    found = pictures(client, graph(name, KSampler__steps=1, WPlusSweep__along__count=3), tmp_path)
    assert found.shape[-1] >= SIDE and found.std() > 0.05


@pytest.mark.parametrize("server", ["newest"], indirect=True)
@pytest.mark.parametrize("name", NAMES_OF_TWINS)
def test_the_editor_opens_a_twin_and_exports_it(frontend, name):
    frontend.load(json.loads((TWINS / f"{name}.json").read_text(encoding="utf-8")))
    assert frontend.prompt() == json.loads((TWINS / "api" / f"{name}.json").read_text(encoding="utf-8"))


def test_the_story_smiles_ages_and_wears_glasses(client, look, people, tmp_path):
    """Five frames (as they are, smiling, sad, old, with glasses) in three places, of one person each."""
    rows = []
    for person in range(3):
        (sheet,) = pictures(client, graph("story", ImageFromBatch__batch_index=person), tmp_path / str(person))
        rows.append(look(cells(sheet, 5, 3)).factors.unflatten(0, (3, 5)))
    plain, smiling, sad, old, glasses = torch.stack(rows).flatten(0, 1).mean(0)
    assert smiling[SMILE] > plain[SMILE] + 0.4 and sad[SMILE] < plain[SMILE] - 0.4
    assert old[AGE] > plain[AGE] + 0.4 and glasses[GLASSES] > plain[GLASSES] + 0.4


def test_a_person_is_recognised_and_at_weight_0_it_is_the_plain_model(client, look, people, tmp_path):
    def painted(**settings):
        frames = [
            pictures(client, graph("portrait", ImageFromBatch__batch_index=n, **settings), tmp_path / f"{n}{settings}")
            for n in range(len(people))
        ]
        return torch.cat(frames)

    named = witness.Witness(judge.load(REPOSITORY / "miniature"), people)
    factors = witness.squashed(look(painted()).factors)
    nearest = ((factors[:, None] - named.people).square() * named.weights).sum(2).argmin(1)
    assert (nearest == torch.arange(len(people))).sum() >= len(people) - 2

    off = painted(WPlusApply__weight=0)
    plain = graph("portrait")
    (sampler,) = (node for node in plain.values() if node["class_type"] == "KSampler")
    sampler["inputs"]["model"] = plain[sampler["inputs"]["model"][0]]["inputs"]["model"]
    without = pictures(client, plain, tmp_path / "plain")
    assert all(x.equal(without[0]) for x in off)
