"""The panel of W+ Edit Stack in a real browser: sliders, text, presets and the picture stay one thing."""

import json
import shutil
import urllib.request

import pytest
import torch
from comfyui_wplus.wplus_core.checkpoints import save_identity
from comfyui_wplus.wplus_core.direction_files import load_collection, parse_edits
from comfyui_wplus.wplus_core.errors import WPlusError
from comfyui_wplus.wplus_core.identity import Identity
from playwright.sync_api import expect

from .workflows import newest_only

NODE = """() => {
    const node = window.stack = LiteGraph.createNode("WPlusEditStack");
    node.pos = [300, 120];
    app.graph.add(node);
}"""
MODULE = "import('/extensions/ComfyUI-WPlus/edits.js')"


@pytest.fixture
def panel(frontend):
    """A page with one edit stack, whose picture of the average face is fine."""
    frontend.page.evaluate(NODE)
    painted(frontend, "")
    return frontend


def painted(page, edits):
    """Waits for the fine picture of these edits."""
    picture = page.page.locator(".wplus-picture")
    expect(picture).to_have_attribute("data-edits", edits, timeout=60_000)
    expect(picture).to_have_attribute("data-size", "256", timeout=60_000)
    picture.evaluate("image => image.decode()")


def slider(panel, name="smile"):
    return panel.page.get_by_role("slider", name=name, exact=True)


def number(panel, name="smile"):
    return panel.page.get_by_role("textbox", name=name, exact=True)


def button(panel, name):
    return panel.page.get_by_role("button", name=name, exact=True)


def message(panel):
    return panel.page.locator(".wplus-message[role=status]")


def text(panel):
    return panel.page.evaluate("() => app.graph.nodes[0].widgets.find(w => w.name === 'edits').value")


def type_text(panel, words):
    panel.page.locator("textarea").first.fill(words)


def pixels(panel):
    """The shown picture's mean colour in a grid of 8 x 8."""
    return panel.page.evaluate("""() => {
        const canvas = new OffscreenCanvas(8, 8), context = canvas.getContext("2d");
        context.drawImage(document.querySelector(".wplus-picture"), 0, 0, 8, 8);
        return Array.from(context.getImageData(0, 0, 8, 8).data);
    }""")


def test_a_slider_moves_the_picture_the_workflow_and_the_prompt(panel):
    average, sizes = pixels(panel), []
    panel.page.expose_function("seen", lambda size: sizes.append(size))
    panel.page.evaluate("""() => document.querySelector(".wplus-picture")
        .addEventListener("load", (event) => window.seen(event.target.naturalWidth))""")
    slider(panel).hover()  # in its middle, when nothing moves any more
    box = slider(panel).bounding_box()
    panel.page.mouse.down()
    panel.page.mouse.move(box["x"] + 0.9 * box["width"], box["y"] + box["height"] / 2, steps=3)
    panel.page.mouse.up()
    strength = float(slider(panel).input_value())
    assert 2 < strength < 3
    painted(panel, f"smile={strength:g}")
    assert sizes[0] == 128 and sizes[-1] == 256  # at once, then finer
    assert pixels(panel) != average

    (node,) = panel.serialize()["nodes"]
    assert node["widgets_values"] == [f"smile={strength:g}", False]
    (sent,) = panel.prompt().values()
    assert sent["inputs"] == {"edits": f"smile={strength:g}", "keep_plausible": False}
    assert node["pos"] == [300, 120]  # dragging a slider drags no node


def test_a_saved_workflow_comes_back_with_its_values_presets_and_picture(panel):
    type_text(panel, "smile=2\nage=-1.5")
    panel.page.get_by_label("Name of a new preset").fill("merry")
    button(panel, "Save").click()
    painted(panel, "smile=2\nage=-1.5")
    before, saved = pixels(panel), panel.serialize()
    panel.page.evaluate("() => app.graph.clear()")
    expect(panel.page.locator(".wplus-panel")).to_have_count(0)
    panel.load(saved)
    painted(panel, "smile=2\nage=-1.5")
    assert pixels(panel) == before
    assert float(slider(panel).input_value()) == 2 and number(panel, "age").input_value() == "-1.5"
    expect(button(panel, "merry")).to_have_attribute("aria-pressed", "true")
    assert panel.serialize()["nodes"][0]["widgets_values"] == saved["nodes"][0]["widgets_values"]


