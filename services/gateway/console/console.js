// The console: what the team has, on and off, and a playground. All text goes in by textContent, never as markup.

import { Refused, chat, file, forgetKey, get, getKey, list, post, put, remove, setKey } from "./api.js";

const REFRESH_MS = 3000;
const USAGE_EVERY = 5; // refreshes
const ALERTS_SHOWN = 5;
const byId = (id) => document.getElementById(id);
const count = (value) => value.toLocaleString("en-US");
let session = null; // a new object for every sign-in: what answers to an old one is dropped
let running = null;
let typeOfOption = new Map();

function make(tag, { text, className, ...attributes } = {}, ...children) {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  if (className) element.className = className;
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function show(id, words) {
  byId(id).textContent = words ?? "";
  byId(id).hidden = !words;
}

function wordsOf(error) {
  if (error instanceof Refused) return `${error.message} (${error.code})`;
  return "Roundhouse cannot be reached. Trying again…";
}

// ---- lists: a row is built anew only when its data changed, so that focus and open details stay

const shown = new Map();

function fill(id, items, build, emptyWords) {
  const before = shown.get(id) ?? new Map();
  const rows = new Map(items.map((item) => {
    const data = JSON.stringify(item);
    return [data, before.get(data) ?? build(item)];
  }));
  if (shown.has(id) && [...rows.keys()].join("\n") === [...before.keys()].join("\n")) return;
  shown.set(id, rows);
  byId(id).replaceChildren(...(rows.size > 0 ? rows.values() : [emptyWords()]));
}

function fillSelect(id, choices) {
  const select = byId(id);
  const chosen = select.value;
  fill(id, choices, ([value, text]) => make("option", { text, value }), () => make("option", { text: "none yet", value: "" }));
  if (choices.some(([value]) => value === chosen)) select.value = chosen;
}

const nothing = (words) => () => make("li", { text: words, className: "quiet" });

function button(text, act) {
  const element = make("button", { text, type: "button" });
  element.addEventListener("click", async () => {
    element.disabled = true;
    await attempt(act);
    element.disabled = false;
  });
  return element;
}

async function attempt(act) {
  const mine = session;
  try {
    await act();
    mine.refreshes = 0; // what costs more to read is read again as well
    await refresh(mine);
    show("notice", null);
    return true;
  } catch (error) {
    explain(error, mine);
    return false;
  }
}

function resourceCard(resource) {
  const path = `/api/resources/${resource.resource_id}`;
  const isOn = resource.wanted === "on";
  const dot = make("span", { className: `dot ${resource.indicator}`, role: "img", "aria-label": resource.indicator });
  const actions = make("div", { className: "row pushed" });
  if (!isOn && resource.state === "off") {
    actions.append(button("Remove", async () => {
      if (confirm(`Remove the resource “${resource.name}”?`)) await remove(path);
    }));
  }
  actions.append(button(isOn ? "Turn off" : "Turn on", () => post(`${path}/${isOn ? "off" : "on"}`)));
  const details = [resource.model_type, resource.option.name, `${resource.live_gpus} of ${resource.gpus} GPUs live`,
    `${resource.option.hourly_rate_usd} USD per GPU and hour`].join(" · ");
  const row = make("div", { className: "row" }, dot, make("strong", { text: resource.name }),
    make("span", { text: resource.state }), actions);
  const card = make("li", {}, row, make("div", { text: details, className: "quiet" }));
  if (resource.reason) card.append(make("div", { text: resource.reason, className: "quiet" }));
  card.append(residency(`${path}/models`));
  return card;
}

// ---- which models are on a resource's GPUs: looked at when it is opened, and after each change

function residency(path) {
  const body = make("tbody");
  const heads = ["Model", "GPU", "State", "Swaps", "ms, median and 95%", "Hits", "Misses", ""];
  const table = make("table", {}, make("thead", {}, make("tr", {}, ...heads.map((text) => make("th", { text, scope: "col" })))), body);
  const details = make("details", {}, make("summary", { text: "Models on its GPUs" }), make("div", { className: "wide" }, table));
  const load = async () => {
    const rows = (await list(path)).flatMap((model) => residencyRows(model, `${path}/${model.model_id}`, load));
    body.replaceChildren(...(rows.length > 0 ? rows : [make("tr", {}, make("td", { text: "No models yet.", colspan: "8" }))]));
  };
  details.addEventListener("toggle", () => { if (details.open) attempt(load); });
  return details;
}

function residencyRows(model, path, load) {
  const act = model.pin
    ? button("Unpin", async () => { await remove(`${path}/pin`); await load(); })
    : button("Pin", async () => { await put(`${path}/pin`, { copies: "all" }); await load(); });
  const workers = model.workers.length > 0 ? model.workers : [null];
  return workers.map((worker, index) => {
    const state = worker ? [worker.state, worker.reason, worker.pinned ? "pinned" : ""].filter(Boolean).join(", ") : "no GPU live";
    const times = worker && worker.swap_ms_p50 !== null ? `${count(worker.swap_ms_p50)} / ${count(worker.swap_ms_p95)}` : "";
    const cells = [index === 0 ? model.name : "", worker ? String(worker.place) : "", state, worker ? count(worker.swaps) : "",
      times, worker ? count(worker.hits) : "", worker ? count(worker.misses) : ""];
    return make("tr", {}, ...cells.map((text) => make("td", { text })), make("td", {}, ...(index === 0 ? [act] : [])));
  });
}

function modelCard(model) {
  const copy = make("button", { text: "Copy", type: "button" });
  copy.addEventListener("click", async () => {
    // Browsers give the clipboard to https and to this machine only.
    const copied = await navigator.clipboard?.writeText(model.snippet).then(() => true, () => false);
    copy.textContent = copied ? "Copied" : "Select it and copy by hand";
  });
  return make("li", {}, make("div", { className: "row spread" }, make("strong", { text: model.name }),
    make("span", { text: [model.model_type, `revision ${model.revision}`,
      ...(model.base ? [`adapter on ${model.base.name}, revision ${model.base.revision}`] : [])].join(" · "), className: "quiet" })),
  make("details", {}, make("summary", { text: model.url }), make("pre", { text: model.snippet }), copy));
}

function usageRow(row) {
  const cells = [row.group ?? "(resources)", count(row.requests), count(row.prompt_tokens), count(row.completion_tokens),
    row.tokens_usd, count(row.minutes), row.minutes_usd];
  return make("tr", {}, ...cells.map((text) => make("td", { text })));
}

function budgetRow(budget) {
  const cells = [budget.scope === "team" ? "team" : `${budget.scope} ${budget.scope_id}`, `${budget.period} from ${budget.period_start}`,
    budget.limit_usd, budget.spent_usd, budget.reserved_usd, budget.actions.join(", ") || "tells"];
  return make("tr", {}, ...cells.map((text) => make("td", { text })),
    make("td", {}, button("Remove", () => remove(`/api/budgets/${budget.budget_id}`))));
}

function alertRow(alert) {
  const text = `${alert.created_at}: ${alert.percent}% of ${alert.limit_usd} USD was spent (${alert.scope}, ${alert.period} from ${alert.period_start})`;
  return make("li", { text });
}

async function saveStatement() {
  const month = new Date().toISOString().slice(0, 7);
  const address = URL.createObjectURL(await file(`/api/billing/statements/${month}?format=csv`));
  make("a", { href: address, download: `statement-${month}.csv` }).click();
  URL.revokeObjectURL(address);
}

// ---- what is there now

async function refresh(mine) {
  const [resources, models, usable, options] = await Promise.all([
    list("/api/resources"), list("/api/models"), get("/v1/models"), list("/api/options"),
  ]);
  const withUsage = mine.refreshes++ % USAGE_EVERY === 0;
  const usage = withUsage ? await get("/api/usage?group_by=model") : null;
  const team = withUsage ? await get("/api/team") : null;
  const account = withUsage ? await get("/api/billing/account") : null;
  const budgets = withUsage ? await list("/api/budgets") : null;
  const alerts = withUsage ? (await get(`/api/alerts?limit=${ALERTS_SHOWN}`)).data : null;
  if (mine !== session) return;
  fill("resources", resources, resourceCard, nothing("No resources yet."));
  fill("models", models, modelCard, nothing("No models yet."));
  fillSelect("model", usable.data.map((model) => [model.id, model.id]));
  typeOfOption = new Map(options.map((option) => [option.option_id, option.model_type]));
  fillSelect("resource-option", options.map((option) => [option.option_id,
    `${option.model_type} · ${option.name} on ${option.device_kind} · ${option.hourly_rate_usd} USD/h`]));
  if (withUsage) {
    const noRows = () => make("tr", {}, make("td", { text: "Nothing yet.", colspan: "7" }));
    fill("usage", usage.data, usageRow, noRows);
    byId("balance").textContent = `Balance: ${usage.balance_usd} USD`;
    byId("spendable").textContent = account.spendable_usd === null ? "" : `May still spend ${account.spendable_usd} USD`;
    fill("budgets", budgets, budgetRow, () => make("tr", {}, make("td", { text: "No budgets yet.", colspan: "7" })));
    fill("alerts", alerts, alertRow, () => "");
    byId("team").textContent = team.name;
  }
}

async function keepFresh(mine) {
  while (mine === session) {
    try {
      if (!document.hidden) {
        await refresh(mine);
        if (mine !== session) return;
        enter();
        if (mine.isAway) show("notice", null);
        mine.isAway = false;
      }
    } catch (error) {
      mine.isAway = true;
      explain(error, mine);
    }
    await new Promise((resolve) => setTimeout(resolve, REFRESH_MS));
  }
}

function explain(error, mine) {
  if (mine !== session) return;
  const words = error instanceof Refused && error.status === 401 ? "This key is not valid." : wordsOf(error);
  const mayNotManage = error instanceof Refused && error.status === 403 && byId("sign-in").hidden === false;
  if (error.status === 401 || mayNotManage) signOut();
  show("notice", words);
}

// ---- in and out

function signIn() {
  session = { refreshes: 0, isAway: false };
  keepFresh(session);
}

function enter() {
  if (byId("sign-in").hidden) return;
  show("notice", null);
  byId("key").value = "";
  byId("sign-in").hidden = true;
  byId("signed-in").hidden = false;
  document.querySelector("main").hidden = false;
}

function signOut() {
  session = null;
  running?.abort();
  forgetKey();
  shown.clear();
  for (const id of ["resources", "models", "usage", "model", "resource-option", "budgets", "alerts"]) byId(id).replaceChildren();
  for (const id of ["answer", "balance", "spendable", "team", "measured"]) byId(id).textContent = "";
  for (const id of ["answer", "refused", "notice", "signed-in"]) byId(id).hidden = true;
  document.querySelector("main").hidden = true;
  byId("sign-in").hidden = false;
  byId("key").focus();
}

// ---- playground

async function send(event) {
  event.preventDefault();
  if (running) return;
  running = new AbortController();
  byId("send").disabled = true;
  byId("stop").hidden = false;
  byId("answer").hidden = false;
  for (const id of ["answer", "measured"]) byId(id).textContent = "";
  show("refused", null);
  const startedMs = performance.now();
  let firstMs = null;
  try {
    for await (const chunk of chat(byId("model").value, byId("message").value, running.signal)) {
      const text = chunk.choices[0]?.delta?.content;
      if (text) {
        firstMs ??= performance.now();
        byId("answer").append(text);
      }
      if (chunk.usage) {
        const seconds = (ms) => (ms / 1000).toFixed(2);
        byId("measured").textContent = `${chunk.usage.completion_tokens} tokens · first after ${
          seconds((firstMs ?? performance.now()) - startedMs)} s · ${seconds(performance.now() - startedMs)} s in all`;
      }
    }
  } catch (error) {
    if (error.name !== "AbortError") show("refused", error instanceof Refused ? wordsOf(error) : "The connection was lost.");
  } finally {
    running = null;
    byId("send").disabled = false;
    byId("stop").hidden = true;
    byId("answer").hidden = byId("answer").textContent === "";
  }
}

byId("sign-in").addEventListener("submit", (event) => {
  event.preventDefault();
  show("notice", null);
  setKey(byId("key").value.trim());
  signIn();
});
byId("sign-out").addEventListener("click", signOut);
byId("playground").addEventListener("submit", send);
byId("message").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("playground").requestSubmit();
});
byId("stop").addEventListener("click", () => running?.abort());
byId("add-resource").addEventListener("submit", async (event) => {
  event.preventDefault();
  const options = byId("resource-option");
  const body = {
    name: byId("resource-name").value,
    model_type: typeOfOption.get(options.value),
    option: options.value,
    gpus: byId("resource-gpus").valueAsNumber,
  };
  if (await attempt(() => post("/api/resources", body))) {
    byId("add-resource").reset();
    byId("add").open = false;
  }
});
byId("statement").addEventListener("click", () => attempt(saveStatement));
byId("add-budget").addEventListener("submit", async (event) => {
  event.preventDefault();
  const action = byId("budget-action").value;
  const body = {
    scope: "team", period: byId("budget-period").value, limit_usd: byId("budget-limit").value, alert_percents: [80, 100],
    actions: action === "" ? [] : [action],
  };
  if (await attempt(() => post("/api/budgets", body))) {
    byId("add-budget").reset();
    byId("new-budget").open = false;
  }
});
if (getKey()) signIn();
