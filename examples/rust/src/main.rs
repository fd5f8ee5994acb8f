//! Hello answers with a greeting and says which commit is running and where.
//!
//! Configuration comes from the environment: PORT is set by Kari, GREETING by
//! the manifest. The standard library has no signal handling, so SIGTERM ends
//! the process at once; Kari has moved the traffic away and waited for the
//! requests in flight before it sends one.

use std::env;
use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::net::{TcpListener, TcpStream};
use std::process::exit;
use std::thread;
use std::time::Duration;

/// A client that says nothing for this long is not waited for.
const IDLE: Duration = Duration::from_secs(30);
/// The longest request line or header that is read.
const LONGEST_LINE: u64 = 8 * 1024;
/// No caller may hold a connection for longer than this with /slow.
const LONGEST_SLOW: u64 = 10_000;

fn main() {
    let Some(port) = env::var("PORT")
        .ok()
        .and_then(|port| port.parse::<u16>().ok())
    else {
        eprintln!("PORT is not set: run as PORT=8080 ./hello");
        exit(2);
    };
    let listener = TcpListener::bind(("127.0.0.1", port)).unwrap_or_else(|error| {
        eprintln!("port {port}: {error}");
        exit(1);
    });
    println!("listening on 127.0.0.1:{port}");
    for stream in listener.incoming().flatten() {
        thread::spawn(move || {
            if let Err(error) = serve(&stream) {
                let gone = matches!(
                    error.kind(),
                    ErrorKind::WouldBlock | ErrorKind::BrokenPipe | ErrorKind::ConnectionReset
                );
                if !gone {
                    eprintln!("a connection: {error}");
                }
            }
        });
    }
}

/// Answers one request after the other until the client goes.
fn serve(stream: &TcpStream) -> std::io::Result<()> {
    stream.set_read_timeout(Some(IDLE))?;
    stream.set_nodelay(true)?;
    let mut reader = BufReader::new(stream);
    while let Some(request) = read_line(&mut reader)? {
        while read_line(&mut reader)?.is_some_and(|header| !header.is_empty()) {}
        let path = request.split(' ').nth(1).unwrap_or("/");
        let (status, kind, body) = answer(path);
        let head = format!(
            "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        let mut writer = stream;
        writer.write_all((head + &body).as_bytes())?;
    }
    Ok(())
}

fn read_line(reader: &mut impl BufRead) -> std::io::Result<Option<String>> {
    let mut line = String::new();
    let read = std::io::Read::take(&mut *reader, LONGEST_LINE).read_line(&mut line)?;
    Ok((read > 0).then(|| line.trim_end().to_owned()))
}

fn answer(path: &str) -> (&'static str, &'static str, String) {
    const PLAIN: &str = "text/plain";
    let (path, query) = path.split_once('?').unwrap_or((path, ""));
    match path {
        "/" => {
            let commit = variable("KARI_COMMIT", "unknown");
            let text = format!(
                "{} from Rust on {}, commit {}\n",
                variable("GREETING", "Hello"),
                variable("KARI_NODE", "this machine"),
                commit.get(..7).unwrap_or(&commit),
            );
            ("200 OK", PLAIN, text)
        }
        "/healthz" => ("200 OK", PLAIN, "ok\n".to_owned()),
        "/version" => {
            let text = format!(
                "{{\"commit\":\"{}\",\"node\":\"{}\"}}\n",
                variable("KARI_COMMIT", "unknown"),
                variable("KARI_NODE", "unknown"),
            );
            ("200 OK", "application/json", text)
        }
        // Stands for real work: a request that is in flight for a while.
        "/slow" => match query
            .strip_prefix("milliseconds=")
            .and_then(|n| n.parse().ok())
        {
            Some(milliseconds) if milliseconds <= LONGEST_SLOW => {
                thread::sleep(Duration::from_millis(milliseconds));
                ("200 OK", PLAIN, "done\n".to_owned())
            }
            _ => (
                "400 Bad Request",
                PLAIN,
                "milliseconds must be a number from 0 to 10000\n".to_owned(),
            ),
        },
        _ => ("404 Not Found", PLAIN, "not found\n".to_owned()),
    }
}

fn variable(name: &str, fallback: &str) -> String {
    env::var(name)
        .ok()
        .filter(|value| !value.is_empty())
        .unwrap_or_else(|| fallback.to_owned())
}