def test_a_text_typed_by_hand_shows_and_survives_the_sliders(panel):
    typed = "smile=2, age = -1 @ 4-7\nuntrained/pose=raw:-20 ;  nobody=1.5 smile=0.5@fine"
    type_text(panel, typed)
    assert float(slider(panel, "age").input_value()) == -1
    assert number(panel, "untrained/pose").input_value() == "-20" and number(panel, "nobody").input_value() == "1.5"
    expect(message(panel)).to_have_text("Not in this picture: nobody.")
    shown = panel.page.locator(".wplus-picture").get_attribute("data-edits")
    assert shown == "smile=2, age = -1 @ 4-7\nuntrained/pose=raw:-20 ;  smile=0.5@fine"

    slider(panel, "age").press("ArrowLeft")
    assert text(panel) == typed.replace("-1 @", "-1.05 @")
    slider(panel, "nobody").press("End")
    assert text(panel) == typed.replace("-1 @", "-1.05 @").replace("1.5", "3")
    slider(panel, "pose").press("Home")
    assert text(panel).endswith("\npose=-3")
    button(panel, "Reset age").click()
    assert "age = 0 @ 4-7" in text(panel)  # its layers stay
    button(panel, "Reset all").click()
    assert text(panel) == "" and slider(panel).input_value() == "0"
    expect(panel.page.get_by_role("group", name="Typed by hand")).to_be_hidden()


def test_the_keyboard_is_enough(panel):
    keys = panel.page.keyboard
    panel.page.get_by_label("Search directions").focus()
    keys.type("eyes op")
    expect(slider(panel)).to_be_hidden()
    for key in ("Tab", "Tab", "Tab"):  # over "Changed" and the group's heading
        keys.press(key)
    expect(slider(panel, "eyes_open")).to_be_focused()
    assert slider(panel, "eyes_open").evaluate("e => getComputedStyle(e).outlineStyle") == "solid"
    keys.press("ArrowRight")
    keys.press("ArrowRight")
    assert text(panel) == "eyes_open=0.1"
    keys.press("Enter")
    keys.type("-4,5")
    keys.press("Enter")
    expect(slider(panel, "eyes_open")).to_be_focused()
    assert text(panel) == "eyes_open=-4.5" and slider(panel, "eyes_open").get_attribute("min") == "-4.5"
    keys.press("Delete")
    assert text(panel) == "" and len(panel.serialize()["nodes"]) == 1  # it deleted the strength, not the node
    number(panel, "eyes_open").fill("much")
    keys.press("Enter")
    assert text(panel) == "" and number(panel, "eyes_open").input_value() == "0"


def test_searching_and_showing_what_changed(panel):
    type_text(panel, "age=1 emotion_happy=1")
    search = panel.page.get_by_label("Search directions")
    search.fill("happy untrained")
    expect(slider(panel, "emotion_happy")).to_be_visible()
    expect(slider(panel, "emotion_sad")).to_be_hidden()
    search.fill("hapy")
    expect(panel.page.get_by_text("No direction of that name")).to_be_visible()
    search.fill("")
    button(panel, "Changed").click()
    expect(panel.page.locator(".wplus-row:visible")).to_have_count(2)
    button(panel, "Changed").click()
    expect(panel.page.locator(".wplus-row:visible")).to_have_count(11)
    button(panel, "Reset all of untrained").click()
    assert text(panel) == ""


def test_presets_are_kept_and_deleted(panel):
    for name, words in (("merry", "smile=2"), ("older", "age=2@0-7 smile=0.5")):
        type_text(panel, words)
        panel.page.get_by_label("Name of a new preset").fill(name)
        panel.page.get_by_label("Name of a new preset").press("Enter")
    assert panel.serialize()["nodes"][0]["properties"]["wplus_presets"] == {
        "merry": "smile=2", "older": "age=2@0-7 smile=0.5"
    }  # fmt: skip
    button(panel, "merry").click()
    assert text(panel) == "smile=2" and slider(panel).input_value() == "2"
    button(panel, "Delete the preset merry").click()
    assert list(panel.serialize()["nodes"][0]["properties"]["wplus_presets"]) == ["older"]
    assert text(panel) == "smile=2"


def test_before_shows_the_face_without_edits_while_it_is_held(panel):
    average = pixels(panel)
    type_text(panel, "smile=3")
    painted(panel, "smile=3")
    edited = pixels(panel)
    button(panel, "Before").focus()
    panel.page.keyboard.down("Space")
    painted(panel, "")
    assert pixels(panel) == average != edited
    panel.page.keyboard.up("Space")
    painted(panel, "smile=3")
    assert pixels(panel) == edited and text(panel) == "smile=3"


def test_a_wrong_text_says_why(panel):
    type_text(panel, "smile=lots")
    expect(message(panel)).to_contain_text("expected a number after =")
    type_text(panel, "smile=1")
    painted(panel, "smile=1")
    expect(message(panel)).to_have_text("")


