// @ts-check
/** The page of `emlocal serve`: chat, comparison, and what the model knew at each token.
 *
 * What a model writes is hostile: it reaches the document through text nodes and attribute values only. */

const FORMAT = "emlocal-chat-1"; // the file of `emlocal chat`
const LEVELS = [0.1, 0.5, 1, 2]; // nats; the bounds of the colours
const LARGEST_FILE = 64 << 20; // bytes
const KEPT = "emlocal"; // in the tab's own storage
const IDEAS = ["Why is the sky blue?", "Name a city and say why you like it.", "What is 17 · 24? Explain."];

/** @typedef {{text: string, bytes: number[], id: number, before: number, after: number, p: number, pAfter: number,
 *   steps: number, changed: boolean, thought: boolean, picked: boolean, top: Alternative[], node: HTMLElement | null}} Token */
/** @typedef {{bytes: number[], text: string, id: number, p: number, pAfter: number}} Alternative */
/** @typedef {Record<string, any>} Fields */
/** @typedef {{fields: Fields, label: string, tokens: Token[], text: string, thought: string, own: Fields | null,
 *   ending: string, error: string, seed: number, seconds: number, node: HTMLElement, parts: Fields,
 *   decoders: TextDecoder[]}} Answer */
/** @typedef {{question: string, answers: Answer[], kept: number, node: HTMLElement}} Exchange */

const state = {
  model: "",
  /** @type {Fields[]} */ table: [],
  /** @type {Fields[]} */ sides: [{}, {}],
  compare: false,
  side: 0,
  which: "before",
  system: "",
  seed: "",
  key: "",
  /** @type {Exchange[]} */ exchanges: [],
  /** @type {AbortController | null} */ running: null,
};

/** @param {string} id @returns {any} */
const at = (id) => document.getElementById(id);

/** An element. Properties that begin with "on" are listeners; children are nodes or texts.
 * @param {string} name @param {Fields} [properties] @param {...(Node | string)} children @returns {any} */
function make(name, properties = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (value !== false && value !== undefined) made.setAttribute(key, value === true ? "" : String(value));
  }
  made.append(...children);
  return made;
}

/** @param {string} text @param {boolean} [bad] */
function say(text, bad = false) {
  at("status").textContent = text;
  at("status").classList.toggle("bad", bad);
}

const nats = (/** @type {number} */ value) => value.toFixed(2);
const percent = (/** @type {number} */ p) => (p >= 0.0995 ? `${(100 * p).toFixed(0)} %` : `${(100 * p).toPrecision(2)} %`);
const shown = (/** @type {string} */ text) => text.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replaceAll(" ", "␣").slice(0, 80) || "(part of a character)";
const level = (/** @type {number} */ entropy) => LEVELS.filter((bound) => entropy > bound).length;
const entropyOf = (/** @type {Token} */ token) => (state.which === "after" ? token.after : token.before);
const mean = (/** @type {number[]} */ values) => values.reduce((sum, value) => sum + value, 0) / values.length;

// ------------------------------------------------------------------------------------------- the server

/** @param {string} path @param {Fields} [options] @returns {Promise<Response>} */
async function call(path, options = {}) {
  for (;;) {
    const headers = { ...(options.body ? { "Content-Type": "application/json" } : {}), ...(state.key ? { Authorization: `Bearer ${state.key}` } : {}) };
    const response = await fetch(path, { ...options, headers });
    if (response.status === 401) {
      await askKey();
      if (state.key) continue;
    }
    if (response.ok) return response;
    const said = await response.json().catch(() => null);
    throw new Error(said?.error?.message ?? `the server answers with status ${response.status}`);
  }
}

/** @returns {Promise<void>} */
function askKey() {
  const dialog = at("key");
  at("key-text").value = "";
  if (!dialog.open) dialog.showModal();
  return new Promise((done) => dialog.addEventListener("close", () => { state.key = at("key-text").value.trim(); keep(); done(); }, { once: true }));
}

/** The values of a stream's events, up to [DONE]. @param {Response} response */
async function* events(response) {
  const reader = /** @type {ReadableStream<Uint8Array>} */ (response.body).getReader();
  const decoder = new TextDecoder();
  for (let left = ""; ; ) {
    const { done, value } = await reader.read();
    if (done) throw new Error("the connection ended before the answer did");
    const blocks = (left + decoder.decode(value, { stream: true })).split("\n\n");
    left = blocks.pop() ?? "";
    for (const block of blocks) {
      if (!block.startsWith("data: ")) continue; // a comment: the server is still there
      if (block === "data: [DONE]") return;
      yield JSON.parse(block.slice(6));
    }
  }
}

