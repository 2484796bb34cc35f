"use strict";
// Draws the edits of the block "data" as they come into view. Texts enter the page as text nodes only, never as markup.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const BATCH = 25;
  const EDIT = "#edit=";
  const list = document.getElementById("list");
  const more = document.getElementById("more");
  const before = document.getElementById("before");
  const form = document.getElementById("filters");
  const order = document.getElementById("order");

  // Probes are arrays, to keep the page small; 0 stands for the edit's own question or answer.
  for (const edit of data.edits) {
    edit.probes = (edit.probes || []).map((values) => {
      const [name, prompt, target, picture, file, before, after, score, isRight, wasRight] = values;
      return { name, prompt, target, picture, file, before, after, score, isRight, wasRight };
    });
    const [own] = edit.probes;
    for (const probe of edit.probes) {
      if (probe.prompt === 0) probe.prompt = own.prompt;
      if (probe.target === 0) probe.target = own.target;
    }
  }

  function element(tag, attributes = {}, ...children) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (value !== null && value !== undefined) node.setAttribute(name, value);
    }
    node.append(...children.filter((child) => child !== null && child !== undefined && child !== ""));
    return node;
  }

  // Filters and order -------------------------------------------------------------------------------------------

  const isEdited = (edit) => edit.status === "edited";
  const chosen = (edit, probe) => edit.probes.filter((each) => probe === "" || each.name === Number(probe));
  const OUTCOMES = {
    "": ["all", () => true],
    wrong: ["wrong or changed", (edit, probe) => isEdited(edit) && chosen(edit, probe).some((each) => each.isRight === false)],
    right: ["right and unchanged", (edit, probe) => {
      const probes = chosen(edit, probe).filter((each) => each.isRight !== null);
      return isEdited(edit) && probes.length > 0 && probes.every((each) => each.isRight);
    }],
    failed: ["failed", (edit) => edit.status === "failed"],
    skipped: ["skipped", (edit) => edit.status === "skipped"],
  };
  if (data.baseline) {
    OUTCOMES.worse = [`worse than ${data.baseline}`, (edit) => edit.mean < edit.base];
    OUTCOMES.better = [`better than ${data.baseline}`, (edit) => edit.mean > edit.base];
  }
  const scoreOf = (edit, name) => edit.probes.find((probe) => probe.name === name)?.score;
  const SORTS = {
    worst: ["worst first", null],
    index: ["record", (edit) => edit.index],
    id: ["edit", (edit) => edit.id],
    question: ["question", (edit) => edit.probes[0]?.prompt],
    old: ["old answer", (edit) => edit.old],
    wanted: ["wanted answer", (edit) => edit.probes[0]?.target],
    now: ["new answer", (edit) => edit.probes[0]?.after],
    task: ["task", (edit) => edit.task],
    fact: ["fact", (edit) => edit.fact],
    mean: ["mean score", (edit) => edit.mean],
    ...Object.fromEntries(data.probes.map(({ name }, number) => [`probe ${number}`, [name, (edit) => scoreOf(edit, number)]])),
    steps: ["steps", (edit) => edit.steps],
    seconds: ["seconds", (edit) => edit.seconds],
    nll: ["least likely token's NLL", (edit) => edit.nll],
  };
  if (data.baseline) SORTS.change = [`change from ${data.baseline}`, (edit) => edit.mean - edit.base];

  function searched(edit) {
    edit.text ??= [edit.id, edit.fact, edit.old, edit.error, ...edit.probes.flatMap((probe) => [probe.prompt, probe.target, probe.before, probe.after])]
      .filter(Boolean).join("\n").toLowerCase();
    return edit.text;
  }

  function isMissing(value) { return value === undefined || value === null || Number.isNaN(value); }

  function sorted(edits, key, isReversed) {
    const value = SORTS[key][1];
    if (value === null) return isReversed ? [...edits].reverse() : edits;
    const sign = isReversed ? -1 : 1;
    const compare = (a, b) => (typeof a === "number" ? a - b : String(a).localeCompare(String(b)));
    return edits.map((edit) => [value(edit), edit]).sort(([a], [b]) => {
      if (isMissing(a) || isMissing(b)) return isMissing(a) - isMissing(b);
      return sign * compare(a, b);
    }).map(([, edit]) => edit);
  }

  // One edit ----------------------------------------------------------------------------------------------------

  function picture(probe, what, isSmall) {
    const size = isSmall ? " small" : "";
    if (probe.file === null) return null;
    const label = `${what}: ${probe.file}`;
    if (probe.picture === null) return element("div", { class: `gone${size}`, role: "img", "aria-label": `${label} (not in the page)` }, "no picture");
    const image = element("img", { class: `picture${size}`, alt: label, title: probe.file, loading: "lazy", decoding: "async" });
    // A picture of a few pixels is shown with sharp edges.
    image.addEventListener("load", () => image.classList.toggle("pixels", image.naturalWidth < 64));
    image.src = `data:image/webp;base64,${data.pictures[probe.picture]}`;
    return image;
  }

  function answer(text, isRight, locality) {
    if (isMissing(text)) return element("span", { class: "note" }, "not kept");
    if (isMissing(isRight)) return element("span", { class: "answer" }, text || "(empty)");
    const [sign, word] = locality ? (isRight ? ["=", "unchanged"] : ["≠", "changed"]) : (isRight ? ["✓", "right"] : ["✗", "wrong"]);
    return element("span", { class: `answer ${isRight ? "right" : "wrong"}` },
      element("span", { "aria-hidden": "true" }, `${sign} `), element("span", { class: "hidden" }, `${word}: `), text || "(empty)");
  }

  const digits = (value) => (isMissing(value) ? "" : value.toFixed(2).replace(/^0\./, "."));

  function probeRow(probe) {
    const { name, label, locality } = data.probes[probe.name];
    return element("tr", {},
      element("td", {}, label, element("code", {}, `${name} ${digits(probe.score)}`)),
      element("td", { class: "thumb" }, picture(probe, `Picture for ${label}`, true)),
      element("td", { "data-label": "asked:" }, probe.prompt ?? ""),
      element("td", { "data-label": locality ? "" : "wanted:" }, locality ? "" : probe.target ?? "(another record's answer)"),
      element("td", { "data-label": "before:" }, answer(probe.before, probe.wasRight, locality)),
      element("td", { class: "after", "data-label": "after:" }, answer(probe.after, probe.isRight, locality)));
  }

  function probeTable(edit) {
    const heads = ["probe", "picture", "question", "wanted", "before", "after"];
    const others = edit.probes.slice(1).filter((probe) => probe.score !== null || probe.after !== null);
    if (!others.length) return null;
    return element("table", { class: "probes" },
      element("caption", { class: "hidden" }, `Other questions about ${edit.id}`),
      element("thead", {}, element("tr", {}, ...heads.map((head) => element("th", { scope: "col" }, head)))),
      element("tbody", {}, ...others.map(probeRow)));
  }

  function line(name, values) {
    const svg = document.getElementById("line").content.firstElementChild.cloneNode(true);
    const low = Math.min(...values), high = Math.max(...values), span = high - low || 1;
    const points = values.map((value, index) => `${(100 * index) / (values.length - 1)},${38 - (36 * (value - low)) / span}`).join(" ");
    svg.setAttribute("aria-label", `${name}: from ${values[0]} to ${values.at(-1)}`);
    svg.firstElementChild.setAttribute("points", points);
    return element("figure", {}, element("figcaption", {}, element("span", {}, name), element("span", { class: "note" }, `${values[0]} → ${values.at(-1)}`)), svg);
  }

  function curves(edit) {
    const drawn = data.curves[edit.id];
    if (!drawn) return null;
    const details = element("details", {}, element("summary", {}, "Loss curves"));
    details.addEventListener("toggle", () => {
      if (details.open && details.children.length === 1) {
        details.append(element("div", { class: "lines" }, ...Object.entries(drawn).map(([name, values]) => line(name, values))));
      }
    });
    return details;
  }

  function badge(edit) {
    if (!isEdited(edit)) return element("span", { class: "badge" }, edit.status);
    if (edit.holds === undefined) return null;
    return element("span", { class: `badge ${edit.holds ? "right" : "wrong"}` }, edit.holds ? "✓ holds" : "✗ does not hold");
  }

  function figures(edit) {
    const scores = edit.probes.filter((probe) => !isMissing(probe.score)).slice(0, 1).map((probe) => `${data.probes[probe.name].name} ${digits(probe.score)}`);
    const change = isMissing(edit.base) ? [] : [`${data.baseline} ${digits(edit.base)}`];
    return [
      element("a", { href: EDIT + encodeURIComponent(edit.id) }, edit.id),
      ...[edit.task, edit.fact === edit.id ? "" : edit.fact, ...scores, isMissing(edit.mean) ? "" : `mean ${digits(edit.mean)}`, ...change,
        isMissing(edit.steps) ? "" : `${edit.steps} steps`].filter(Boolean).map((text) => element("span", {}, text)),
    ];
  }

  function card(edit) {
    const [own] = edit.probes;
    const pair = (name, value) => element("div", { class: name }, element("dt", {}, name), element("dd", {}, value));
    const image = own ? picture(own, "Picture of the edit", false) : null;
    const state = !isEdited(edit) || edit.holds === undefined ? "" : edit.holds ? " holds" : " fails";
    return element("article", { class: `edit${state}`, id: `edit-${edit.id}`, tabindex: "-1", "aria-label": `Edit ${edit.id}` },
      element("div", { class: image ? "top" : "top bare" }, image, element("div", {},
        element("h3", {}, own?.prompt ?? edit.id, " ", badge(edit)),
        element("div", { class: "meta" }, ...figures(edit)),
        edit.error ? element("p", { class: "error" }, edit.error) : null,
        own ? element("dl", { class: "answers" },
          pair("old", edit.old ?? "unknown"), pair("wanted", own.target ?? "unknown"),
          isEdited(edit) ? pair("before", answer(own.before, own.wasRight, false)) : "",
          isEdited(edit) ? pair("after", answer(own.after, own.isRight, false)) : "") : null)),
      isEdited(edit) ? probeTable(edit) : null,
      curves(edit));
  }

  // The list ----------------------------------------------------------------------------------------------------

  let shown = [];
  let first = 0;
  let end = 0;

  function append() {
    const next = shown.slice(end, end + BATCH);
    list.append(...next.map(card));
    end += next.length;
    more.hidden = end >= shown.length;
  }

  function prepend() {
    const start = Math.max(0, first - BATCH);
    list.prepend(...shown.slice(start, first).map(card));
    first = start;
    before.hidden = first === 0;
  }

  function draw(start = 0) {
    const { outcome, probe, task, text } = Object.fromEntries(new FormData(form));
    const words = text.toLowerCase().split(/\s+/).filter(Boolean);
    const isKept = OUTCOMES[outcome][1];
    const kept = data.edits.filter((edit) => isKept(edit, probe) && (task === "" || edit.task === task)
      && words.every((word) => searched(edit).includes(word)));
    shown = sorted(kept, form.elements.sort.value, order.getAttribute("aria-pressed") === "true");
    document.getElementById("count").textContent = `${shown.length.toLocaleString("en")} of ${data.edits.length.toLocaleString("en")} records`;
    first = end = Math.min(start, Math.max(0, shown.length - 1));
    before.hidden = first === 0;
    list.replaceChildren();
    append();
  }

  /** Shows the edit that the address names. */
  function follow() {
    if (!location.hash.startsWith(EDIT)) return;
    const id = decodeURIComponent(location.hash.slice(EDIT.length));
    form.reset();
    order.setAttribute("aria-pressed", "false");
    const position = data.edits.findIndex((edit) => edit.id === id);
    if (position < 0) return;
    draw(position);
    list.firstElementChild.scrollIntoView();
    list.firstElementChild.focus({ preventScroll: true });
  }

  function fill(name, options) {
    form.elements[name].append(...options.map(([value, text]) => element("option", { value }, text)));
  }

  fill("outcome", Object.entries(OUTCOMES).map(([value, [text]]) => [value, text]));
  fill("probe", [["", "any"], ...data.probes.map(({ name, label }, number) => [number, name === label ? name : `${name}: ${label}`])]);
  fill("task", [["", "all"], ...[...new Set(data.edits.map((edit) => edit.task))].filter(Boolean).sort().map((task) => [task, task])]);
  fill("sort", Object.entries(SORTS).map(([value, [text]]) => [value, text]));
  form.hidden = false;
  let waiting;
  form.addEventListener("input", (event) => {
    clearTimeout(waiting);
    // Typing redraws once it pauses.
    waiting = setTimeout(draw, event.target.name === "text" ? 150 : 0);
  });
  form.addEventListener("submit", (event) => event.preventDefault());
  order.addEventListener("click", () => {
    order.setAttribute("aria-pressed", String(order.getAttribute("aria-pressed") !== "true"));
    draw();
  });
  more.addEventListener("click", () => {
    const next = list.children.length;
    append();
    list.children[next]?.focus();
  });
  before.addEventListener("click", prepend);
  new IntersectionObserver((entries) => { if (entries.some((entry) => entry.isIntersecting)) append(); }, { rootMargin: "800px" }).observe(more);
  addEventListener("hashchange", follow);
  draw();
  follow();
})();
