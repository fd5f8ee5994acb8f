use super::*;
use crate::api::deployment::HttpHeader;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

/// Answers one connection with `answer`, and gives back what it was asked.
async fn serve(answer: &'static str) -> (u16, JoinHandle<String>) {
    let listener = TcpListener::bind(("127.0.0.1", 0))
        .await
        .unwrap_or_else(|e| panic!("{e}"));
    let port = listener
        .local_addr()
        .map(|a| a.port())
        .unwrap_or_else(|e| panic!("{e}"));
    let asked = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap_or_else(|e| panic!("{e}"));
        let mut asked = vec![0; 4096];
        let length = stream
            .read(&mut asked)
            .await
            .unwrap_or_else(|e| panic!("{e}"));
        stream
            .write_all(answer.as_bytes())
            .await
            .unwrap_or_else(|e| panic!("{e}"));
        if answer.is_empty() {
            // Stays silent, for as long as the other side wants to wait.
            let _ = stream.read(&mut [0]).await;
        }
        String::from_utf8_lossy(&asked[..length]).into_owned()
    });
    (port, asked)
}

fn check_of(headers: &[(&str, &str)], route_host: Option<&str>) -> Check {
    let get = HttpGet {
        path: "/healthz?full=1".into(),
        http_headers: headers
            .iter()
            .map(|(name, value)| HttpHeader {
                name: (*name).into(),
                value: (*value).into(),
            })
            .collect(),
    };
    Check::new(Some(&get), seconds(1), route_host)
}

async fn outcome(answer: &'static str) -> Result<(), ProbeError> {
    let (port, _) = serve(answer).await;
    check(&check_of(&[], None), port).await
}

#[tokio::test]
async fn a_status_from_200_to_399_is_a_success_and_a_redirect_is_not_followed() {
    for good in [
        "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
        "HTTP/1.1 204 No Content\r\n\r\n",
        "HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n",
        "HTTP/1.0 200 OK\r\n\r\nuntil the end",
    ] {
        assert_eq!(outcome(good).await, Ok(()), "{good}");
    }
    let bad = outcome(
        "HTTP/1.1 503 Service Unavailable\r\nContent-Length: 16\r\n\r\nno\ndatabase\x1b[0m!",
    )
    .await;
    let message = bad.map_err(|error| error.to_string());
    assert_eq!(message, Err("GET /healthz?full=1 was answered with status 503, expected 200 to 399: no database [0m!".to_owned()));
}

#[tokio::test]
async fn a_wrong_protocol_silence_and_a_closed_port_each_have_their_error() {
    assert!(matches!(
        outcome("SSH-2.0-OpenSSH_9.2\r\n").await,
        Err(ProbeError::Http { .. })
    ));
    assert!(matches!(
        outcome("").await,
        Err(ProbeError::TimedOut { .. })
    ));
    let port = {
        let listener = TcpListener::bind(("127.0.0.1", 0))
            .await
            .unwrap_or_else(|e| panic!("{e}"));
        listener
            .local_addr()
            .map(|a| a.port())
            .unwrap_or_else(|e| panic!("{e}"))
    };
    assert!(matches!(
        check(&check_of(&[], None), port).await,
        Err(ProbeError::Connect { .. })
    ));
}

#[tokio::test]
async fn the_host_is_the_routes_unless_the_probe_sets_it() {
    const OK: &str = "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n";
    for (headers, route, host) in [
        (vec![], None, "127.0.0.1"),
        (vec![], Some("shop.test"), "shop.test"),
        (vec![], Some("*.shop.test"), "kari-probe.shop.test"),
        (
            vec![("host", "other.test")],
            Some("shop.test"),
            "other.test",
        ),
    ] {
        let (port, asked) = serve(OK).await;
        assert_eq!(check(&check_of(&headers, route), port).await, Ok(()));
        let asked = asked
            .await
            .unwrap_or_else(|e| panic!("{e}"))
            .to_ascii_lowercase();
        assert!(
            asked.starts_with("get /healthz?full=1 http/1.1\r\n"),
            "{asked}"
        );
        assert!(asked.contains(&format!("\r\nhost: {host}\r\n")), "{asked}");
        assert_eq!(asked.matches("\r\nhost:").count(), 1, "{asked}");
    }
}

#[tokio::test]
async fn an_accepted_connection_is_all_that_tcp_asks_for() {
    let (port, _) = serve("nothing of interest").await;
    let tcp = Check {
        target: Target::Tcp,
        timeout: Duration::from_secs(1),
    };
    assert_eq!(check(&tcp, port).await, Ok(()));
}

fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn failed() -> ProbeError {
    ProbeError::TimedOut {
        port: 1,
        after: seconds(1),
    }
}

#[test]
fn thresholds_count_in_a_row_and_a_verdict_holds_until_the_other_threshold() {
    let timings = Timings {
        initial_delay: seconds(5),
        period: seconds(2),
        success_threshold: 2,
        failure_threshold: 3,
    };
    let mut readiness = Checks::new(timings, seconds(100));
    assert_eq!(readiness.next_check(), seconds(105));
    // (succeeds, verdict after it)
    let history = [
        (false, Verdict::Waiting),
        (false, Verdict::Waiting),
        (true, Verdict::Waiting),
        (false, Verdict::Waiting),
        (true, Verdict::Waiting),
        (true, Verdict::Ready),
        (false, Verdict::Ready),
        (false, Verdict::Ready),
        (true, Verdict::Ready),
        (false, Verdict::Ready),
        (false, Verdict::Ready),
        (false, Verdict::Failed(failed())),
        (true, Verdict::Failed(failed())),
        (true, Verdict::Ready),
    ];
    let mut now = seconds(105);
    for (at, (succeeds, verdict)) in history.into_iter().enumerate() {
        readiness.record(now, if succeeds { Ok(()) } else { Err(failed()) });
        assert_eq!(readiness.verdict(), &verdict, "after check {at}");
        assert_eq!(
            readiness.last_error().is_none(),
            succeeds,
            "after check {at}"
        );
        assert_eq!(readiness.next_check(), now + seconds(2));
        now += seconds(2);
    }
}
