// Runs the service until SIGTERM. Configuration comes from the environment:
// PORT is set by Kari, GREETING by the manifest.
import { makeServer } from "./server.mjs";

const { PORT, GREETING = "Hello", KARI_COMMIT = "unknown", KARI_NODE = "this machine" } = process.env;
if (!/^\d+$/.test(PORT ?? "")) {
  console.error("PORT is not set: run as PORT=8080 node dist/main.mjs");
  process.exit(1);
}

const server = makeServer({ greeting: GREETING, commit: KARI_COMMIT, node: KARI_NODE });
// Longer than the proxy keeps an idle connection (60 s), so that it never sends
// a request into one that is being closed here; the default is 5 s.
server.keepAliveTimeout = 75_000;
server.listen(Number(PORT), "127.0.0.1", () => console.log(`listening on 127.0.0.1:${PORT}`));

function stop() {
  console.log("stopping: finishing the requests in flight");
  server.close(() => console.log("stopped")); // nothing is left to do then, so Node.js ends
  // Idle connections would keep the process up; those busy now are idle soon.
  setInterval(() => server.closeIdleConnections(), 100).unref();
}
process.once("SIGTERM", stop);
process.once("SIGINT", stop);
