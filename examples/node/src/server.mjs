// Answers with a greeting and says which commit is running and where.
import { createServer } from "node:http";
import page from "./page.mjs";

// No caller may hold a connection for longer than this with /slow.
const LONGEST_SLOW_MILLISECONDS = 10_000;

export function makeServer({ greeting, commit, node }) {
  return createServer((request, response) => {
    const target = new URL(request.url, "http://localhost");
    if (target.pathname === "/") {
      const values = { greeting, node, commit: commit.slice(0, 7) };
      const html = page.replace(/{{(\w+)}}/g, (_, name) => escape(values[name]));
      answer(response, 200, html, "text/html; charset=utf-8");
    } else if (target.pathname === "/healthz") {
      answer(response, 200, "ok\n");
    } else if (target.pathname === "/version") {
      answer(response, 200, JSON.stringify({ commit, node }) + "\n", "application/json");
    } else if (target.pathname === "/slow") {
      slow(response, target.searchParams.get("milliseconds"));
    } else {
      answer(response, 404, "not found\n");
    }
  });
}

// Stands for real work: a request that is in flight for a while.
function slow(response, milliseconds) {
  if (!/^\d{1,5}$/.test(milliseconds ?? "") || Number(milliseconds) > LONGEST_SLOW_MILLISECONDS) {
    answer(response, 400, "milliseconds must be a number from 0 to 10000\n");
    return;
  }
  setTimeout(() => answer(response, 200, "done\n"), Number(milliseconds));
}

function answer(response, status, text, type = "text/plain; charset=utf-8") {
  response.writeHead(status, { "Content-Type": type, "Content-Length": Buffer.byteLength(text) });
  response.end(text);
}

function escape(text) {
  return text.replace(/[&<>"]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[c]);
}