def test_a_run_brings_its_identity(frontend, server, photo, client):
    shutil.copy(photo, server.base / "input" / photo.name)
    encode = {"encoder": ["2", 0], "face": ["1", 0], "faces_are": "one person", "name": "", "remove_background": False}
    frontend.load_api({
        "1": {"class_type": "LoadImage", "inputs": {"image": photo.name}},
        "2": {"class_type": "WPlusLoadEncoder", "inputs": {"encoder_name": "untrained_encoder.pt"}},
        "3": {"class_type": "WPlusEncodeIdentity", "inputs": encode | {"refine_steps": 0}},
        "4": {"class_type": "WPlusEditStack", "inputs": {"identity": ["3", 0], "edits": "smile=1"}},
        "5": {"class_type": "WPlusSaveIdentity", "inputs": {"identity": ["4", 0], "filename_prefix": "panel"}},
    })  # fmt: skip
    painted(frontend, "smile=1")
    expect(frontend.page.get_by_text("The average face. Run once to see yours.")).to_be_visible()
    average = pixels(frontend)
    frontend.page.evaluate("() => app.queuePrompt(0)")
    expect(frontend.page.get_by_text("The identity of the last run")).to_be_visible(timeout=60_000)
    painted(frontend, "smile=1")
    assert pixels(frontend) != average


def test_the_miniatures_sliders_and_faces_are_shown_where_it_is_loaded(panel):
    panel.page.evaluate("() => app.graph.add(LiteGraph.createNode('WPlusLoadMiniature'))")
    other = pixels(panel)
    type_text(panel, "drawn/age=2")
    picture = panel.page.locator(".wplus-picture")
    expect(picture).to_have_attribute("data-edits", "drawn/age=2", timeout=60_000)
    picture.evaluate("image => image.decode()")
    assert picture.evaluate("image => image.naturalWidth") == 64 and pixels(panel) != other
    assert slider(panel, "age").input_value() == "2"  # one slider of that name: the user's own are not for these codes
    expect(slider(panel, "pose")).to_have_count(0)
    expect(slider(panel, "glasses")).to_have_count(1)


def test_without_the_miniature_its_sliders_are_not_in_the_way(panel):
    expect(slider(panel, "glasses")).to_have_count(0)
    expect(slider(panel, "pose")).to_have_count(1)


def test_the_miniatures_generator_is_not_taken_for_ones_own_directions(panel, server):
    with urllib.request.urlopen(f"{server.url}/wplus/directions") as response:
        known = json.load(response)
    drawn = [d for d in known["directions"] if d["group"] == "drawn"]
    picture = panel.page.locator(".wplus-picture")

    def refresh(**changes):
        panel.page.unroute("**/wplus/directions")
        panel.page.route("**/wplus/directions", lambda route: route.fulfill(json=known | changes))
        panel.page.evaluate("app.extensions.find(e => e.name === 'WPlus.EditStack').refreshComboInNodes()")

    try:
        refresh(generators=["miniature"])
        expect(message(panel)).to_contain_text("put an encoder file with a generator")
        expect(picture).to_be_hidden()
        refresh(generators=["miniature"], directions=drawn)  # nothing else is there
        expect(picture).to_be_visible()
        expect(message(panel)).to_have_text("")
        refresh(generators=["miniature"])
        expect(picture).to_be_hidden()
        panel.page.evaluate("() => app.graph.add(LiteGraph.createNode('WPlusLoadMiniature'))")
        type_text(panel, "drawn/age=1")
        painted_by_the_miniature = "image => !image.hidden && image.naturalWidth === 64"
        panel.page.wait_for_function(f"({painted_by_the_miniature})(document.querySelector('.wplus-picture'))")
    finally:
        panel.page.unroute("**/wplus/directions")
        panel.page.evaluate("app.extensions.find(e => e.name === 'WPlus.EditStack').refreshComboInNodes()")


def test_the_identity_file_before_it_is_whose_face_it_is(panel, server):
    for seed, name in enumerate(("ann", "bob")):
        w = torch.randn(1, 18, 512, generator=torch.Generator().manual_seed(seed))
        save_identity(Identity(w), server.base / f"input/{name}.safetensors")
    shown = []
    panel.page.evaluate("""() => {
        window.file = LiteGraph.createNode("WPlusLoadIdentity");
        app.graph.add(file);
        file.connect(0, stack, 0);
    }""")
    for name in ("ann", "bob"):
        panel.page.evaluate(
            """(name) => {
            file.widgets[0].value = name;
            file.widgets[0].callback?.(name);
        }""",
            f"{name}.safetensors [input]",
        )
        expect(panel.page.locator(".wplus-whose")).to_have_text(f"{name}.safetensors [input]")
        painted(panel, "")
        shown.append(pixels(panel))
    assert shown[0] != shown[1]


