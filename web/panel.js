// The panel of W+ Edit Stack: a slider per direction over the text of edits, presets, and the face that comes of it.
// The text is the truth: every change goes through it, and whatever is typed there shows here.

import { app } from "../../scripts/app.js";
import { Catalogue, format, parse, replaced } from "./edits.js";
import { Preview, serverCatalogue } from "./preview.js";

const PRESETS = "wplus_presets"; // in node.properties: {name: text of edits}
const STEP = 0.05;
const LOADERS = ["WPlusLoadEncoder", "WPlusLoadMiniature"]; // of a generator; the second has no file to choose
const MINIATURE = "miniature"; // its generator's name; of use with its codes alone
const NO_GENERATOR = "No picture: put an encoder file with a generator (e4e_ffhq_encode.pt) into models/wplus, then press R";
const DRAWN = "drawn"; // the group of the miniature's directions, of use with its codes alone

const sheet = document.createElement("link");
sheet.rel = "stylesheet";
sheet.href = new URL("./panel.css", import.meta.url).href;

/** An element with properties (aria-… and data-… as attributes), listeners (on…) and children. */
function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-") || name === "role" || name === "for") element.setAttribute(name, value);
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element[name] = value;
  }
  element.append(...children);
  return element;
}

const pretty = (name) => name.replaceAll("_", " ");

/** A slider with its number. change(value): somebody moved it. */
class Row {
  constructor({ label, hint, low, high, step, change }) {
    Object.assign(this, { low, high, change });
    const id = `wplus-${Math.random().toString(36).slice(2)}`;
    const shared = { "aria-label": label, title: hint };
    this.slider = make("input", {
      ...shared, type: "range", id, min: low, max: high, step, value: 0, "aria-keyshortcuts": "Enter Delete",
      oninput: () => this.changed(Number(this.slider.value)),
      ondblclick: () => this.number.select(),
      onkeydown: (event) => this.key(event),
    });
    this.number = make("input", {
      ...shared, type: "text", className: "wplus-number", inputMode: "decimal", tabIndex: -1,
      onfocus: () => this.number.select(),
      onchange: () => this.typed(),
      onkeydown: (event) => {
        if (event.key === "Escape") this.number.value = format(this.value);
        if (event.key === "Enter" || event.key === "Escape") this.slider.focus();
      },
    });
    this.reset = make("button", {
      type: "button", className: "wplus-quiet", tabIndex: -1, textContent: "↺", title: `Reset ${label}`,
      "aria-label": `Reset ${label}`, onclick: () => this.changed(0),
    });
    this.badge = make("span", { className: "wplus-badge" });
    const name = make("label", { for: id, title: hint }, pretty(label), this.badge);
    this.element = make("div", { className: "wplus-row" }, name, this.slider, this.number, this.reset);
    this.show(0);
  }

  key(event) {
    if (event.key === "Enter") this.number.focus();
    else if (event.key === "Delete" || event.key === "Backspace") this.changed(0);
    else return;
    event.preventDefault();
  }

  typed() {
    const value = Number(this.number.value.replace(",", ".").replace("\u2212", "-"));
    if (this.number.value.trim() === "" || !Number.isFinite(value)) this.number.value = format(this.value);
    else this.changed(value);
  }

  changed(value) {
    this.show(value);
    this.change(value);
  }

  /** A number beyond the usual range widens the slider. */
  show(value, badge = this.badge.textContent) {
    this.value = value;
    this.slider.min = Math.min(this.low, value);
    this.slider.max = Math.max(this.high, value);
    this.slider.value = value;
    const [min, max] = [Number(this.slider.min), Number(this.slider.max)];
    const place = (x) => `${(100 * (x - min)) / (max - min)}%`;
    this.slider.style.setProperty("--from", place(Math.min(0, value)));
    this.slider.style.setProperty("--to", place(Math.max(0, value)));
    if (document.activeElement !== this.number || this.number.value === "") this.number.value = format(value);
    this.badge.textContent = badge;
    this.reset.disabled = value === 0;
    this.element.classList.toggle("wplus-changed", value !== 0);
  }
}

export class Panel {
  constructor(node, text) {
    document.head.append(sheet);
    Object.assign(this, { node, text, rows: new Map(), groups: [], catalogue: new Catalogue(), identity: null });
    this.watched = new WeakSet();
    this.preview = new Preview((...picture) => this.show(...picture), (...words) => this.say(...words));
    this.build();
    serverCatalogue().then(
      (known) => this.setCatalogue(known),
      () => this.say("no answer from the server", true),
    );
  }