// -------------------------------------------------------------------------------------------- an answer

/** @param {Fields} entry @param {boolean} thought @returns {Token} */
function tokenOf(entry, thought) {
  const own = entry.emlocal;
  return {
    text: "", bytes: entry.bytes, id: own.token_id, before: own.entropy_before, after: own.entropy_after, p: Math.exp(entry.logprob),
    pAfter: Math.exp(own.logprob_after), steps: own.steps, changed: own.changed, thought, picked: false, node: null,
    top: entry.top_logprobs.map((/** @type {Fields} */ each) => ({
      bytes: each.bytes, text: each.token, id: each.emlocal.token_id, p: Math.exp(each.logprob), pAfter: Math.exp(each.emlocal.logprob_after),
    })),
  };
}

/** @param {Fields} fields @param {string} label @param {number} seed @returns {Answer} */
function newAnswer(fields, label, seed) {
  const parts = {
    label: make("div", { class: "label" }, make("b", {}, label)), thoughtText: make("div", { class: "text" }),
    summary: make("summary", {}, "Thoughts"), text: make("div", { class: "text said", role: "group", "aria-label": `Answer, ${label || "one token after the other with the arrow keys"}` }),
    curve: document.createElementNS("http://www.w3.org/2000/svg", "svg"), foot: make("div", { class: "foot" }),
  };
  parts.thought = make("details", { class: "thought", hidden: true }, parts.summary, parts.thoughtText);
  const node = make("div", { class: "answer" }, ...(label ? [parts.label] : []), parts.thought, parts.text, parts.curve, parts.foot);
  parts.curve.setAttribute("class", "curve");
  parts.curve.setAttribute("hidden", "");
  return { fields, label, tokens: [], text: "", thought: "", own: null, ending: "", error: "", seed, seconds: 0, node, parts, decoders: [new TextDecoder(), new TextDecoder()] };
}

/** Adds a token to the page. @param {Answer} answer @param {Token} token */
function show(answer, token) {
  token.text = answer.decoders[+token.thought].decode(new Uint8Array(token.bytes), { stream: true });
  answer.tokens.push(token);
  if (!token.text) return; // the character is complete with a later token, which has the text
  token.node = make("span", { tabindex: answer.tokens.some((each) => each.node) ? -1 : 0, "aria-describedby": "card" }, token.text);
  paint(token);
  nodes.set(/** @type {HTMLElement} */ (token.node), [answer, token]);
  (token.thought ? answer.parts.thoughtText : answer.parts.text).append(token.node);
}

/** @type {WeakMap<Node, [Answer, Token]>} */
const nodes = new WeakMap();

/** @param {Token} token */
function paint(token) {
  if (token.node) token.node.className = `t e${level(entropyOf(token))}${token.changed ? " changed" : ""}${token.picked ? " picked" : ""}`;
}

/** Takes one event of the stream. @param {Answer} answer @param {Fields} chunk */
function hear(answer, chunk) {
  if (chunk.error) throw new Error(chunk.error.message);
  if (chunk.emlocal) answer.own = chunk.emlocal;
  const choice = chunk.choices[0];
  if (!choice || choice.index !== 0) return;
  const { content = "", reasoning_content: reasoning = "" } = choice.delta;
  const entries = choice.logprobs?.content ?? [];
  const inThought = !answer.text && !content && (reasoning !== "" || answer.thought !== "");
  if (reasoning && !answer.thought) { // what came before were the marks of the thought
    for (const token of answer.tokens) { token.thought = true; if (token.node) answer.parts.thoughtText.append(token.node); }
    answer.parts.thought.hidden = false;
  }
  answer.thought += reasoning;
  answer.text += content;
  let left = reasoning && content ? reasoning.length : 0; // of the thought, in an event that has both
  for (const entry of entries) {
    show(answer, tokenOf(entry, inThought || left > 0));
    left -= entry.token.length;
  }
  if (!entries.length) {
    if (content) answer.parts.text.append(content);
    if (reasoning) answer.parts.thoughtText.append(reasoning);
  }
  answer.ending = choice.finish_reason ?? answer.ending;
}

