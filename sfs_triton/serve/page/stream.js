// Requests to the server. URLs are relative, so that the page also works below a prefix that a proxy adds.

/** An answer other than a completion, before a stream or inside one. */
export class Refused extends Error {
  constructor(status, error) {
    super(error?.message ?? `the server answered ${status}`);
    this.status = status;
    this.param = error?.param ?? null;
    this.code = error?.code ?? null;
  }
}

/** The card of the one model that is served. */
export async function model(key) {
  const response = await fetch("v1/models", { headers: headers(key), cache: "no-store" });
  await check(response);
  return (await response.json()).data[0];
}

/** The chunks of a streamed answer. Aborting `signal` closes the connection, and the server frees the row. */
export async function* ask(body, key, signal) {
  const response = await fetch("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json", ...headers(key) },
    body: JSON.stringify(body),
    signal,
  });
  await check(response);
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Refused(response.status, chunk.error);
    yield chunk;
  }
  throw new Error("the connection was lost before the answer was complete");
}

function headers(key) {
  return key ? { Authorization: `Bearer ${key}` } : {};
}

async function check(response) {
  if (response.ok) return;
  const body = await response.json().catch(() => null); // a proxy's page, say
  throw new Refused(response.status, body?.error);
}

/** The data of server-sent events; comments, which keep a silent stream open, are passed over. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      for (const part of parts) {
        if (part.startsWith("data: ")) yield part.slice("data: ".length);
      }
    }
  } finally { // whoever stops reading lets go of the connection, and so of the row
    reader.cancel().catch(() => null);
  }
}
