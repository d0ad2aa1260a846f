// What each mode shows and does. A view has nodes for the page, keys, lines of help, and what to do when it is there.
import { button, folded, h, key } from "./dom.js";

const STRENGTH = ["tie", "slightly better", "better", "much better"];
const LETTERS = "ABCDEFGHI";

// What is written and not saved, by item: kept in this tab when it is loaded again, or another one takes over for a while.
const drafts = {
  name: (item) => `draft ${location.pathname} ${item}`,
  get(item) { return sessionStorage.getItem(this.name(item)); },
  set(item, text) { try { sessionStorage.setItem(this.name(item), text); } catch { /* full: the text is on the screen alone */ } },
  delete(item) { sessionStorage.removeItem(this.name(item)); },
};

function card(title, text, props = {}) {
  return folded(h("article", { ...props, class: `card ${props.class || ""}`, "aria-label": title }, h("header", { class: "card-title" }, title)), text);
}

function expandAll(texts) {
  const open = !texts.every((one) => one.isOpen());
  texts.forEach((one) => one.toggle(open));
}

// ---- compare --------------------------------------------------------------------------------------------------------

function compare({ task, settings, undone, bar, submit, prompt, turns }) {
  const points = settings.scale === 7;
  const names = points ? "1234567" : "asdfjkl";
  const words = (value) => (value === 0 ? "Tie" : `${value < 0 ? "A" : "B"} is ${STRENGTH[Math.abs(value)]}`);
  const cards = task.responses.map((text, place) => card(`Answer ${LETTERS[place]}`, text));
  let selected = undone?.kind === "label" && typeof undone.value === "number" ? undone.value : null;
  const give = (value) => submit({ value }, `Saved: ${words(value)}.`);
  const labels = points ? [1, 2, 3, 4, 5, 6, 7] : ["Much better", "Better", "Slightly", "Tie", "Slightly", "Better", "Much better"];
  const buttons = [-3, -2, -1, 0, 1, 2, 3].map((value, place) => h("button", {
    type: "button", class: `point side-${Math.sign(value)}`, "aria-label": words(value), title: words(value), "aria-pressed": "false", on: { click: () => give(value) },
  }, h("span", {}, String(labels[place])), points ? null : key(names[place])));
  const mark = (value) => {
    selected = value;
    buttons.forEach((node, place) => node.setAttribute("aria-pressed", String(place - 3 === selected)));
  };
  const move = (by) => mark(selected === null ? by : Math.max(-3, Math.min(3, selected + by)));
  bar.replaceChildren(h("div", { class: "scale" },
    h("div", { class: "scale-ends" }, h("span", {}, points ? "1: A is much better" : "← A is better"), h("span", {}, points ? "4: tie" : ""), h("span", {}, points ? "7: B is much better" : "B is better →")),
    h("div", { class: "points", role: "group", "aria-label": "Which answer is better?" }, buttons)));
  const keys = { ArrowLeft: () => move(-1), ArrowRight: () => move(1), Enter: () => selected !== null && give(selected), e: () => expandAll([...turns, ...cards]) };
  [...names].forEach((name, place) => { keys[name] = () => give(place - 3); });
  if (selected !== null) mark(selected);
  return {
    nodes: [prompt, h("section", { class: "pair" }, cards.map((one) => one.node))],
    keys,
    help: [...(points ? [["1 2 3", "A is much better, better, slightly better"], ["4", "tie"], ["5 6 7", "B is slightly better, better, much better"]]
      : [["a s d", "A is much better, better, slightly better"], ["f", "tie"], ["j k l", "B is slightly better, better, much better"]]),
      ["← →", "move on the scale"], ["Enter", "save what is marked"], ["e", "show long texts whole"]],
  };
}

// ---- rank -----------------------------------------------------------------------------------------------------------

