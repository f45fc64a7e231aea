"use strict";
// Charts, sorting, filter and copying for a page of compared recipes. Everything shown comes from the page itself.
(() => {
  const byId = (id) => document.getElementById(id);
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  const data = JSON.parse(byId("data").textContent);
  const { measures, recipes, texts, fronts, baseline, onTheWay } = data;
  const NAMESPACE = new DOMParser().parseFromString("<svg></svg>", "text/html").querySelector("svg").namespaceURI;
  const COLORS = 8; // --c0 to --c7 of the style sheet
  const DASHES = ["", "7 3", "2 3", "9 3 2 3"];
  document.body.classList.add("scripted");

  // ---- Elements and texts

  function draw(parent, tag, attributes, text) {
    const element = document.createElementNS(NAMESPACE, tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    if (text !== undefined) element.textContent = text;
    parent.append(element);
    return element;
  }

  function html(parent, tag, text, properties = {}) {
    const element = Object.assign(document.createElement(tag), properties);
    if (text !== undefined) element.textContent = text;
    parent.append(element);
    return element;
  }

  const pen = document.createElement("canvas").getContext("2d");
  function widthOf(text) {
    pen.font = "12px system-ui, sans-serif";
    return pen.measureText(text).width;
  }

  /** The text, cut where it is wider than `most` pixels. */
  function short(text, most) {
    const letters = [...text];
    if (widthOf(text) <= most) return text;
    while (letters.length && widthOf(letters.join("") + "…") > most) letters.pop();
    return letters.join("") + "…";
  }

  // ---- Axes

  const STEPS = {
    bytes: [
      [2 ** 30, "GiB"],
      [2 ** 20, "MiB"],
      [2 ** 10, "KiB"],
      [1, "B"],
    ],
    seconds: [
      [7200, "h", 3600],
      [600, "min", 60],
      [1, "s"],
      [1e-3, "ms"],
      [1e-6, "µs"],
    ],
    numbers: [
      [1e9, "G"],
      [1e6, "M"],
      [1e3, "k"],
      [1, ""],
    ],
    share: [[0, "%", 0.01]],
  };

  /** What to divide values of that size by, and the unit that they then have. */
  function scaleOf(unit, size) {
    const steps = STEPS[unit] || [[0, ""]];
    const found = steps.find(([least]) => Math.abs(size) >= least) || steps.at(-1);
    return { divisor: found[2] || found[0] || 1, suffix: found[1] ? " " + found[1] : "" };
  }

  const leastOf = (values) => values.reduce((least, value) => Math.min(least, value), Infinity);
  const plain = (value) => String(Number(value.toPrecision(4)));

  function figure(value, unit) {
    const { divisor, suffix } = scaleOf(unit, value);
    return plain(value / divisor) + suffix;
  }

  /** Round values between low and high, with their texts. */
  function linearTicks(low, high, unit, most) {
    const { divisor, suffix } = scaleOf(unit, Math.max(Math.abs(low), Math.abs(high)));
    const rough = (high - low) / divisor / most;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = power * [1, 2, 5, 10].find((each) => each * power >= rough);
    const ticks = [];
    for (let k = Math.ceil(low / divisor / step - 1e-9); k * step * divisor <= high + 1e-9 * step * divisor; k++) {
      ticks.push({ at: k * step * divisor, text: plain(k * step) + suffix });
    }
    return ticks;
  }

  function logTicks(low, high, unit, most) {
    const base = unit === "bytes" ? 2 : 10;
    const first = Math.ceil(Math.log(low) / Math.log(base) - 1e-9),
      last = Math.floor(Math.log(high) / Math.log(base) + 1e-9);
    const every = Math.max(1, Math.ceil((last - first + 1) / most));
    const between = base === 10 && last - first < 3 ? [1, 2, 5] : [1];
    const ticks = [];
    for (let power = first - 1; power <= last; power += every) {
      for (const times of between) {
        const at = times * base ** power;
        if (at >= low * (1 - 1e-9) && at <= high) ticks.push({ at, text: figure(at, unit) });
      }
    }
    return ticks;
  }

  /** A place on the axis for each value between low and high; logarithmic where they span orders of magnitude. */
  function axis(values, unit, from, to, most, mayBeLog) {
    let low = leastOf(values),
      high = -leastOf(values.map((value) => -value));
    const above = values.filter((value) => value > 0);
    const least = leastOf(above);
    const log = mayBeLog && low >= 0 && above.length > 0 && high / least > 20;
    const zero = log && low === 0;
    if (log) {
      low = least;
      const room = (high / low) ** 0.05;
      const start = zero ? low / (high / low) ** 0.12 : low / room;
      const end = high * room;
      const place = (value) => from + ((to - from) * Math.log(Math.max(value, start) / start)) / Math.log(end / start);
      const ticks = logTicks(low / room, end, unit, most);
      return { place, log, ticks: zero ? [{ at: 0, text: "0" }, ...ticks] : ticks };
    }
    const room = (high - low) * 0.06 || Math.abs(high) * 0.05 || 1;
    const start = low >= 0 ? Math.max(low - room, 0) : low - room,
      end = high + room;
    const place = (value) => from + ((to - from) * (value - start)) / (end - start);
    return { place, log, ticks: linearTicks(start, end, unit, most) };
  }

  /** An empty chart in `holder`: its axes, and where values are. */
  function frame(holder, label, xs, ys, xTitle, yTitle, right, xMayBeLog) {
    const width = Math.max(holder.clientWidth, 240),
      height = Math.round(Math.min(Math.max(width * 0.6, 280), 440));
    const svg = draw(holder, "svg", {
      width,
      height,
      viewBox: `0 0 ${width} ${height}`,
      role: "group",
      "aria-label": label,
    });
    const yTicks = axis(ys.values, ys.unit, height - 48, 28, 6, false);
    const left = 12 + Math.max(...yTicks.ticks.map((tick) => widthOf(tick.text)), 0);
    const x = axis(
      xs.values,
      xs.unit,
      left,
      width - right,
      Math.max(3, Math.floor((width - left - right) / 90)),
      xMayBeLog,
    );
    for (const { at, text } of yTicks.ticks) {
      draw(svg, "line", { class: "grid", x1: left, x2: width - right, y1: yTicks.place(at), y2: yTicks.place(at) });
      draw(svg, "text", { x: left - 6, y: yTicks.place(at) + 4, "text-anchor": "end" }, text);
    }
    let end = -Infinity;
    for (const { at, text } of x.ticks) {
      draw(svg, "line", { class: "grid", x1: x.place(at), x2: x.place(at), y1: 28, y2: height - 48 });
      const half = widthOf(text) / 2,
        middle = Math.min(Math.max(x.place(at), half), width - half);
      if (middle - half < end + 6) continue;
      end = middle + half;
      draw(svg, "text", { x: middle, y: height - 32, "text-anchor": "middle" }, text);
    }
    draw(svg, "text", { class: "title", x: 0, y: 14 }, yTitle);
    draw(
      svg,
      "text",
      { class: "title", x: width - right, y: height - 8, "text-anchor": "end" },
      xTitle + (x.log ? ", logarithmic" : ""),
    );
    return { svg, width, height, left, right: width - right, x: x.place, y: yTicks.place };
  }

  // ---- What is near the pointer

  const tip = html(document.body, "div", undefined, { id: "tip", hidden: true });
  tip.setAttribute("role", "tooltip");

  function showTip(lines, x, y) {
    tip.replaceChildren();
    lines.forEach((line, k) => html(tip, k ? "div" : "b", line));
    tip.hidden = false;
    const room = document.documentElement.clientWidth - tip.offsetWidth - 8;
    tip.style.left = `${Math.max(8, Math.min(x + 14, room)) + scrollX}px`;
    tip.style.top = `${(y > tip.offsetHeight + 20 ? y - tip.offsetHeight - 12 : y + 16) + scrollY}px`;
  }

  /** Tell of the drawn point nearest to the pointer. points: {x, y, lines} */
  function tellOfNearest(svg, points) {
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      const x = event.clientX - box.left,
        y = event.clientY - box.top;
      const far = (point) => (point.x - x) ** 2 + (point.y - y) ** 2;
      const nearest = points.reduce((best, point) => (far(point) < far(best) ? point : best), points[0]);
      if (nearest && far(nearest) < 30 ** 2) showTip(nearest.lines, nearest.x + box.left, nearest.y + box.top);
      else tip.hidden = true;
    });
    svg.addEventListener("pointerleave", () => (tip.hidden = true));
  }

  addEventListener("keydown", (event) => event.key === "Escape" && (tip.hidden = true));

  // ---- Quality against a cost

  const select = byId("cost");
  const cost = () => (select ? Number(select.value) : 1);
  let shown = new Set(recipes.keys());

  const arrow = (measure, up, down) =>
    ({ higher: ` (more is better ${up})`, lower: ` (less is better ${down})` })[measure.better] || "";

  /** Values of all drawn recipes with their spread, without single ones far off on the worse side. */
  function qualityRange(places) {
    const at = places.map((place) => recipes[place].means[0]).sort((a, b) => a - b);
    const quarter = at[Math.floor(at.length / 4)],
      third = at[Math.floor((3 * at.length) / 4)];
    const reach = 2 * (third - quarter) || Infinity,
      onFront = new Set(fronts[cost()]);
    const kept = places.filter((place) => {
      const value = recipes[place].means[0];
      const off = measures[0].better === "lower" ? value - third : quarter - value;
      return off <= reach || onFront.has(place) || place === baseline;
    });
    return kept.flatMap((place) => [-1, 1].map((sign) => recipes[place].means[0] + sign * recipes[place].stds[0]));
  }

  function drawFront() {
    const holder = byId("front-chart");
    if (!holder) return;
    holder.replaceChildren();
    const measure = measures[cost()],
      quality = measures[0];
    const places = [...recipes.keys()].filter(
      (place) => recipes[place].means[0] !== null && recipes[place].means[cost()] !== null,
    );
    byId("front-note").textContent = places.length ? "" : "No recipe has both figures.";
    if (!places.length) return;
    const inRange = qualityRange(places);
    const chart = frame(
      holder,
      `${quality.label} against ${measure.label}`,
      { values: places.map((place) => recipes[place].means[cost()]), unit: measure.unit },
      { values: inRange, unit: quality.unit },
      measure.label + arrow(measure, "→", "←"),
      quality.label + arrow(quality, "↑", "↓"),
      16,
      true,
    );
    const { svg } = chart,
      floor = chart.height - 48;
    const spot = (place) => {
      const y = chart.y(recipes[place].means[0]);
      return {
        place,
        x: chart.x(recipes[place].means[cost()]),
        y: Math.min(Math.max(y, 28), floor),
        off: y > floor + 1 || y < 27,
      };
    };
    const spots = new Map(places.map((place) => [place, spot(place)]));
    const front = fronts[cost()].map((place) => spots.get(place)).filter(Boolean);
    const path = front.map(({ x, y }, k) => (k ? `H${x}V${y}` : `M${x} ${y}`)).join("");
    if (front.length > 1) draw(svg, "path", { class: "front-line", d: path });
    const onFront = new Set(fronts[cost()]);
    const marks = [...places].sort((a, b) => onFront.has(a) - onFront.has(b));
    for (const place of marks) drawMark(svg, chart, spots.get(place), onFront.has(place));
    const named = [
      ...front.map((each, k) => ({ ...each, number: k + 1 })),
      ...(spots.has(baseline) && !onFront.has(baseline) ? [spots.get(baseline)] : []),
    ];
    nameMarks(svg, chart, named, [...spots.values()], front);
    const points = [...spots.values()].map((each) => ({ ...each, lines: about(each.place) }));
    tellOfNearest(svg, points);
    const off = points.filter((point) => point.off).length;
    const key = [
      "◆ on the front",
      ...(baseline === null || !spots.has(baseline) ? [] : ["□ baseline"]),
      "○ other recipes",
      "lines through them: standard deviation over seeds",
    ];
    if (off) key.push(`▼ ${off} far worse, outside the chart`);
    byId("front-note").textContent = key.join("; ") + ".";
  }

  function about(place) {
    const { name } = recipes[place];
    const lines = [name + (place === baseline ? " (baseline)" : "")];
    for (const k of [0, cost()]) lines.push(`${measures[k].label}: ${texts[place][k]}`);
    return lines;
  }

  function drawMark(svg, chart, { place, x, y, off }, onFront) {
    const faded = shown.has(place) ? "" : " faded";
    const mark = draw(svg, "g", {
      class: (onFront ? "mark on-front" : "mark") + faded,
      role: "img",
      "aria-label": about(place).join(", "),
      "data-recipe": place,
      ...(onFront ? { tabindex: 0 } : {}),
    });
    const clamp = (at) => Math.min(Math.max(at, 28), chart.height - 48);
    const spread = (k) => recipes[place].stds[k];
    if (spread(0) && !off) {
      const [low, high] = [-1, 1].map((sign) => clamp(chart.y(recipes[place].means[0] + sign * spread(0))));
      draw(mark, "line", { x1: x, x2: x, y1: low, y2: high });
    }
    if (spread(cost())) {
      const [low, high] = [-1, 1].map((sign) => chart.x(recipes[place].means[cost()] + sign * spread(cost())));
      draw(mark, "line", { x1: Math.max(low, chart.left), x2: Math.min(high, chart.right), y1: y, y2: y });
    }
    if (off) draw(mark, "path", { d: `M${x - 5} ${y - 8}h10l-5 8z` });
    else if (onFront) draw(mark, "path", { d: `M${x} ${y - 7}l7 7l-7 7l-7 -7z` });
    else if (place !== baseline) draw(mark, "circle", { cx: x, cy: y, r: 4.5 });
    if (place === baseline) draw(mark, "rect", { class: "baseline", x: x - 8, y: y - 8, width: 16, height: 16 });
    mark.addEventListener("focus", () => {
      const box = svg.getBoundingClientRect();
      showTip(about(place), x + box.left, y + box.top);
    });
    mark.addEventListener("blur", () => (tip.hidden = true));
  }

  /** Numbers and names beside the marks of the front, where nothing stands yet; the list has those without room. */
  function nameMarks(svg, chart, named, spots, front) {
    const taken = named.map(({ x, y }) => ({ x: x - 9, y: y - 9, width: 18, height: 18 }));
    const small = spots.map(({ x, y }) => ({ x: x - 5, y: y - 5, width: 10, height: 10 }));
    front.slice(1).forEach((to, k) => {
      const from = front[k];
      small.push({ x: Math.min(from.x, to.x), y: from.y - 1, width: Math.abs(to.x - from.x), height: 2 });
      small.push({ x: to.x - 1, y: Math.min(from.y, to.y), width: 2, height: Math.abs(to.y - from.y) });
    });
    const meet = (a, b) => a.x < b.x + b.width && b.x < a.x + a.width && a.y < b.y + b.height && b.y < a.y + a.height;
    const inside = (box) =>
      box.x >= chart.left &&
      box.x + box.width <= chart.right + 12 &&
      box.y >= 20 &&
      box.y + box.height <= chart.height - 48;
    for (const spot of named) {
      const { name } = recipes[spot.place];
      const forms = [`${spot.number || ""} ${short(name, 160)}`.trim(), String(spot.number || "")].slice(
        chart.width < 520 ? 1 : 0,
      );
      let best = null;
      for (const text of forms.filter(Boolean)) {
        const width = widthOf(text) * 1.08 + 4,
          height = 15;
        for (const far of [0, 8, 18, 30]) {
          const [near, side] = [11 + far, width / 2];
          const corners = [
            [near, -height / 2],
            [-near - width, -height / 2],
            [-side, -near - height],
            [-side, near],
            [near - 3, -near - height + 6],
            [near - 3, near - 6],
            [-near - width + 3, -near - height + 6],
            [-near - width + 3, near - 6],
          ];
          for (const [dx, dy] of corners) {
            const box = { x: spot.x + dx, y: spot.y + dy, width, height };
            if (!inside(box) || taken.some((other) => other !== taken[named.indexOf(spot)] && meet(box, other)))
              continue;
            const away = (mark) => Math.hypot(mark.x - box.x - width / 2, mark.y - box.y - height / 2);
            const misleads = named.some((other) => other !== spot && away(other) < away(spot) + 2);
            const crowd = 4 * small.filter((other) => meet(box, other)).length + far / 4 + (misleads ? 20 : 0);
            if (!best || crowd < best.crowd) best = { box, text, crowd, far };
          }
        }
        if (best) break;
      }
      if (!best) continue;
      taken.push(best.box);
      const middle = { x: best.box.x + best.box.width / 2, y: best.box.y + best.box.height / 2 };
      if (best.far > 8) draw(svg, "line", { class: "leader", x1: spot.x, y1: spot.y, x2: middle.x, y2: middle.y });
      draw(
        svg,
        "text",
        {
          class: "name" + (shown.has(spot.place) ? "" : " faded"),
          x: middle.x,
          y: best.box.y + 12,
          "text-anchor": "middle",
        },
        best.text,
      );
    }
  }

  function showCost() {
    for (const front of all(".front")) front.hidden = Number(front.dataset.cost) !== cost();
    const onFront = new Set(fronts[cost()]);
    for (const row of all("#table tbody tr"))
      row.querySelector(".mark").hidden = !onFront.has(Number(row.dataset.recipe));
    if (byId("only-front")?.checked) filter();
    else drawFront();
  }

  // ---- Curves

  const lossHolder = byId("loss-chart"),
    timeHolder = byId("time-chart"),
    lines = byId("lines");
  const FIRST = 6; // lines at the start: more cannot be told apart
  const MOST_NAMES = 12; // that find room at the ends of lines
  let drawn = [
    ...new Set([...(baseline === null ? [] : [baseline]), ...(fronts[1] || []).toReversed(), ...recipes.keys()]),
  ]
    .slice(0, FIRST)
    .sort((a, b) => a - b);

  const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;

  /** Mean and seeds of the loss of a recipe as lists of [x, y]. */
  function lossLines(recipe) {
    const { x, y } = recipe.losses;
    const seeds = y.map((values) => values.map((value, k) => [x[k], value]).filter(([, value]) => value !== null));
    const middle = x
      .map((at, k) => [at, y.map((values) => values[k])])
      .filter(([, values]) => !values.includes(null))
      .map(([at, values]) => [at, mean(values)]);
    return { seeds, middle };
  }

  /** The same of quality by seconds; there is a mean where all seeds were evaluated equally often. */
  function timeLines(recipe) {
    const seeds = recipe.curve.map((points) => points.filter((point) => !point.includes(null)));
    const same = seeds.length && seeds.every((points) => points.length === seeds[0].length);
    return {
      seeds,
      middle: same ? seeds[0].map((_, k) => [0, 1].map((way) => mean(seeds.map((points) => points[k][way])))) : [],
    };
  }

  function drawLines(holder, linesOf, xUnit, xTitle, measure) {
    if (!holder) return;
    holder.replaceChildren();
    const found = drawn
      .map((place) => ({ place, ...linesOf(recipes[place]) }))
      .filter(({ seeds }) => seeds.flat().length);
    if (!found.length) return void html(holder, "p", "Choose recipes below.", { className: "note" });
    const points = found.flatMap(({ seeds }) => seeds.flat());
    const named = holder.clientWidth >= 480 && found.length <= MOST_NAMES,
      right = named ? 132 : 16;
    const chart = frame(
      holder,
      `${measure.label} by ${xTitle}`,
      { values: points.map(([x]) => x), unit: xUnit },
      { values: points.map(([, y]) => y), unit: measure.unit },
      xTitle,
      measure.label + arrow(measure, "↑", "↓"),
      right,
      false,
    );
    const path = (line) =>
      line.map(([x, y], k) => `${k ? "L" : "M"}${chart.x(x).toFixed(1)} ${chart.y(y).toFixed(1)}`).join("");
    const told = [],
      ends = [];
    for (const { place, seeds, middle } of found) {
      const group = draw(chart.svg, "g", { class: "line", style: `--stroke: ${colorOf(place)}`, "data-recipe": place });
      if (seeds.length > 1 || !middle.length)
        for (const seed of seeds) draw(group, "path", { class: "seed", d: path(seed) });
      if (middle.length) draw(group, "path", { class: "mean", d: path(middle), "stroke-dasharray": dashOf(place) });
      const line = middle.length ? middle : seeds.find((seed) => seed.length);
      if (line.length === 1) draw(group, "circle", { cx: chart.x(line[0][0]), cy: chart.y(line[0][1]), r: 4 });
      for (const [x, y] of line)
        told.push({
          x: chart.x(x),
          y: chart.y(y),
          lines: [recipes[place].name, `${xTitle} ${figure(x, xUnit)}`, `${measure.label} ${figure(y, measure.unit)}`],
        });
      ends.push({ place, x: chart.x(line.at(-1)[0]), y: chart.y(line.at(-1)[1]), at: chart.y(line.at(-1)[1]) });
    }
    if (named) nameEnds(chart, ends);
    tellOfNearest(chart.svg, told);
  }

  /** Names at the ends of lines, moved apart. */
  function nameEnds(chart, ends) {
    ends.sort((a, b) => a.y - b.y);
    for (let k = 1; k < ends.length; k++) ends[k].at = Math.max(ends[k].at, ends[k - 1].at + 14);
    const over = Math.max((ends.at(-1)?.at || 0) - (chart.height - 48), 0);
    for (const end of ends) end.at -= over;
    for (let k = ends.length - 2; k >= 0; k--) ends[k].at = Math.min(ends[k].at, ends[k + 1].at - 14);
    for (const { place, x, y, at } of ends) {
      draw(chart.svg, "line", { class: "leader", x1: x, y1: y, x2: chart.right + 6, y2: at });
      draw(chart.svg, "text", { x: chart.right + 9, y: at + 4 }, short(recipes[place].name, 118));
    }
  }

  const order = (place) => drawn.indexOf(place);
  const colorOf = (place) => `var(--c${order(place) % COLORS})`;
  const dashOf = (place) => DASHES[(order(place) + Math.floor(order(place) / COLORS)) % DASHES.length];

  function drawCurves() {
    drawLines(lossHolder, lossLines, "", "step", { label: "loss", unit: "", better: "lower" });
    drawLines(timeHolder, timeLines, "seconds", "time of training", onTheWay);
    for (const box of all("input", lines || tip)) {
      const place = Number(box.value),
        sample = box.parentElement.querySelector("svg");
      box.checked = drawn.includes(place);
      sample.style.visibility = box.checked ? "visible" : "hidden";
      if (box.checked) sample.style.setProperty("--stroke", colorOf(place));
      sample.firstChild.setAttribute("stroke-dasharray", box.checked ? dashOf(place) : "");
    }
  }

  function makePicker() {
    if (!lines) return;
    const choose = (text, places) => {
      html(lines, "button", text, { type: "button" }).addEventListener("click", () => {
        drawn = places();
        drawCurves();
      });
    };
    choose("front of the chart above", () =>
      [...new Set([...(fronts[cost()] || []), ...(baseline === null ? [] : [baseline])])].sort((a, b) => a - b),
    );
    choose("all that pass the filter", () => [...shown]);
    choose("none", () => []);
    const list = html(lines, "div");
    recipes.forEach((recipe, place) => {
      const label = html(list, "label");
      const box = html(label, "input", undefined, { type: "checkbox", value: place });
      box.addEventListener("change", () => {
        drawn = box.checked ? [...drawn, place] : drawn.filter((each) => each !== place);
        drawCurves();
      });
      const sample = draw(label, "svg", { width: 26, height: 10, "aria-hidden": "true" });
      draw(sample, "path", { class: "mean", d: "M0 5H26" });
      html(label, "span", recipe.name);
    });
  }

  // ---- Sorting

  const table = byId("table");

  /** Sort by a column: the better values first, then the other way; what is missing stays last. */
  function sortBy(head) {
    const heads = all("th", table.tHead),
      column = heads.indexOf(head),
      body = table.tBodies[0];
    const before = head.getAttribute("aria-sort");
    const start = head.dataset.first || "ascending";
    const way = before === "none" ? start : before === "ascending" ? "descending" : "ascending";
    heads.forEach((other) => other.setAttribute("aria-sort", other === head ? way : "none"));
    const sign = way === "ascending" ? 1 : -1;
    const key = (row) => {
      const cell = row.cells[column];
      return cell.tagName === "TH"
        ? recipes[row.dataset.recipe].name
        : cell.dataset.v === undefined
          ? null
          : Number(cell.dataset.v);
    };
    const compare = (a, b) => (typeof a === "string" ? a.localeCompare(b) : a - b);
    const keyed = [...body.rows].map((row) => [key(row), row]);
    keyed.sort(([a], [b]) => (a === null || b === null ? (a === null) - (b === null) : sign * compare(a, b)));
    body.append(...keyed.map(([, row]) => row));
  }

  // ---- The filter's expressions

  class Wrong extends Error {}
  const COMPARE = {
    "<": (a, b) => a < b,
    "<=": (a, b) => a <= b,
    ">": (a, b) => a > b,
    ">=": (a, b) => a >= b,
    "==": (a, b) => a === b,
    "!=": (a, b) => a !== b,
  };
  const TIMES = { "%": 0.01, KiB: 2 ** 10, MiB: 2 ** 20, GiB: 2 ** 30 };
  const NUMBER = "(?<number>-?(?:\\d[\\d_]*\\.?\\d*|\\.\\d+)(?:[eE][+-]?\\d+)?)(?<times>%|[KMG]iB\\b)?(?![\\w.%])";
  const TOKEN = new RegExp(`\\s*(?:${NUMBER}|(?<word>[\\p{L}_][\\p{L}\\p{N}_]*)|(?<sign>[<>=!]=|[<>()]))`, "uy");
  const DEEPEST = 100;

  function tokensOf(text) {
    const tokens = [];
    TOKEN.lastIndex = 0;
    let at = 0;
    while (text.slice(at).trim()) {
      TOKEN.lastIndex = at;
      const found = TOKEN.exec(text);
      if (!found) {
        const rest = text.slice(at).trimStart(),
          place = text.length - rest.length + 1;
        const hint = /^=/.test(rest)
          ? "Write == for equal."
          : /^(&|\|)/.test(rest)
            ? "Write and, or."
            : "There are comparisons, and, or, not and parentheses, nothing else.";
        throw new Wrong(`“${[...rest][0]}” at character ${place} cannot stand here. ${hint}`);
      }
      const { number, times, word, sign } = found.groups,
        place = TOKEN.lastIndex - found[0].trimStart().length + 1;
      at = TOKEN.lastIndex;
      if (number !== undefined)
        tokens.push({
          kind: "number",
          value: Number(number.replaceAll("_", "")) * (TIMES[times] || 1),
          text: found[0].trim(),
          place,
        });
      else if (/^(and|or|not)$/i.test(word || "")) tokens.push({ kind: word.toLowerCase(), text: word, place });
      else tokens.push({ kind: word ? "name" : sign, text: word || sign, place });
    }
    return tokens;
  }

  /** The test of a recipe that an expression stands for. Grammar: or < and < not < comparison or (…). */
  function parse(text) {
    const tokens = tokensOf(text);
    let next = 0,
      depth = 0;
    const peek = () => tokens[next]?.kind;
    const unexpected = (wanted) => {
      const token = tokens[next];
      return new Wrong(
        token
          ? `Here should stand ${wanted}, not “${token.text}” at character ${token.place}.`
          : `At the end ${wanted} is missing.`,
      );
    };
    const chain = (kind, each, combine) => () => {
      const parts = [each()];
      while (peek() === kind) {
        next++;
        parts.push(each());
      }
      return parts.length > 1 ? (recipe) => parts[combine]((part) => part(recipe)) : parts[0];
    };
    const operand = () => {
      const token = tokens[next];
      if (token?.kind === "number") {
        next++;
        return () => token.value;
      }
      if (token?.kind !== "name") throw unexpected("a measure or a number");
      const column = measures.findIndex((measure) => measure.name === token.text);
      if (column < 0)
        throw new Wrong(
          `There is no measure “${token.text}”. There are ${measures.map((measure) => measure.name).join(", ")}.`,
        );
      next++;
      return (recipe) => recipe.means[column];
    };
    const comparison = () => {
      const left = operand(),
        sign = peek();
      if (!Object.hasOwn(COMPARE, sign || "")) throw unexpected("one of <, <=, ==, !=, >=, >");
      next++;
      const right = operand();
      if (Object.hasOwn(COMPARE, peek() || ""))
        throw new Wrong(
          `“${tokens[next].text}” at character ${tokens[next].place}: write a < b and b < c, two at a time.`,
        );
      return (recipe) => {
        const a = left(recipe),
          b = right(recipe);
        return a !== null && b !== null && COMPARE[sign](a, b);
      };
    };
    const negation = () => {
      if (++depth > DEEPEST) throw new Wrong(`At most ${DEEPEST} parentheses and nots may stand in each other.`);
      let test;
      if (peek() === "not") {
        next++;
        const inner = negation();
        test = (recipe) => !inner(recipe);
      } else if (peek() === "(") {
        next++;
        test = either();
        if (peek() !== ")") throw unexpected("“and”, “or” or “)”");
        next++;
      } else test = comparison();
      depth--;
      return test;
    };
    const both = chain("and", negation, "every");
    const either = chain("or", both, "some");
    const test = either();
    if (next < tokens.length) throw unexpected("“and” or “or”");
    return test;
  }

  function filter() {
    const name = byId("name").value.trim().toLowerCase(),
      where = byId("where"),
      wrong = byId("wrong");
    let test = () => true;
    wrong.textContent = "";
    where.removeAttribute("aria-invalid");
    if (where.value.trim()) {
      try {
        test = parse(where.value);
      } catch (error) {
        if (!(error instanceof Wrong)) throw error;
        wrong.textContent = error.message;
        where.setAttribute("aria-invalid", "true");
        drawFront();
        return;
      }
    }
    const onFront = byId("only-front").checked ? new Set(fronts[cost()]) : null;
    shown = new Set(
      [...recipes.keys()].filter((place) => {
        return (
          recipes[place].name.toLowerCase().includes(name) && test(recipes[place]) && (!onFront || onFront.has(place))
        );
      }),
    );
    for (const element of all("#table tbody tr, .bars .bar, details[data-recipe]"))
      element.hidden = !shown.has(Number(element.dataset.recipe));
    byId("shown").textContent = `${shown.size} of ${recipes.length} recipes`;
    drawFront();
  }

  // ---- Copying, and links to what is folded

  async function copy(button) {
    const text = button.closest("figure").querySelector("code").textContent;
    let done = true;
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      const range = document.createRange();
      range.selectNodeContents(button.closest("figure").querySelector("code"));
      getSelection().removeAllRanges();
      getSelection().addRange(range);
      done = document.execCommand("copy");
    }
    button.textContent = done ? "Copied" : "Selected: copy by hand";
    setTimeout(() => (button.textContent = "Copy"), 2000);
  }

  function openTarget() {
    const target = location.hash && byId(location.hash.slice(1));
    if (target?.tagName !== "DETAILS") return;
    target.hidden = false;
    target.open = true;
    target.scrollIntoView();
  }

  for (const button of all("button.copy")) button.addEventListener("click", () => copy(button));
  addEventListener("hashchange", openTarget);
  for (const link of all('a[href^="#recipe-"]')) link.addEventListener("click", () => setTimeout(openTarget));
  openTarget();
  if (!recipes.length) return;
  makePicker();
  select?.addEventListener("change", showCost);
  for (const id of ["name", "where"]) byId(id).addEventListener("input", filter);
  byId("only-front").addEventListener("change", filter);
  for (const button of all("button", table.tHead)) button.addEventListener("click", () => sortBy(button.closest("th")));
  showCost();
  filter();
  drawCurves();
  let width = document.body.clientWidth;
  new ResizeObserver(() => {
    if (document.body.clientWidth === width) return;
    width = document.body.clientWidth;
    drawFront();
    drawCurves();
  }).observe(document.body);
})();