/** Whether the end of the conversation is in view. */
const isLow = () => at("log").scrollHeight - at("log").scrollTop - at("log").clientHeight < 80;

/** The messages up to an exchange. @param {number} end @returns {Fields[]} */
function messagesBefore(end) {
  const said = state.system ? [{ role: "system", content: state.system }] : [];
  for (const { question, answers, kept } of state.exchanges.slice(0, end)) {
    said.push({ role: "user", content: question }, { role: "assistant", content: answers[kept].text });
  }
  return said;
}

/** Asks the server for an answer, from its text so far. @param {Exchange} exchange @param {Answer} answer @param {AbortSignal} signal */
async function run(exchange, answer, signal) {
  const begun = performance.now();
  const messages = [...messagesBefore(state.exchanges.indexOf(exchange)), { role: "user", content: exchange.question }];
  if (answer.text) messages.push({ role: "assistant", content: answer.text });
  const body = { messages, ...answer.fields, seed: answer.seed, stream: true, logprobs: true, top_logprobs: 5 };
  try {
    const response = await call("/v1/chat/completions", { method: "POST", body: JSON.stringify(body), signal });
    for await (const chunk of events(response)) {
      const low = isLow();
      hear(answer, chunk);
      later(exchange);
      if (low) at("log").scrollTop = at("log").scrollHeight;
    }
  } catch (error) {
    if (signal.aborted) answer.ending = "stopped";
    else answer.error = String(/** @type {Error} */ (error).message);
  }
  answer.seconds = (performance.now() - begun) / 1000;
}

// ---------------------------------------------------------------------------------------- the conversation

function seedOf() {
  return state.seed === "" ? crypto.getRandomValues(new Uint32Array(1))[0] : Number(state.seed);
}

/** @param {string} question */
async function ask(question) {
  const seed = seedOf();
  const labels = state.compare ? sideLabels() : [""];
  const answers = labels.map((label, i) => newAnswer({ ...state.sides[i] }, label, seed));
  const exchange = { question, answers, kept: 0, node: make("section", { class: "exchange", "aria-label": "Question and answer" }) };
  state.exchanges.push(exchange);
  at("log").append(exchange.node);
  lay(exchange);
  at("log").scrollTop = at("log").scrollHeight;
  await follow(exchange, answers);
}

/** @param {Exchange} exchange @param {Answer[]} answers */
async function follow(exchange, answers) {
  state.running = new AbortController();
  busy(true);
  say(answers.length > 1 ? "Two answers are being written." : "The answer is being written.");
  const { signal } = state.running;
  await Promise.all(answers.map((answer) => run(exchange, answer, signal)));
  state.running = null;
  const low = isLow();
  for (const other of state.exchanges) finish(other);
  if (low) at("log").scrollTop = at("log").scrollHeight;
  busy(false);
  keep();
  const failed = answers.find((answer) => answer.error);
  if (failed) say(failed.error, true);
  else say(answers.map((answer) => `${answer.label && `${answer.label}: `}${answer.tokens.length} tokens`).join(". "));
  at("question").focus({ preventScroll: true });
}

/** @param {boolean} on */
function busy(on) {
  at("send").hidden = on;
  at("stop").hidden = !on;
  for (const id of ["new", "load", "save"]) at(id).disabled = on;
}

/** Puts an exchange into its place on the page. @param {Exchange} exchange */
function lay(exchange) {
  const answers = make("div", { class: `answers${exchange.answers.length > 1 ? " two" : ""}` }, ...exchange.answers.map((answer) => answer.node));
  exchange.node.replaceChildren(make("div", { class: "asked" }, exchange.question), answers);
  at("empty").hidden = true;
  finish(exchange);
}

