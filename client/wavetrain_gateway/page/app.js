// SPDX-License-Identifier: Apache-2.0
// The page: reads the form, runs one request at a time, shows what comes and how fast.

import { ApiError, generate, getJson } from "./api.js";
import { Conversation } from "./conversation.js";
import { LoadPanel } from "./load.js";

const at = (id) => document.getElementById(id);
const NUMBERS = ["max_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "seed"];
const KEY_STORE = "wavetrain-key"; // of this tab; gone when it is closed
const THEME_STORE = "wavetrain-theme";

const conversation = new Conversation(at("log"));
let running = null; // the AbortController of the request that runs

function showState(text, kind = "") {
  at("state").textContent = text;
  at("state").dataset.kind = kind;
}

function showError(error) {
  at("error").hidden = !error;
  if (!error) return;
  const reference = error.requestId ? ` [request ${error.requestId}]` : "";
  at("error").textContent = `${error.message}${reference}`;
}

function getKey() {
  return at("key").value.trim();
}

function isChat() {
  return document.querySelector('input[name="mode"]:checked').value === "chat";
}

async function readModels() {
  const select = at("model");
  try {
    const { data } = await getJson("v1/models", getKey());
    const chosen = select.value;
    select.replaceChildren(...data.map((model) => new Option(model.id, model.id)));
    if (data.some((model) => model.id === chosen)) select.value = chosen;
    showState(data.length ? "ready" : "no models", data.length ? "" : "bad");
  } catch (error) {
    select.replaceChildren();
    showState(error.status === 401 ? "an API key is needed" : "the gateway does not answer", "bad");
  }
}

function readRequest(prompt) {
  const request = { model: at("model").value };
  for (const name of NUMBERS) if (at(name).value !== "") request[name] = Number(at(name).value);
  if (at("stop_text").value) request.stop = [at("stop_text").value];
  if (!isChat()) return { ...request, prompt };
  const system = at("system").value.trim();
  const messages = system ? [{ role: "system", content: system }] : [];
  return { ...request, messages: [...messages, ...conversation.messages, { role: "user", content: prompt }] };
}

function figures({ start, first, last, numTokens }) {
  if (first === null) return "";
  const parts = [`first token ${(first - start).toFixed(0)} ms`];
  if (numTokens !== null) parts.push(`${numTokens} tokens`);
  if (numTokens > 1 && last > first) parts.push(`${((1000 * (numTokens - 1)) / (last - first)).toFixed(1)} tokens/s`);
  return parts.join(", ");
}

async function run(prompt) {
  const chat = isChat();
  const request = readRequest(prompt);
  const progress = { start: performance.now(), first: null, last: null, numTokens: null };
  const answer = chat
    ? (conversation.add("user", prompt).end(""), conversation.add("assistant", ""))
    : conversation.add("completion", prompt);
  running = new AbortController();
  showError(null);
  setRunning(true);
  let note = "";
  try {
    for await (const part of generate(chat ? "v1/chat/completions" : "v1/completions", request, getKey(), running.signal)) {
      if (part.text) {
        progress.last = performance.now();
        progress.first ??= progress.last;
        answer.append(part.text);
      }
      if (part.numTokens !== null) progress.numTokens = part.numTokens;
      if (part.finishReason === "length") note = "ended at max tokens";
      at("figures").textContent = figures(progress);
    }
    if (chat) conversation.remember(prompt, answer.text);
  } catch (error) {
    note = error.name === "AbortError" ? "stopped" : "failed";
    if (error.name !== "AbortError") showError(error instanceof ApiError ? error : new ApiError("the gateway does not answer"));
    if (chat && answer.text && answer.isShown) conversation.remember(prompt, answer.text);
    if (!progress.first && answer.isShown) at("prompt").value = prompt; // so that it can be sent again
  } finally {
    answer.end([note, figures(progress)].filter(Boolean).join("; "));
    running = null;
    setRunning(false);
  }
}

function setRunning(isRunning) {
  at("send").disabled = isRunning;
  at("stop").disabled = !isRunning;
  showState(isRunning ? "generating" : "ready");
  if (!isRunning) at("prompt").focus();
}

function clear() {
  running?.abort();
  conversation.clear();
  showError(null);
}

function send(event) {
  event.preventDefault();
  const prompt = at("prompt").value;
  if (running || !prompt.trim() || !at("form").reportValidity()) return;
  if (!at("model").value) {
    showError(new ApiError("no model is there to ask; enter a key, or wait until one is ready"));
    return;
  }
  at("prompt").value = "";
  run(prompt);
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  at("theme").setAttribute("aria-pressed", String(theme === "dark"));
  localStorage.setItem(THEME_STORE, theme);
}

function start() {
  const isDark = matchMedia("(prefers-color-scheme: dark)").matches;
  const theme = localStorage.getItem(THEME_STORE);
  at("theme").setAttribute("aria-pressed", String(theme ? theme === "dark" : isDark));
  if (theme) setTheme(theme);
  at("theme").addEventListener("click", () => setTheme(at("theme").getAttribute("aria-pressed") === "true" ? "light" : "dark"));
  at("key").value = sessionStorage.getItem(KEY_STORE) ?? "";
  at("key").addEventListener("change", () => {
    sessionStorage.setItem(KEY_STORE, getKey());
    readModels();
  });
  at("form").addEventListener("submit", send);
  at("stop").addEventListener("click", () => running?.abort());
  at("clear").addEventListener("click", clear);
  at("mode").addEventListener("change", () => {
    clear();
    at("system-field").hidden = !isChat();
    at("prompt-label").textContent = isChat() ? "Message" : "Prompt";
  });
  at("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) send(event);
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") running?.abort();
  });
  readModels();
  setInterval(() => at("model").options.length || readModels(), 3000);
  new LoadPanel(at("load-note"), at("charts"), getKey).start();
}

start();
