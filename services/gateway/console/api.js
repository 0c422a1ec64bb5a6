// Calls of the HTTP API. The key lives in this tab's session storage only, and goes nowhere but into the header.

const KEY = "roundhouse-key";
const ANSWER_LIMIT_MS = 15000;

export const getKey = () => sessionStorage.getItem(KEY);
export const setKey = (key) => sessionStorage.setItem(KEY, key);
export const forgetKey = () => sessionStorage.removeItem(KEY);

export class Refused extends Error {
  constructor(status, code, message) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

async function send(method, path, body, signal = AbortSignal.timeout(ANSWER_LIMIT_MS)) {
  const headers = { Authorization: `Bearer ${getKey()}` };
  if (body !== undefined) headers["Content-Type"] = "application/json";
  const answer = await fetch(path, {
    method, headers, signal, body: body === undefined ? undefined : JSON.stringify(body),
  });
  if (answer.ok) return answer;
  const problem = await answer.json().catch(() => null);
  const error = problem?.error ?? problem;
  throw new Refused(answer.status, error?.code ?? "unknown", error?.message ?? error?.detail ?? answer.statusText);
}

export async function get(path) {
  return (await send("GET", path)).json();
}

// A file as the browser's own object: a link could not carry the key.
export async function file(path) {
  return (await send("GET", path)).blob();
}

// All pages of a list, up to a bound that no page of ours needs.
export async function list(path) {
  const found = [];
  let cursor = null;
  do {
    const more = cursor === null ? "" : `&cursor=${encodeURIComponent(cursor)}`;
    const page = await get(`${path}?limit=100${more}`);
    found.push(...page.data);
    cursor = page.next_cursor;
  } while (cursor !== null && found.length < 1000);
  return found;
}

export async function post(path, body) {
  return (await send("POST", path, body)).json();
}

export async function put(path, body) {
  return (await send("PUT", path, body)).json();
}

export async function remove(path) {
  await send("DELETE", path);
}

// Yields the chunks of a streamed chat answer as they come; the last one carries the usage.
export async function* chat(model, message, signal) {
  const body = {
    model, stream: true, stream_options: { include_usage: true }, max_tokens: 256, temperature: 0.7,
    messages: [{ role: "user", content: message }],
  };
  const answer = await send("POST", "/v1/chat/completions", body, signal);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Refused(0, "stream_ended", "The answer was broken off.");
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.split("\n").filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trim()).join("\n");
      if (data === "[DONE]") return;
      if (data === "") continue;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Refused(0, chunk.error.code, chunk.error.message);
      yield chunk;
    }
  }
}
