// The text of edits, in the grammar of wplus_core/direction_files.py (parse_edits). One number changes at a time and
// all else that somebody typed stays as it is: spacing, layers, raw numbers, names that nobody knows.

const PART = /([^\s,;=@]+)\s*=\s*(raw:)?([^\s,;=@]+)(?:\s*@\s*([^\s,;=@]+))?/g;

/** The edits of a text: {name, raw, value, layers, start, end, from, to}; text.slice(from, to) is the number. */
export function parse(text) {
  return [...text.matchAll(PART)].map((match) => {
    const [whole, name, raw, number, layers] = match;
    const from = match.index + whole.indexOf(number, whole.indexOf("=") + 1 + (raw ?? "").length);
    const value = Number(number.replace("\u2212", "-"));
    const end = match.index + whole.length;
    return { name, raw: Boolean(raw), value, layers, start: match.index, end, from, to: from + number.length };
  });
}

export function format(value) {
  return String(Number(value.toFixed(3)));
}

/** The text with another number in one of its edits; without the edit where nothing of it is left. */
export function replaced(text, edit, value) {
  if (value || edit.raw || edit.layers) return text.slice(0, edit.from) + format(value) + text.slice(edit.to);
  return removed(text, edit);
}

export function removed(text, edit) {
  const after = text.slice(edit.end).replace(/^[\s,;]+/, "");
  return after ? text.slice(0, edit.start) + after : text.slice(0, edit.start).replace(/[\s,;]+$/, "");
}

export function appended(text, name, value) {
  const before = text.trimEnd();
  return `${before}${before && (before.includes("\n") ? "\n" : " ")}${name}=${format(value)}`;
}

const plain = (name) => name.trim().replaceAll(" ", "_").toLowerCase();

/** The server's directions, found by name as the server finds them: by full name, else the first of that name alone. */
export class Catalogue {
  constructor({ directions = [], generators = [] } = {}) {
    this.directions = directions;
    this.generators = generators;
    this.byName = new Map();
    for (const d of directions) {
      const name = plain(d.label);
      if (!this.byName.has(name)) this.byName.set(name, d);
    }
    for (const d of directions) this.byName.set(plain(d.name), d);
  }

  find(name) {
    return this.byName.get(plain(name));
  }

  /** What to write for a direction: its name alone where that finds it. */
  shortName(direction) {
    return this.find(direction.label) === direction ? direction.label : direction.name;
  }

  /** The edits of a text by what shows them: a slider each for the plain ones, the others apart. */
  sorted(text) {
    const sliders = new Map();
    const others = [];
    for (const edit of parse(text)) {
      const direction = this.find(edit.name);
      if (direction && !edit.raw && !sliders.has(direction)) sliders.set(direction, edit);
      else others.push({ ...edit, direction });
    }
    return { sliders, others };
  }

  /** The text with a direction at a strength. */
  set(text, direction, value) {
    const edit = this.sorted(text).sliders.get(direction);
    if (edit) return replaced(text, edit, value);
    return value ? appended(text, this.shortName(direction), value) : text;
  }

  /** The text without the edits that the server's files do not explain, and their names. */
  known(text) {
    const unknown = parse(text).filter((edit) => !this.find(edit.name));
    const left = unknown.reduceRight((rest, edit) => removed(rest, edit), text);
    return { text: left, unknown: unknown.map((edit) => edit.name) };
  }
}