function rank({ task, undone, bar, submit, prompt }) {
  const size = task.responses.length;
  const ranks = undone?.kind === "label" && undone.ranks?.length === size ? undone.ranks : null;
  let order = [...Array(size).keys()];
  if (ranks) order.sort((a, b) => ranks[a] - ranks[b]);
  let tied = new Set(ranks ? order.slice(1).filter((one, i) => ranks[one] === ranks[order[i]]) : []); // with the one above
  let current = order[0];
  let touched = Boolean(ranks);
  const list = h("ol", { class: "ranks" });
  const cards = task.responses.map((text, place) => {
    const one = card(`Answer ${LETTERS[place]}`, text, { tabindex: "-1" });
    const badge = h("span", { class: "badge", "aria-hidden": "true" });
    const tie = button([h("span", {}, "= tie"), h("span", { class: "spare" }, "with above")], null, () => { select(place); toggleTie(); }, { class: "quiet tie", "aria-label": "Tie with the answer above" });
    const handle = h("button", { type: "button", class: "handle quiet", "aria-label": "Drag to its place", title: "Drag to its place" }, "⠿");
    one.node.querySelector("header").prepend(handle, badge);
    one.node.querySelector("header").append(h("span", { class: "row tools" }, tie,
      button("↑", null, () => { select(place); shift(-1); }, { class: "quiet", "aria-label": "Move up" }),
      button("↓", null, () => { select(place); shift(1); }, { class: "quiet", "aria-label": "Move down" })));
    const item = h("li", { on: { pointerdown: () => select(place, false) } }, one.node);
    handle.addEventListener("pointerdown", (event) => drag(event, place, item, handle));
    return { ...one, item, badge, tie };
  });
  const given = () => {
    const result = Array(size).fill(0);
    order.forEach((one, i) => { result[one] = i === 0 ? 0 : result[order[i - 1]] + (tied.has(one) ? 0 : 1); });
    return result;
  };
  const save = button("Save ranking", "Enter", () => submit({ ranks: given() }, "Saved."), { class: "primary" });
  const hint = h("span", { class: "dim", role: "status" });
  bar.replaceChildren(h("div", { class: "row between" }, hint, save));
  function draw() {
    const result = given();
    const focused = list.contains(document.activeElement) ? document.activeElement : null; // moving a node takes its focus
    tied.delete(order[0]);
    list.replaceChildren(...order.map((one) => cards[one].item));
    order.forEach((one, i) => {
      cards[one].badge.textContent = String(result[one] + 1);
      cards[one].item.classList.toggle("tied", tied.has(one));
      cards[one].node.classList.toggle("selected", one === current);
      cards[one].tie.hidden = i === 0;
      cards[one].tie.setAttribute("aria-pressed", String(tied.has(one)));
      cards[one].node.setAttribute("aria-label", `Answer ${LETTERS[one]}, rank ${result[one] + 1}`);
    });
    focused?.focus({ preventScroll: true });
    hint.textContent = touched ? `Best first. Answer ${LETTERS[current]} has rank ${result[current] + 1}.` : "Best first: drag, or use the keys.";
  }
  function select(place, scroll = true) {
    current = place;
    cards.forEach((one, i) => one.node.classList.toggle("selected", i === place));
    if (scroll) cards[place].item.scrollIntoView({ block: "nearest" });
  }
  function moveTo(place) {
    const from = order.indexOf(current);
    const to = Math.max(0, Math.min(size - 1, place));
    if (from === to) return;
    touched = true;
    const below = order[from + 1];
    if (below !== undefined && tied.has(below) && !tied.has(current)) tied.delete(below);
    tied.delete(current);
    order.splice(from, 1);
    order.splice(to, 0, current);
    draw();
    cards[current].item.scrollIntoView({ block: "nearest" });
  }
  const shift = (by) => moveTo(order.indexOf(current) + by);
  const step = (by) => select(order[Math.max(0, Math.min(size - 1, order.indexOf(current) + by))]);
  function toggleTie() {
    if (order[0] === current) return;
    touched = true;
    if (!tied.delete(current)) tied.add(current);
    draw();
  }
  function drag(event, place, item, handle) {
    event.preventDefault();
    select(place, false);
    handle.setPointerCapture(event.pointerId);
    item.classList.add("dragged");
    const over = (moved) => {
      const edge = 60;
      if (moved.clientY < edge) window.scrollBy(0, -12);
      else if (moved.clientY > window.innerHeight - edge) window.scrollBy(0, 12);
      const others = order.filter((one) => one !== place);
      const target = others.filter((one) => {
        const box = cards[one].item.getBoundingClientRect();
        return moved.clientY > box.top + box.height / 2;
      }).length;
      if (target !== order.indexOf(place)) {
        moveTo(target);
        handle.setPointerCapture(event.pointerId);
      }
    };
    const end = () => {
      item.classList.remove("dragged");
      handle.removeEventListener("pointermove", over);
    };
    handle.addEventListener("pointermove", over);
    handle.addEventListener("pointerup", end, { once: true });
    handle.addEventListener("pointercancel", end, { once: true });
  }
  draw();
  const keys = {
    ArrowUp: () => step(-1), ArrowDown: () => step(1), "Shift+ArrowUp": () => shift(-1), "Shift+ArrowDown": () => shift(1),
    "=": toggleTie, t: toggleTie, Enter: () => submit({ ranks: given() }, "Saved."), e: () => cards[current].toggle(),
  };
  for (let place = 1; place <= size; place += 1) keys[String(place)] = () => moveTo(place - 1);
  return {
    nodes: [prompt, list], keys,
    help: [["↑ ↓", "go to the answer above, below"], ["Shift ↑", "move it up; Shift ↓ moves it down"], [size > 1 ? `1 ${size}` : "1", "from 1 to the last: move it to that place"],
      ["t", "tie with the answer above, or not"], ["e", "show it whole"], ["Enter", "save the ranking"]],
  };
}