/** Says what there is to say at the end of an answer. @param {Exchange} exchange */
function finish(exchange) {
  const last = exchange === state.exchanges.at(-1);
  for (const [i, answer] of exchange.answers.entries()) {
    const { foot } = answer.parts;
    const kept = i === exchange.kept;
    answer.node.classList.toggle("kept", kept && exchange.answers.length > 1);
    foot.replaceChildren();
    if (!answer.ending && !answer.error && !answer.seconds && !answer.text) continue;
    if (answer.thought) answer.parts.summary.textContent = `Thoughts (${answer.tokens.filter((token) => token.thought).length} tokens)`;
    foot.append(...facts(answer).map((text) => make("span", {}, text)));
    if (answer.error) foot.append(make("span", { class: "bad" }, `Error: ${answer.error}`));
    if (state.running || !last) continue;
    if (!kept) foot.append(make("button", { type: "button", class: "small", onclick: () => { exchange.kept = i; finish(exchange); keep(); } }, "Continue with this one"));
    else if (exchange.answers.length > 1) foot.append(make("span", {}, "✓ the conversation continues with this one"));
    if (i === 0) foot.append(make("button", { type: "button", class: "small", onclick: () => again(exchange) }, "Answer again"));
  }
  draw(exchange);
}

/** @param {Answer} answer @returns {string[]} */
function facts(answer) {
  const { own, tokens } = answer;
  const found = [];
  if (tokens.length) {
    const before = mean(tokens.map((token) => token.before));
    const after = mean(tokens.map((token) => token.after));
    const changed = tokens.filter((token) => token.changed).length;
    found.push(`${tokens.length} tokens`, `mean entropy ${nats(before)}${tokens.some((token) => token.steps) ? ` → ${nats(after)}` : ""} nats`);
    if (changed) found.push(`EM changed ${changed}`);
  }
  if (own?.abstained) found.push("the answer is withheld: its confidence is too low");
  if (typeof own?.confidence === "number") found.push(`confidence ${own.confidence.toFixed(2)}`);
  if (answer.seconds) found.push(`seed ${answer.seed}`, `${answer.seconds.toFixed(1)} s`);
  if (answer.ending === "length") found.push("cut off at the limit of tokens");
  if (answer.ending === "stopped") found.push("stopped");
  return found;
}

/** @param {Exchange} exchange */
function again(exchange) {
  if (state.running) return;
  state.exchanges.pop();
  exchange.node.remove();
  void ask(exchange.question);
}

/** Continues an answer from one of its places with another token. @param {Answer} answer @param {Token} token @param {Alternative} other */
function branch(answer, token, other) {
  const exchange = state.exchanges.at(-1);
  const i = answer.tokens.indexOf(token);
  const text = exchange && textUpTo(answer, token, other);
  if (!exchange || state.running || text === null || text === undefined) return;
  const made = newAnswer(answer.fields, answer.label, answer.seed);
  for (const each of answer.tokens.slice(0, i)) show(made, { ...each, node: null });
  show(made, { ...token, ...other, picked: true, changed: false, node: null });
  made.text = text;
  made.thought = answer.thought;
  made.parts.thought.hidden = !answer.thought;
  exchange.kept = exchange.answers.indexOf(answer);
  exchange.answers[exchange.kept] = made;
  hideCard();
  lay(exchange);
  void follow(exchange, [made]);
}

/** The answer's text before a token and then another one; null where they are not whole characters.
 * @param {Answer} answer @param {Token} token @param {Alternative} other @returns {string | null} */
function textUpTo(answer, token, other) {
  const before = answer.tokens.slice(0, answer.tokens.indexOf(token)).filter((each) => !each.thought);
  try {
    return new TextDecoder("utf-8", { fatal: true }).decode(new Uint8Array([...before, other].flatMap((each) => each.bytes)));
  } catch {
    return null;
  }
}

// ------------------------------------------------------------------------------------- curves, differences

/** @type {Set<Exchange>} */
const waiting = new Set();

/** @param {Exchange} exchange */
function later(exchange) {
  if (!waiting.size) requestAnimationFrame(() => { waiting.forEach(draw); waiting.clear(); });
  waiting.add(exchange);
}

/** Draws the curves, and marks the first token in which two answers differ. @param {Exchange} exchange */
function draw(exchange) {
  const { answers } = exchange;
  let differs = -1;
  exchange.node.querySelectorAll(".differs").forEach((node) => node.remove());
  if (answers.length > 1) {
    const [one, two] = answers.map((answer) => answer.tokens);
    const shared = Math.min(one.length, two.length);
    differs = one.slice(0, shared).findIndex((token, i) => token.id !== two[i].id);
    const ended = answers.every((answer) => answer.ending || answer.error);
    if (differs < 0 && ended && one.length !== two.length) differs = shared;
    for (const answer of differs < 0 ? [] : answers) {
      const node = answer.tokens.slice(differs).find((token) => token.node)?.node;
      node?.before(make("span", { class: "differs", title: "the first difference" }, "≠", make("span", { class: "sr" }, " first difference ")));
    }
  }
  const longest = Math.max(2, ...answers.map((answer) => answer.tokens.length));
  const highest = answers.reduce((most, answer) => answer.tokens.reduce((high, token) => Math.max(high, token.before), most), 1);
  for (const answer of answers) curve(answer, longest, highest, differs);
}

