// SPDX-License-Identifier: Apache-2.0
// Small charts of the last two minutes. Each says its newest numbers as text too.

const NUM_POINTS = 120;
const SVG = "http://www.w3.org/2000/svg";

export class Chart {
  // names: of one or two lines; top: the value at the upper edge, or null for the largest seen.
  constructor(parent, title, names, { top = null, show = (value) => value.toFixed(0) } = {}) {
    this.title = title;
    this.names = names;
    this.top = top;
    this.show = show;
    this.rows = [];
    const figure = document.createElement("figure");
    this.caption = document.createElement("figcaption");
    this.svg = document.createElementNS(SVG, "svg");
    this.svg.setAttribute("viewBox", `0 0 ${NUM_POINTS - 1} 100`);
    this.svg.setAttribute("preserveAspectRatio", "none");
    this.svg.setAttribute("role", "img");
    this.lines = names.map((_, index) => {
      const line = document.createElementNS(SVG, "polyline");
      if (index) line.classList.add("second");
      this.svg.append(line);
      return line;
    });
    figure.append(this.caption, this.svg);
    parent.append(figure);
  }

  add(values) {
    this.rows = [...this.rows, values].slice(-NUM_POINTS);
    const top = this.top ?? Math.max(1, ...this.rows.flat());
    this.lines.forEach((line, index) => {
      const first = NUM_POINTS - this.rows.length;
      const points = this.rows.map((row, at) => `${first + at},${(97 - (row[index] / top) * 94).toFixed(1)}`);
      line.setAttribute("points", points.join(" "));
    });
    this.caption.replaceChildren(this.title);
    const numbers = document.createElement("span");
    this.names.forEach((name, index) => {
      const value = document.createElement("b");
      value.textContent = this.show(values[index]);
      const label = document.createElement("span");
      label.textContent = name ? ` ${name}` : "";
      if (index) label.className = "second-name";
      numbers.append(index ? ", " : "", value, label);
    });
    this.caption.append(numbers);
    const told = this.names.map((name, index) => `${this.show(values[index])} ${name}`.trim()).join(", ");
    this.svg.setAttribute("aria-label", `${this.title}: ${told}; at most ${this.show(top)} in two minutes`);
  }
}
