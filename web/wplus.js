// Registers the pack's frontend: a panel of sliders with a live preview on W+ Edit Stack. ComfyUI loads every .js file
// here by itself; the others do nothing until they are used.

import { app } from "../../scripts/app.js";
import { follow, Panel } from "./panel.js";
import { serverCatalogue } from "./preview.js";

const panels = new Set();
const HEIGHT = 500;

app.registerExtension({
  name: "WPlus.EditStack",

  nodeCreated(node) {
    if (node.comfyClass !== "WPlusEditStack") return;
    const text = node.widgets.find((widget) => widget.name === "edits");
    const panel = new Panel(node, text);
    panels.add(panel);
    const options = { serialize: false, hideOnZoom: false, getMinHeight: () => HEIGHT };
    const widget = node.addDOMWidget("panel", "wplus_panel", panel.element, options);
    widget.serialize = false; // the text is what is saved and sent
    text.options.getMaxHeight = () => 76;
    node.setSize([Math.max(node.size[0], 420), Math.max(node.size[1], HEIGHT + 200)]);

    follow(node, "onAdded", () => panel.refresh());
    follow(node, "onConfigure", () => panel.refresh());
    follow(node, "onConnectionsChange", () => panel.refresh());
    follow(node, "onExecuted", (output) => panel.executed(output));
    follow(node, "onRemoved", () => {
      panels.delete(panel);
      panel.preview.stop();
    });
    for (const watched of node.widgets) if (watched !== widget) follow(watched, "callback", () => panel.refresh());
  },

  /** The R key and the menu's refresh: files may have come or gone. */
  async refreshComboInNodes() {
    const known = await serverCatalogue(true);
    for (const panel of panels) panel.setCatalogue(known);
  },
});