/** @param {Answer} answer @param {number} longest @param {number} highest @param {number} differs */
function curve(answer, longest, highest, differs) {
  const { tokens } = answer;
  const svg = answer.parts.curve;
  svg.toggleAttribute("hidden", tokens.length < 2);
  if (tokens.length < 2) return;
  const x = (/** @type {number} */ i) => ((1000 * (i + 0.5)) / longest).toFixed(1);
  const path = (/** @type {(token: Token) => number} */ height) => `M${tokens.map((token, i) => `${x(i)} ${(99 - (96 * height(token)) / highest).toFixed(1)}`).join("L")}`;
  const top = tokens.reduce((most, token, i) => (token.before > tokens[most].before ? i : most), 0);
  const words = `Entropy along the answer: mean ${nats(mean(tokens.map((token) => token.before)))} nats, highest ${nats(tokens[top].before)} at token ${top + 1}`;
  const drawn = [svgNode("path", { class: "before", d: path((token) => token.before) })];
  if (tokens.some((token) => token.steps)) drawn.push(svgNode("path", { class: "after", d: path((token) => token.after) }));
  if (differs >= 0) drawn.push(svgNode("line", { class: "diff", x1: x(differs), x2: x(differs), y1: 0, y2: 100 }));
  const title = svgNode("title", {});
  title.textContent = words;
  for (const [name, value] of Object.entries({ viewBox: "0 0 1000 100", preserveAspectRatio: "none", role: "img", "aria-label": words })) svg.setAttribute(name, value);
  svg.replaceChildren(title, ...drawn);
  answer.parts.x = x;
}

/** @param {string} name @param {Fields} attributes */
function svgNode(name, attributes) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, String(value));
  return made;
}

// ------------------------------------------------------------------------------------- the card of a token

/** @type {{node: HTMLElement | null, pinned: boolean}} */
const card = { node: null, pinned: false };

/** @param {HTMLElement} node @param {boolean} pinned */
function showCard(node, pinned) {
  const found = nodes.get(node);
  if (!found) return;
  hideCard();
  const [answer, token] = found;
  card.node = node;
  card.pinned = pinned;
  node.classList.add("at");
  const facts = [
    ["Entropy", `${nats(token.before)} nats`], ...(token.steps ? [["After EM", `${nats(token.after)} nats, ${token.steps} steps`]] : []),
    ["Probability", `${percent(token.p)}${token.steps ? ` → ${percent(token.pAfter)}` : ""}`],
    ...(token.picked ? [["Chosen", "by you"]] : []), ...(token.changed ? [["EM", "the same draw gives another token without it"]] : []),
  ];
  const last = state.exchanges.at(-1)?.answers.includes(answer);
  const why = !last ? "Only the last answer can be continued from here." : state.running ? "Wait for the end of the answer." : token.thought ? "A thought cannot be continued with another token." : "Continue from here with:";
  const list = make("ol", {}, ...token.top.map((other) => {
    const free = why.endsWith(":") && other.id !== token.id && textUpTo(answer, token, other) !== null && other.bytes.length > 0;
    const label = `${shown(other.text)}, ${percent(other.p)}${other.id === token.id ? ", the token of this answer" : ""}`;
    return make("li", {}, make("button", { type: "button", disabled: !free, "aria-label": label, onclick: () => branch(answer, token, other) },
      make("code", {}, other.bytes.length ? shown(other.text) : "(end)"), make("meter", { min: 0, max: 1, value: Math.min(1, other.p), "aria-hidden": "true" }),
      make("span", { class: "p" }, percent(other.p), other.id === token.id ? " ✓" : "")));
  }));
  at("card").replaceChildren(make("h3", {}, shown(token.text)), make("dl", {}, ...facts.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)])),
    ...(token.top.length ? [make("div", { class: "p" }, pinned || !last ? why : "Press the token to continue from here with another one."), list] : []));
  at("card").hidden = false;
  const box = node.getClientRects()[0];
  const own = at("card").getBoundingClientRect();
  const below = box.bottom + 6 + own.height < innerHeight;
  at("card").style.left = `${Math.max(8, Math.min(box.left, innerWidth - own.width - 8))}px`;
  at("card").style.top = `${below ? box.bottom + 6 : Math.max(8, box.top - own.height - 6)}px`;
  const i = answer.tokens.indexOf(token);
  if (answer.parts.x) answer.parts.curve.append(svgNode("line", { class: "here", x1: answer.parts.x(i), x2: answer.parts.x(i), y1: 0, y2: 100 }));
  if (document.activeElement === node) at("live").textContent = `${shown(token.text)}: ${facts.map((each) => each.join(" ")).join(", ")}`;
}