  build() {
    const button = (label, title, onclick, more) => make("button", { type: "button", textContent: label, title, onclick, ...more });
    this.picture = make("img", { className: "wplus-picture", alt: "The edited face", draggable: false, hidden: true });
    this.whose = make("div", { className: "wplus-whose" });
    this.message = make("div", { className: "wplus-message", role: "status" });
    this.presets = make("div", { className: "wplus-presets", role: "group", "aria-label": "Presets" });
    this.presetName = make("input", {
      type: "text", placeholder: "Name of a preset", "aria-label": "Name of a new preset",
      onkeydown: (event) => event.key === "Enter" && this.savePreset(),
    });
    this.before = button("Before", "Hold to see the face without edits", null, {
      "aria-pressed": "false",
      onpointerdown: () => this.compare(true),
      onkeydown: (event) => [" ", "Enter"].includes(event.key) && !event.repeat && this.compare(true),
    });
    for (const over of ["pointerup", "pointerleave", "keyup", "blur"]) {
      this.before.addEventListener(over, () => this.compare(false));
    }
    this.resetAll = button("Reset all", "Take all edits out", () => this.write(""));
    this.search = make("input", {
      type: "search", placeholder: "Search directions", "aria-label": "Search directions", oninput: () => this.filter(),
    });
    this.onlyChanged = button("Changed", "Show only what is not zero", () => {
      const pressed = this.onlyChanged.getAttribute("aria-pressed") !== "true";
      this.onlyChanged.setAttribute("aria-pressed", pressed);
      this.filter();
    }, { "aria-pressed": "false" });
    this.others = make("div", { className: "wplus-group wplus-others", role: "group", "aria-label": "Typed by hand" });
    this.list = make("div", { className: "wplus-list" });
    this.nothing = make("div", { className: "wplus-nothing", hidden: true });
    const face = make("div", { className: "wplus-face" }, this.picture, this.whose);
    const save = make("div", { className: "wplus-line" }, this.presetName,
      button("Save", "Keep these edits under this name, in the workflow", () => this.savePreset()));
    const side = make("div", { className: "wplus-side" },
      make("div", { className: "wplus-line" }, this.before, this.resetAll), this.presets, save, this.message);
    this.element = make("div", { className: "wplus-panel" },
      make("div", { className: "wplus-top" }, face, side),
      make("div", { className: "wplus-line" }, this.search, this.onlyChanged), this.list);
    this.keepToItself();
  }

  /** The canvas below would drag, zoom and delete nodes with what is meant for the panel. */
  keepToItself() {
    this.element.addEventListener("keydown", (event) => {
      if (!event.ctrlKey && !event.metaKey && !event.altKey) event.stopPropagation();
    });
    this.element.addEventListener("pointerdown", (event) => {
      if (event.target.closest("input, button, summary, .wplus-list")) event.stopPropagation();
    });
    this.list.addEventListener("wheel", (event) => {
      if (!event.ctrlKey && this.list.scrollHeight > this.list.clientHeight) event.stopPropagation();
    });
  }

  setCatalogue(known) {
    this.catalogue = new Catalogue(known);
    this.rows.clear();
    this.groups = [];
    this.list.replaceChildren(this.others, this.nothing);
    const byGroup = Map.groupBy ? Map.groupBy(this.catalogue.directions, (d) => d.group) : grouped(this.catalogue.directions);
    for (const [name, directions] of byGroup) this.addGroup(name, directions);
    this.nothing.textContent = this.groups.some((group) => !group.drawn)
      ? "No direction of that name"
      : "No directions yet: put their files into models/wplus/directions, then press R";
    this.refresh();
  }

  addGroup(name, directions) {
    const rows = directions.map((direction) => {
      const [low, high] = direction.usual;
      const hint = `${direction.name}\n${direction.source || "direction"}, layers ${direction.layers}\nEnter types a number, Delete resets`;
      const change = (value) => this.write(this.catalogue.set(this.text.value, direction, value), direction);
      const row = new Row({ label: direction.label, hint, low: Math.min(low, 0), high: Math.max(high, 0), step: STEP, change });
      row.words = `${pretty(direction.name)} ${direction.name}`.toLowerCase();
      this.rows.set(direction, row);
      return row;
    });
    const count = make("span", { className: "wplus-count" });
    const reset = make("button", {
      type: "button", className: "wplus-quiet", textContent: "reset", "aria-label": `Reset all of ${pretty(name || "other")}`,
      onclick: (event) => {
        event.preventDefault(); // the summary around it would fold
        this.write(directions.reduce((text, d) => this.catalogue.set(text, d, 0), this.text.value));
      },
    });
    const summary = make("summary", {}, pretty(name || "other"), count, reset);
    const element = make("details", { className: "wplus-group", open: this.groups.length < 2 || name === DRAWN }, summary, ...rows.map((r) => r.element));
    this.groups.push({ element, rows, count, reset, drawn: name === DRAWN });
    this.list.append(element);
  }