def test_two_panels_paint_side_by_side(panel):
    panel.page.evaluate(NODE.replace("[300, 120]", "[800, 120]"))
    texts = panel.page.locator("textarea")
    for n, edits in enumerate(("smile=1", "age=2")):
        texts.nth(n).fill(edits)
    for n, edits in enumerate(("smile=1", "age=2")):
        picture = panel.page.locator(".wplus-picture").nth(n)
        expect(picture).to_have_attribute("data-edits", edits, timeout=60_000)
        expect(picture).to_have_attribute("data-size", "256", timeout=60_000)


def test_edits_from_a_wire_are_left_alone(panel):
    panel.page.evaluate("""() => {
        const other = LiteGraph.createNode("PrimitiveStringMultiline");
        app.graph.add(other);
        const slot = stack.inputs.findIndex((input) => input.name === "edits");
        other.connect(0, stack, slot);
    }""")
    expect(message(panel)).to_contain_text("come from a connected node")
    assert panel.page.locator(".wplus-panel").evaluate("e => e.inert")


def test_undo_takes_a_move_back(panel):
    def noted(edits):  # by the editor's history, which looks after a click
        state = "app.extensionManager.workflow.activeWorkflow.changeTracker.activeState.nodes[0]"
        panel.page.wait_for_function(f"edits => {state}?.widgets_values[0] === edits", arg=edits)

    canvas = panel.page.locator("#graph-canvas")
    canvas.click(position={"x": 1550, "y": 420})
    noted("")
    slider(panel).click(position={"x": 2, "y": 9})
    noted("smile=-3")
    panel.page.evaluate("() => app.extensionManager.command.execute('Comfy.Undo')")
    expect(slider(panel)).to_have_value("0")
    assert text(panel) == "" and len(panel.serialize()["nodes"]) == 1


@newest_only
def test_it_works_in_nodes_2(panel):
    setting = "on => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', on)"
    panel.page.evaluate(setting, True)
    try:
        expect(panel.page.locator("[data-node-id] .wplus-panel")).to_be_visible()
        slider(panel).press("ArrowRight")
        expect(panel.page.locator("textarea").first).to_have_value("smile=0.05")
        type_text(panel, "age=1")
        expect(number(panel, "age")).to_have_value("1")
        assert panel.page.locator("[data-node-id] .wplus-panel").bounding_box()["height"] < 700
    finally:
        panel.page.evaluate(setting, False)


@pytest.mark.parametrize(
    "words",
    [
        "", "smile=2", "smile=2 age=-1.5 eyes_open=1@4-7", "smile = 2 , age= -1", "Smile=1;AGE=2\n\npose=.5",
        "smile=raw:-20@coarse", "untrained/smile=1e-1 @ fine", "smile=\u22121", "a=1 b=2@5", "smile=1 smile=2",
    ],
)  # fmt: skip
def test_the_panel_reads_a_text_as_the_server_does(frontend, stand_ins, words):
    known = load_collection(stand_ins / "wplus/directions")
    read = frontend.page.evaluate(f"async (text) => (await {MODULE}).parse(text)", words)
    assert all(words[e["from"] : e["to"]].replace("\u2212", "-") in words.replace("\u2212", "-") for e in read)
    try:
        expected = parse_edits(words, known)
    except WPlusError:
        assert words.startswith("a=1")  # names that nobody knows
        assert [e["name"] for e in read] == ["a", "b"]
        return
    numbers = [(e["name"].lower().rpartition("/")[2], e["value"], e["raw"]) for e in read]
    assert numbers == [(e.direction.name.rpartition("/")[2], e.strength, e.raw) for e in expected]
    assert [bool(e.get("layers")) for e in read] == [e.layers is not None for e in expected]


def test_names_are_found_as_the_server_finds_them(frontend, server):
    catalogue = frontend.page.evaluate("async () => (await (await fetch('/wplus/directions')).json())")
    doubled = json.loads(json.dumps(catalogue))
    doubled["directions"] = [
        {**doubled["directions"][0], "name": f"{group}/smile", "group": group, "label": "smile"}
        for group in ("interfacegan", "latent_directions", "mine")
    ]
    found = frontend.page.evaluate(
        f"""async (known) => {{
            const {{ Catalogue }} = await {MODULE};
            const c = new Catalogue(known);
            const name = (x) => c.find(x)?.name;
            const names = ["smile", "SMILE", "mine/smile", "Mine/Smile", "nobody"].map(name);
            return [...names, c.shortName(c.find("smile")), c.shortName(c.find("mine/smile"))];
        }}""",
        doubled,
    )
    plain = "interfacegan/smile"
    assert found == [plain, plain, "mine/smile", "mine/smile", None, "smile", "mine/smile"]
