// The console: what the team has, on and off, and a playground. All text goes in by textContent, never as markup.

import { Refused, chat, forgetKey, get, getKey, list, post, setKey } from "./api.js";

const REFRESH_MS = 3000;
const byId = (id) => document.getElementById(id);
let refreshing = null;
let running = null;

function make(tag, { text, className, ...attributes } = {}, ...children) {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  if (className) element.className = className;
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function show(notice) {
  byId("notice").textContent = notice ?? "";
  byId("notice").hidden = !notice;
}

function explain(error) {
  if (error.name === "AbortError") return;
  if (error instanceof Refused && error.status === 401) {
    signOut();
    show("This key is not valid.");
    return;
  }
  show(error instanceof Refused ? `${error.message} (${error.code})` : "Roundhouse cannot be reached.");
}

function resourceCard(resource) {
  const isOn = resource.wanted === "on";
  const dot = make("span", { className: `dot ${resource.indicator}`, role: "img", "aria-label": resource.indicator });
  const button = make("button", { text: isOn ? "Turn off" : "Turn on", type: "button" });
  button.addEventListener("click", async () => {
    button.disabled = true;
    try {
      await post(`/api/resources/${resource.resource_id}/${isOn ? "off" : "on"}`);
      await refresh();
    } catch (error) {
      explain(error);
      button.disabled = false;
    }
  });
  const details = [resource.model_type, resource.option.name, `${resource.live_gpus} of ${resource.gpus} GPUs live`,
    `${resource.option.hourly_rate_usd} USD/h each`].join(" · ");
  const card = make("li", {}, make("div", { className: "row" }, dot, make("strong", { text: resource.name }),
    make("span", { text: resource.state }), make("span", { text: details, className: "quiet" }), button));
  if (resource.reason) card.append(make("div", { text: resource.reason, className: "quiet" }));
  return card;
}

function modelCard(model) {
  return make("li", {}, make("div", { className: "row" }, make("strong", { text: model.name }),
    make("span", { text: model.model_type, className: "quiet" })),
  make("details", {}, make("summary", { text: model.url }), make("pre", { text: model.snippet })));
}

function usageRow(row) {
  const cells = [row.group ?? "(resources)", row.requests, row.prompt_tokens, row.completion_tokens, row.tokens_usd,
    row.minutes, row.minutes_usd];
  return make("tr", {}, ...cells.map((cell) => make("td", { text: String(cell) })));
}

function fillModels(models) {
  const select = byId("model");
  const names = models.map((model) => model.id);
  if (names.join("\n") === [...select.options].map((option) => option.value).join("\n")) return;
  const chosen = select.value;
  select.replaceChildren(...names.map((name) => make("option", { text: name, value: name })));
  if (names.includes(chosen)) select.value = chosen;
}

async function refresh() {
  const [resources, models, usable, usage] = await Promise.all([
    list("/api/resources"), list("/api/models"), get("/v1/models"), get("/api/usage?group_by=model"),
  ]);
  byId("resources").replaceChildren(...resources.map(resourceCard));
  // Cards with an open snippet stay as they are.
  if (byId("models").querySelector("details[open]") === null) {
    byId("models").replaceChildren(...models.map(modelCard));
  }
  byId("usage").replaceChildren(...usage.data.map(usageRow));
  byId("balance").textContent = `Balance: ${usage.balance_usd} USD`;
  fillModels(usable.data);
}

async function keepFresh() {
  try {
    if (!document.hidden) {
      await refresh();
      show(null);
    }
  } catch (error) {
    explain(error);
  }
  if (getKey()) refreshing = setTimeout(keepFresh, REFRESH_MS);
}

async function signIn() {
  try {
    await refresh();
  } catch (error) {
    signOut();
    explain(error);
    return;
  }
  show(null);
  byId("key").value = "";
  byId("key").hidden = true;
  byId("sign-out").hidden = false;
  document.querySelector("main").hidden = false;
  refreshing = setTimeout(keepFresh, REFRESH_MS);
}

function signOut() {
  clearTimeout(refreshing);
  running?.abort();
  forgetKey();
  for (const id of ["resources", "models", "usage", "answer", "balance", "model"]) byId(id).replaceChildren();
  document.querySelector("main").hidden = true;
  byId("key").hidden = false;
  byId("sign-out").hidden = true;
  show(null);
}

async function send(event) {
  event.preventDefault();
  running = new AbortController();
  byId("send").disabled = true;
  byId("stop").hidden = false;
  byId("answer").textContent = "";
  show(null);
  try {
    for await (const text of chat(byId("model").value, byId("message").value, running.signal)) {
      byId("answer").append(text);
    }
  } catch (error) {
    explain(error);
  } finally {
    running = null;
    byId("send").disabled = false;
    byId("stop").hidden = true;
  }
}

byId("sign-in").addEventListener("submit", (event) => {
  event.preventDefault();
  setKey(byId("key").value.trim());
  signIn();
});
byId("sign-out").addEventListener("click", signOut);
byId("playground").addEventListener("submit", send);
byId("stop").addEventListener("click", () => running?.abort());
if (getKey()) signIn();