  /** Sets the text; refresh follows from its callback. */
  write(value, moved) {
    if (value === this.text.value) return;
    this.moved = moved;
    this.text.value = value;
    this.text.callback?.(value);
    this.moved = null;
    this.node.setDirtyCanvas?.(true, true);
  }

  /** Shows what the text says. */
  refresh() {
    const { sliders, others } = this.catalogue.sorted(this.text.value ?? "");
    for (const [direction, row] of this.rows) {
      const edit = sliders.get(direction);
      if (direction !== this.moved || edit?.value !== row.value) row.show(edit?.value || 0, edit?.layers ? `@${edit.layers}` : "");
    }
    this.showOthers(others);
    for (const { element, rows, count, reset } of this.groups) {
      const changed = rows.filter((row) => row.value !== 0).length;
      count.textContent = changed ? ` ${changed} of ${rows.length}` : ` ${rows.length}`;
      reset.hidden = !changed;
      if (changed && !this.moved) element.open = true;
    }
    const linked = this.node.inputs?.find((input) => input.name === "edits")?.link != null;
    this.element.inert = linked;
    this.resetAll.disabled = !this.text.value;
    this.showPresets();
    this.filter();
    if (linked) this.say("The edits come from a connected node; disconnect it to use the panel.");
    else this.look();
  }

  /** Raw numbers, second mentions and unknown names: a row each, rebuilt only when others are there than before. */
  showOthers(others) {
    const key = JSON.stringify(others.map(({ name, raw, layers }) => [name, raw, layers]));
    if (key !== this.othersKey) {
      this.othersKey = key;
      this.otherRows = others.map((edit, i) => this.otherRow(edit, i));
      const heading = make("div", { className: "wplus-heading" }, "Typed by hand");
      this.others.replaceChildren(...(others.length ? [heading, ...this.otherRows.map((row) => row.element)] : []));
    }
    others.forEach((edit, i) => {
      const badge = [edit.raw && "raw", edit.layers && `@${edit.layers}`, !edit.direction && "not in the folder"];
      this.otherRows[i].show(Number.isFinite(edit.value) ? edit.value : 0, badge.filter(Boolean).join(" "));
    });
  }

  otherRow({ name, raw, direction }, i) {
    const [low, high] = direction?.usual ?? [-3, 3];
    const unit = raw ? Math.abs(direction?.unit ?? 1) : 1;
    const change = (value) => {
      const edit = this.catalogue.sorted(this.text.value).others[i];
      this.write(replaced(this.text.value, edit, value));
    };
    const row = new Row({ label: name, hint: name, low: low * unit, high: high * unit, step: raw ? "any" : STEP, change });
    row.words = pretty(name).toLowerCase();
    return row;
  }

  filter() {
    const words = this.search.value.toLowerCase().replaceAll("_", " ").split(" ").filter(Boolean);
    const only = this.onlyChanged.getAttribute("aria-pressed") === "true";
    const shows = (row) => words.every((word) => row.words.includes(word)) && (!only || row.value !== 0);
    const miniature = this.loader()?.comfyClass === LOADERS[1];
    let shown = 0;
    for (const { element, rows, drawn } of this.groups) {
      const other = drawn !== miniature && rows.every((row) => row.value === 0);
      const fitting = other ? [] : rows.filter(shows);
      for (const row of rows) row.element.hidden = !fitting.includes(row);
      element.hidden = !fitting.length;
      if (fitting.length && (words.length || only)) element.open = true;
      shown += fitting.length;
    }
    this.nothing.hidden = shown > 0;
  }

  showPresets() {
    const presets = Object.entries(this.node.properties?.[PRESETS] ?? {});
    this.presets.replaceChildren(...presets.map(([name, text]) => {
      const apply = { type: "button", textContent: name, title: text, "aria-pressed": text === this.text.value };
      const remove = { type: "button", textContent: "×", "aria-label": `Delete the preset ${name}` };
      return make("span", { className: "wplus-preset" },
        make("button", { ...apply, onclick: () => this.write(text) }),
        make("button", { ...remove, onclick: () => this.setPreset(name, null) }));
    }));
  }