// ---- edit and write -------------------------------------------------------------------------------------------------

function text({ task, settings, undone, bar, submit, prompt }) {
  const original = settings.mode === "edit" ? task.responses[0] : "";
  const first = undone?.kind === "label" && typeof undone.text === "string" ? undone.text : original;
  if (undone) drafts.delete(task.item);
  const area = h("textarea", { dir: "auto", rows: "10", spellcheck: "true", "aria-label": "Answer", placeholder: "Write the answer that you would like to get" });
  area.value = drafts.get(task.item) ?? first;
  const count = h("span", { class: "dim" });
  const grow = () => {
    area.style.height = "auto";
    area.style.height = `${area.scrollHeight + 4}px`;
    const words = area.value.trim() ? area.value.trim().split(/\s+/).length : 0;
    count.textContent = `${words} ${words === 1 ? "word" : "words"}`;
    save.disabled = !area.value.trim();
  };
  const save = button(settings.mode === "edit" ? "Save answer" : "Save", "Ctrl+Enter", () => give(), { class: "primary" });
  const give = async () => {
    if (area.value.trim() && await submit({ text: area.value }, "Saved.")) drafts.delete(task.item);
  };
  const reset = () => { area.value = original; drafts.delete(task.item); grow(); };
  area.addEventListener("input", () => { drafts.set(task.item, area.value); grow(); });
  bar.replaceChildren(h("div", { class: "row between" }, count, h("span", { class: "row" },
    settings.mode === "edit" ? button("Start over", null, reset, { class: "quiet" }) : null, save)));
  return {
    nodes: [prompt, h("section", { class: "write" }, h("header", { class: "card-title" }, settings.mode === "edit" ? "Edit the answer" : "Your answer"), area)],
    keys: { Enter: () => area.focus() }, keepScroll: false,
    ready: () => { grow(); area.focus({ preventScroll: true }); area.setSelectionRange(area.value.length, area.value.length); },
    typing: (event) => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); give(); } },
    unsaved: () => area.value !== first,
    help: [["Ctrl Enter", "save the answer"], ["Enter", "go back to the text field"]],
  };
}

// ---- chat -----------------------------------------------------------------------------------------------------------

function chat({ task, undone, bar, submit, send, prompt }) {
  return task.responses.length ? choose({ task, undone, bar, submit, prompt }) : talk({ task, undone, bar, send, prompt });
}