function hideCard() {
  at("card").hidden = true;
  card.node?.classList.remove("at");
  document.querySelectorAll(".here").forEach((node) => node.remove());
  Object.assign(card, { node: null, pinned: false });
}

/** @param {HTMLElement} node */
function pin(node) {
  showCard(node, true);
  at("card").querySelector("button:not(:disabled)")?.focus();
}

/** @param {KeyboardEvent} event */
function onKey(event) {
  const node = /** @type {HTMLElement} */ (event.target);
  if (event.key === "Escape" && card.node) {
    const from = card.node;
    const inside = at("card").contains(document.activeElement);
    if (inside) from.focus(); // which shows it again
    hideCard();
  } else if (nodes.has(node)) {
    const all = [.../** @type {HTMLElement} */ (node.parentElement).querySelectorAll(".t")];
    const i = all.indexOf(node);
    const to = { ArrowRight: i + 1, ArrowLeft: i - 1, Home: 0, End: all.length - 1 }[event.key];
    if (event.key === "Enter" || event.key === " ") pin(node);
    else if (to === undefined) return;
    else if (all[to]) {
      node.tabIndex = -1;
      /** @type {HTMLElement} */ (all[to]).tabIndex = 0;
      /** @type {HTMLElement} */ (all[to]).focus();
    }
    event.preventDefault();
  }
}

// ------------------------------------------------------------------------------------------------ settings

/** What the two sides of a comparison are called: what they set differently. */
function sideLabels() {
  const [one, two] = state.sides;
  const names = [...new Set([...Object.keys(one), ...Object.keys(two)])].filter((name) => JSON.stringify(one[name]) !== JSON.stringify(two[name]));
  const word = (/** @type {Fields} */ side, /** @type {string} */ name) => (name === "em_inf" ? `EM-INF ${side[name] ? "on" : "off"}` : `${name} ${side[name] ?? "default"}`);
  return [one, two].map((side, i) => names.map((name) => word(side, name)).join(", ") || ["left", "right"][i]);
}

/** @param {Fields} known @param {Fields} side */
function fieldOf(known, side) {
  const id = `set-${known.name}`;
  const { kind, name } = known;
  const given = side[name];
  const put = (/** @type {any} */ value) => { if (value === "") delete side[name]; else side[name] = value; row.classList.toggle("set", name in side); changed(); };
  let input;
  if (kind === "switch" || kind === "choice") {
    const values = kind === "switch" ? ["true", "false"] : known.choices;
    const said = known.value === null ? "default" : `default (${known.value === true ? "on" : known.value === false ? "off" : known.value})`;
    input = make("select", { id, onchange: () => put(kind === "switch" && input.value ? input.value === "true" : input.value) },
      make("option", { value: "" }, said), ...values.map((/** @type {string} */ value) => make("option", { value }, { true: "on", false: "off" }[value] ?? value)));
  } else if (kind === "number" || kind === "whole") {
    input = make("input", { id, type: "number", step: kind === "whole" ? 1 : "any", min: known.low ?? undefined, max: known.high ?? undefined, placeholder: known.value ?? "",
      oninput: () => { input.setCustomValidity(""); if (input.validity.valid) put(input.value === "" ? "" : Number(input.value)); input.reportValidity(); } });
  } else {
    const list = kind === "texts";
    input = make("textarea", { id, rows: 1, placeholder: list ? "one a line" : "", oninput: () => put(list && input.value ? input.value.split("\n").filter(Boolean) : input.value) });
  }
  input.value = Array.isArray(given) ? given.join("\n") : String(given ?? "");
  input.setAttribute("aria-describedby", `${id}-help`);
  const range = kind === "number" || kind === "whole" ? ` Give ${known.range}.` : "";
  const row = make("div", { class: `field${name in side ? " set" : ""}` }, make("label", { for: id }, name), input, make("small", { id: `${id}-help` }, known.help + range));
  return row;
}