  savePreset() {
    const name = this.presetName.value.trim();
    if (!name) return this.presetName.focus();
    this.presetName.value = "";
    this.setPreset(name, this.text.value);
  }

  setPreset(name, text) {
    const { [name]: _, ...rest } = this.node.properties[PRESETS] ?? {};
    this.node.setProperty(PRESETS, text === null ? rest : { ...rest, [name]: text });
    this.showPresets();
  }

  /** A run of the node brought its identity. */
  executed(output) {
    this.identity = output?.wplus_identity?.[0] ?? this.identity;
    this.refresh();
  }

  /** Which face: an identity file right before the node, else that of the last run, else the average. */
  face() {
    const before = source(this.node, "identity");
    const file = before?.comfyClass === "WPlusLoadIdentity" && before.widgets.find((w) => w.name === "identity_name");
    if (file && !this.watched.has(file)) {
      this.watched.add(file);
      follow(file, "callback", () => this.look());
    }
    if (file?.value) return [{ identity_name: file.value }, file.value];
    const last = this.identity ?? app.nodeOutputs?.[this.node.id]?.wplus_identity?.[0];
    if (last) return [{ identity: last }, "The identity of the last run"];
    return [{}, "The average face. Run once to see yours."];
  }

  /** The node that the generator comes from, if the graph has one. */
  loader() {
    return app.graph.nodes?.find((node) => LOADERS.includes(node.comfyClass));
  }

  /** The loader's, else the first file's; the miniature's only where it is loaded, or where there is nothing else. */
  generator() {
    const loader = this.loader();
    if (loader?.comfyClass === LOADERS[1]) return MINIATURE;
    const files = this.catalogue.generators.filter((name) => name !== MINIATURE);
    const chosen = loader?.widgets?.[0]?.value;
    if (files.length) return files.includes(chosen) ? chosen : files[0];
    return loader || this.groups.some((group) => !group.drawn) ? null : MINIATURE;
  }

  look() {
    if (!this.catalogue.generators.length || !this.node.graph) return;
    const [who, label] = this.face();
    const { text, unknown } = this.catalogue.known(this.text.value ?? "");
    const generator = this.generator();
    if (!generator) return this.blank(NO_GENERATOR);
    const keep_plausible = Boolean(this.node.widgets.find((w) => w.name === "keep_plausible")?.value);
    const edits = this.comparing ? "" : text;
    if (this.node.inputs?.some((input) => input.name.startsWith("direction") && input.link != null)) {
      unknown.push("directions from wires");
    }
    this.preview.ask({ ...who, edits, generator, keep_plausible }, { edits, label, unknown });
  }

  compare(pressed) {
    if (Boolean(this.comparing) === pressed) return;
    this.comparing = pressed;
    this.before.setAttribute("aria-pressed", pressed);
    this.look();
  }

  show(url, size, kept, { edits, label, unknown }) {
    const old = this.picture.src;
    this.picture.src = url;
    this.picture.hidden = false;
    this.whose.textContent = label;
    Object.assign(this.picture.dataset, { size, edits });
    if (old) URL.revokeObjectURL(old);
    const notes = [];
    if (kept < 1) notes.push(`Held back to ${Math.round(100 * kept)} % to stay plausible.`);
    if (unknown.length) notes.push(`Not in this picture: ${unknown.join(", ")}.`);
    this.say(notes.join(" "));
  }

  /** No picture, and why. */
  blank(message) {
    this.preview.stop();
    this.picture.hidden = true;
    this.whose.textContent = "";
    this.say(message, true);
  }

  say(message, isError = false) {
    this.message.textContent = message;
    this.message.classList.toggle("wplus-error", isError);
  }
}

/** Calls then after a method of an object, whatever the method is by now. */
export function follow(object, method, then) {
  const before = object[method];
  object[method] = function (...args) {
    const result = before?.apply(this, args);
    then(...args);
    return result;
  };
}

/** The node behind an input, past reroutes. */
function source(node, name) {
  for (let slot = node.inputs?.findIndex((input) => input.name === name); ; slot = 0) {
    node = slot >= 0 ? node?.getInputNode?.(slot) : null;
    if (node?.type !== "Reroute") return node;
  }
}

function grouped(directions) {
  const groups = new Map();
  for (const d of directions) groups.set(d.group, [...(groups.get(d.group) ?? []), d]);
  return groups;
}