function talk({ task, undone, bar, send, prompt }) {
  const draft = undone?.kind === "turn" ? undone.say : task.draft;
  const area = h("textarea", { dir: "auto", rows: "2", "aria-label": "Message", placeholder: task.prompt.length ? "Write the next message" : "Write to the model" });
  if (undone) drafts.delete("");
  area.value = drafts.get("") ?? draft;
  const grow = () => {
    area.style.height = "auto";
    area.style.height = `${Math.min(area.scrollHeight + 4, window.innerHeight / 3)}px`;
  };
  const go = button("Send", "Enter", () => say(), { class: "primary" });
  const note = h("p", { class: "dim thinking", role: "status", hidden: true }, "The model is answering …");
  async function say() {
    const written = area.value;
    if (!written.trim() || area.disabled) return;
    area.disabled = go.disabled = true;
    note.hidden = false;
    if (await send("say", { text: written })) drafts.delete("");
    else {
      area.disabled = go.disabled = false;
      note.hidden = true;
      area.focus();
    }
  }
  area.addEventListener("input", () => { drafts.set("", area.value); grow(); });
  bar.replaceChildren(h("div", { class: "talk" }, area, go));
  const empty = task.prompt.length ? null : h("section", { class: "notice" }, h("h2", {}, "Talk to the model"),
    h("p", {}, "Ask for something that you would really like help with. At every turn you see several answers: choose the best, and the conversation goes on with it."));
  return {
    nodes: [empty, prompt, note].filter(Boolean), keys: { Enter: () => area.focus() }, keepScroll: true,
    ready: () => { grow(); area.focus(); window.scrollTo(0, document.body.scrollHeight); },
    typing: (event) => { if (event.key === "Enter" && !event.shiftKey) { event.preventDefault(); say(); } },
    unsaved: () => area.value.trim() !== draft.trim(),
    help: [["Enter", "send; Shift Enter begins a new line"], ["n", "a new conversation"]],
  };
}

function choose({ task, undone, bar, submit, prompt }) {
  const cards = task.responses.map((one, place) => card(`Answer ${place + 1}`, one, { class: "choice" }));
  let picked = undone?.kind === "label" && typeof undone.pick === "number" ? undone.pick : null;
  const others = task.responses.length > 2 ? "the others" : "the other";
  const words = ["About equal", "Slightly better", "Better", "Much better"];
  const names = "fjkl";
  const give = (strength) => picked !== null && submit({ pick: picked, strength }, `Saved: answer ${picked + 1}, ${words[strength].toLowerCase()}.`);
  const question = h("span", { class: "dim" });
  const buttons = words.map((word, strength) => h("button", { type: "button", class: "point", on: { click: () => give(strength) } }, h("span", {}, word), key(names[strength])));
  const pick = (place) => {
    picked = place;
    cards.forEach((one, i) => {
      one.node.classList.toggle("selected", i === picked);
      one.choice.setAttribute("aria-pressed", String(i === picked));
    });
    buttons.forEach((node) => { node.disabled = picked === null; });
    question.textContent = picked === null ? `Choose the answer to go on with (keys 1 to ${cards.length})` : `Answer ${picked + 1}, compared with ${others}, is`;
  };
  cards.forEach((one, place) => {
    one.choice = button("Choose", String(place + 1), () => pick(place), { class: "choose" });
    one.node.querySelector("header").append(one.choice);
  });
  bar.replaceChildren(h("div", { class: "scale" }, h("div", { class: "scale-ends" }, question), h("div", { class: "points four", role: "group", "aria-label": "How much better?" }, buttons)));
  const pickByKey = (place) => {
    pick(place);
    cards[place].node.scrollIntoView({ block: "nearest" });
  };
  pick(picked);
  const keys = { e: () => expandAll(cards), Enter: () => give(2), ArrowRight: () => pickByKey(((picked ?? -1) + 1) % cards.length), ArrowLeft: () => pickByKey(((picked ?? 1) - 1 + cards.length) % cards.length) };
  cards.forEach((_, place) => { keys[String(place + 1)] = () => pickByKey(place); });
  [...names].forEach((name, strength) => { keys[name] = () => give(strength); });
  return {
    nodes: [prompt, h("section", { class: cards.length > 2 ? "pair many" : "pair" }, cards.map((one) => one.node))], keys, keepScroll: true,
    ready: () => { cards[0].node.scrollIntoView({ block: "nearest" }); },
    help: [[`1 ${cards.length}`, "choose an answer (also ← →)"], ["f", "it is about equal to the others"], ["j k l", "it is slightly better, better, much better"], ["Enter", "it is better"], ["e", "show long answers whole"], ["n", "a new conversation"]],
  };
}

export const VIEWS = { compare, rank, edit: text, write: text, chat };
