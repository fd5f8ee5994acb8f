//! A small app for tests: a Python server of one file, and its manifest.

use serde_json::{Value, json};

/// Answers every GET with the content of `message`, or of `$MESSAGE` where that is set, and `/healthz` with
/// 200 unless a file `unhealthy` is beside it. Ends on SIGTERM after the requests that are in flight.
pub const SERVER: &str = r#"
import http.server, os, signal, socketserver, sys, threading

here = os.path.dirname(os.path.abspath(__file__))
message = os.environ.get("MESSAGE") or open(os.path.join(here, "message")).read()

class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    def do_GET(self):
        status = 200
        if self.path == "/healthz" and os.path.exists(os.path.join(here, "unhealthy")):
            status = 500
        body = message.encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *args):
        pass

class Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    request_queue_size = 128

server = Server(("127.0.0.1", int(os.environ["PORT"])), Handler)
signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
server.serve_forever()
"#;

/// The files of the app, saying `message`.
pub fn files(message: &str) -> Vec<(&'static str, &str)> {
    vec![("server.py", SERVER), ("message", message)]
}

/// A manifest for every node, with the test's own timings: short ones.
pub fn manifest(name: &str, url: &str, host: &str) -> Value {
    json!({
        "apiVersion": "kari.dev/v1alpha1",
        "kind": "Deployment",
        "metadata": {"name": name},
        "spec": {
            "placement": {"nodeSelector": {}},
            "source": {"git": {"url": url, "intervalSeconds": 3600}},
            "processes": [{
                "name": "web",
                "command": ["python3", "server.py"],
                "port": {"env": "PORT"},
                "readinessProbe": {"httpGet": {"path": "/healthz"}, "failureThreshold": 20},
                "terminationGracePeriodSeconds": 5,
                "route": {"hosts": [host]},
            }],
            "strategy": {"minReadySeconds": 1},
        },
    })
}

/// The manifest with a build script.
pub fn with_build(mut manifest: Value, run: &str) -> Value {
    manifest["spec"]["build"] = json!({"run": run, "network": false, "timeoutSeconds": 60});
    manifest
}
