// SPDX-License-Identifier: Apache-2.0
// The gateway's API: JSON, and answers that come as server-sent events.

export class ApiError extends Error {
  constructor(message, { status = 0, code = null, requestId = null } = {}) {
    super(message);
    Object.assign(this, { status, code, requestId });
  }
}

function headers(key) {
  return key ? { authorization: `Bearer ${key}` } : {};
}

async function failure(response) {
  const body = await response.json().catch(() => ({}));
  const error = body.error ?? {};
  const wait = response.headers.get("retry-after");
  const hint = wait && response.status !== 401 ? ` (try again in ${wait} s)` : "";
  return new ApiError(`${error.message ?? response.statusText}${hint}`, {
    status: response.status, code: error.code, requestId: error.request_id,
  });
}

export async function getJson(path, key) {
  const response = await fetch(path, { headers: headers(key) });
  if (!response.ok) throw await failure(response);
  return response.json();
}

// Yields the data of each event until [DONE]. A stream that ends without it was cut off.
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new ApiError("the connection was lost before the answer was complete");
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const data = block.split("\n").filter((line) => line.startsWith("data: ")).map((line) => line.slice(6)).join("\n");
      if (data === "[DONE]") return;
      if (data) yield JSON.parse(data);
    }
  }
}

// Yields { text, finishReason, numTokens } as the answer grows; `numTokens` counts from its start.
export async function* generate(path, request, key, signal) {
  const response = await fetch(path, {
    method: "POST",
    headers: { "content-type": "application/json", ...headers(key) },
    body: JSON.stringify({
      ...request, stream: true, stream_options: { include_usage: true, continuous_usage_stats: true },
    }),
    signal,
  });
  if (!response.ok) throw await failure(response);
  for await (const event of events(response.body)) {
    if (event.error) {
      throw new ApiError(event.error.message, { code: event.error.code, requestId: event.error.request_id });
    }
    const choice = event.choices?.[0];
    yield {
      text: choice?.delta?.content ?? choice?.text ?? "",
      finishReason: choice?.finish_reason ?? null,
      numTokens: event.usage?.completion_tokens ?? null,
    };
  }
}