function drawSettings() {
  const side = state.sides[state.side];
  const panels = new Map();
  for (const known of state.table) panels.set(known.panel, [...(panels.get(known.panel) ?? []), known]);
  const system = make("textarea", { id: "set-system", rows: 2, oninput: () => { state.system = system.value; keep(); } });
  system.value = state.system;
  const seed = make("input", { id: "set-seed", inputmode: "numeric", pattern: "[0-9]{0,15}", placeholder: "random", oninput: () => { if (system && seed.validity.valid) { state.seed = seed.value; keep(); } seed.reportValidity(); } });
  seed.value = state.seed;
  at("fields").replaceChildren(
    make("div", { class: "field" }, make("label", { for: "set-system" }, "system"), system, make("small", {}, "Message in front of the conversation.")),
    make("div", { class: "field" }, make("label", { for: "set-seed" }, "seed"), seed, make("small", {}, "Number that fixes all draws, of both sides. Empty: another one for each question.")),
    ...[...panels].map(([panel, all], i) => make("details", { open: i === 0 || all.some((/** @type {Fields} */ known) => known.name in side) }, make("summary", {}, panel), ...all.map((/** @type {Fields} */ known) => fieldOf(known, side)))));
  at("tabs").hidden = !state.compare;
  at("tabs").replaceChildren(...["Left", "Right"].map((name, i) => make("button", { type: "button", "aria-pressed": i === state.side, onclick: () => { state.side = i; drawSettings(); } }, name)));
}

/** After a setting changed. */
function changed() {
  const count = state.sides.slice(0, state.compare ? 2 : 1).reduce((sum, side) => sum + Object.keys(side).length, 0);
  at("count").textContent = count ? ` (${count})` : "";
  at("em").checked = state.sides[0].em_inf ?? state.table.find((known) => known.name === "em_inf")?.value === true;
  at("em").disabled = state.compare;
  at("compare").checked = state.compare;
  keep();
}

/** @param {boolean} on */
function setCompare(on) {
  state.compare = on;
  state.side = 0;
  const [one, two] = state.sides;
  if (on && JSON.stringify(one) === JSON.stringify(two)) Object.assign(state, { sides: [{ ...one, em_inf: false }, { ...one, em_inf: true }] });
  else if (on && !Object.keys(two).length) state.sides[1] = { ...one, em_inf: !one.em_inf };
  changed();
  say(on ? `Left: ${sideLabels()[0]}. Right: ${sideLabels()[1]}. Settings change either.` : "");
}

// --------------------------------------------------------------------------------------- files and reloads

function saved() {
  const exchanges = state.exchanges.map(({ question, answers, kept }) => ({ question, answer: answers[kept].text }));
  return { format: FORMAT, model: state.model, system: state.system || null, exchanges };
}

/** Shows a conversation from a file. Throws for what is not one. @param {any} content */
function open(content) {
  if (content?.format !== FORMAT) throw new Error(`its format is not ${FORMAT}`);
  const { system = null, exchanges } = content;
  const texts = Array.isArray(exchanges) && exchanges.every((each) => typeof each?.question === "string" && typeof each?.answer === "string");
  if (!texts || !(system === null || typeof system === "string")) throw new Error("its messages are not texts");
  clear();
  state.system = system ?? "";
  for (const { question, answer } of exchanges) {
    const made = newAnswer({}, "", 0);
    made.text = answer;
    made.parts.text.append(answer);
    const exchange = { question, answers: [made], kept: 0, node: make("section", { class: "exchange", "aria-label": "Question and answer" }) };
    state.exchanges.push(exchange);
    at("log").append(exchange.node);
    lay(exchange);
  }
  for (const exchange of state.exchanges) finish(exchange);
  at("log").scrollTop = at("log").scrollHeight;
}

function clear() {
  hideCard();
  for (const { node } of state.exchanges) node.remove();
  state.exchanges = [];
  at("empty").hidden = false;
}

/** Keeps the texts for a reload, in this tab only. */
function keep() {
  const { sides, compare, seed, key } = state;
  try {
    sessionStorage.setItem(KEPT, JSON.stringify({ sides, compare, seed, key, chat: saved() }));
  } catch {
    say("The conversation is too large to be kept over a reload. Save it.", true);
  }
}

async function start() {
  const kept = JSON.parse(sessionStorage.getItem(KEPT) ?? "null");
  if (kept) {
    Object.assign(state, { sides: kept.sides, compare: kept.compare, seed: kept.seed, key: kept.key });
    open(kept.chat);
  }
  at("scale").replaceChildren(...[...LEVELS, Infinity].map((bound, i) => make("span", { class: `t e${i}` }, i === 0 ? `≤ ${bound}` : bound === Infinity ? `> ${LEVELS[i - 1]} nats` : `≤ ${bound}`)));
  at("ideas").append(...IDEAS.map((idea) => make("button", { type: "button", onclick: () => { at("question").value = idea; at("question").focus(); } }, idea)));
  listen();
  const found = await (await call("/settings")).json();
  state.model = at("model").textContent = found.model;
  document.title = `${found.model} · emlocal`;
  state.table = found.settings.filter((/** @type {Fields} */ known) => known.name !== "seed"); // one seed for both sides
  changed();
}

function listen() {
  at("ask").addEventListener("submit", (/** @type {Event} */ event) => {
    event.preventDefault();
    const question = at("question").value.trim();
    if (!question || state.running) return;
    at("question").value = "";
    void ask(question);
  });
  at("question").addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); at("ask").requestSubmit(); }
  });
  at("stop").addEventListener("click", () => state.running?.abort());
  at("em").addEventListener("change", () => { state.sides[0].em_inf = at("em").checked; changed(); });
  at("compare").addEventListener("change", () => setCompare(at("compare").checked));
  at("which").addEventListener("change", () => { state.which = at("which").value; for (const { answers } of state.exchanges) for (const { tokens } of answers) tokens.forEach(paint); });
  at("new").addEventListener("click", () => { clear(); keep(); say(""); at("question").focus(); });
  at("save").addEventListener("click", () => {
    const url = URL.createObjectURL(new Blob([`${JSON.stringify(saved(), null, 1)}\n`], { type: "application/json" }));
    make("a", { href: url, download: "chat.json" }).click();
    setTimeout(() => URL.revokeObjectURL(url), 10_000);
  });
  at("load").addEventListener("click", () => at("file").click());
  at("file").addEventListener("change", async () => {
    const [file] = at("file").files;
    try {
      if (file.size > LARGEST_FILE) throw new Error("it has more than 64 MiB");
      open(JSON.parse(await file.text()));
      say(`${file.name}: ${state.exchanges.length} questions`);
      keep();
    } catch (error) {
      say(`${file.name} is not a conversation: ${/** @type {Error} */ (error).message}`, true);
    }
    at("file").value = "";
  });
  at("open-settings").addEventListener("click", () => { drawSettings(); at("settings").showModal(); });
  at("reset").addEventListener("click", () => { state.sides[state.side] = {}; changed(); drawSettings(); });
  const log = at("log");
  log.addEventListener("pointermove", (/** @type {PointerEvent} */ event) => { // not "over": text that moves under a resting mouse shows nothing
    if (event.pointerType !== "mouse" || card.pinned || event.target === card.node) return;
    if (nodes.has(/** @type {Node} */ (event.target))) showCard(/** @type {HTMLElement} */ (event.target), false);
    else hideCard();
  });
  log.addEventListener("focusin", (/** @type {FocusEvent} */ event) => { if (nodes.has(/** @type {Node} */ (event.target))) showCard(/** @type {HTMLElement} */ (event.target), false); });
  log.addEventListener("pointerleave", () => { if (!card.pinned) hideCard(); });
  log.addEventListener("scroll", () => { if (!card.pinned) hideCard(); });
  document.addEventListener("click", (event) => {
    const target = /** @type {HTMLElement} */ (event.target);
    if (nodes.has(target)) pin(target);
    else if (!at("card").contains(target)) hideCard();
  });
  document.addEventListener("keydown", onKey);
}

start().catch((error) => say(`The page cannot reach the server: ${error.message}`, true));
