//! What an answer of the proxy's proves. Pure.

use super::RouteTarget;
use super::configuration::ANSWERED_BY_HEADER;
use crate::agent::host::probe::Answer;

/// Whether an answer is that of the release, or why not. To a request for the identity of a vhost.
pub(super) fn names(answer: &Answer, expected: &str) -> Result<(), String> {
    let said = String::from_utf8_lossy(&answer.body);
    if answer.status == 200 && said.trim_end() == expected {
        Ok(())
    } else {
        Err(format!(
            "it was answered with status {} and {:?}, not with {expected}",
            answer.status,
            shown(&said)
        ))
    }
}

/// Whether an answer came from whom the route names, or why not.
pub(super) fn came_from(answer: &Answer, target: RouteTarget) -> Result<(), String> {
    let header = answer
        .headers
        .get(ANSWERED_BY_HEADER)
        .and_then(|value| value.to_str().ok())
        .unwrap_or_default();
    match (target, answerer(header)) {
        // The proxy's own, without asking anybody.
        (RouteTarget::Unavailable | RouteTarget::Paused { .. }, _)
            if answer.status == 503 && header.is_empty() =>
        {
            Ok(())
        }
        (RouteTarget::Unavailable | RouteTarget::Paused { .. }, _) => Err(format!(
            "it was answered with status {} from {header:?}, not with 503 by the proxy",
            answer.status
        )),
        (RouteTarget::Port { primary, .. }, Some(port)) if port == primary => Ok(()),
        (RouteTarget::Port { primary, .. }, Some(port)) => {
            Err(format!("port {port} answered it, not port {primary}"))
        }
        (RouteTarget::Port { primary, .. }, None) => Err(format!(
            "port {primary} did not answer it: the proxy says status {}",
            answer.status
        )),
    }
}

/// The port that an answer's header came from, out of `$upstream_addr;$upstream_header_time`. Each part
/// lists every server that was tried, the last one being the one whose answer counts; its time is `-`
/// if none came.
fn answerer(header: &str) -> Option<u16> {
    let (addresses, times) = header.split_once(';')?;
    let last = |list: &str| {
        list.rsplit([',', ' '])
            .next()
            .unwrap_or_default()
            .to_owned()
    };
    let (address, time) = (last(addresses), last(times));
    if time.is_empty() || time == "-" {
        return None;
    }
    address.rsplit_once(':')?.1.parse().ok()
}

/// Little enough for a message.
fn shown(text: &str) -> String {
    text.trim_end().chars().take(80).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_server_that_gave_a_header_answered() {
        for (header, port) in [
            ("127.0.0.1:20001;0.004", Some(20001)),
            ("127.0.0.1:20001, 127.0.0.1:20000;-, 0.004", Some(20000)),
            ("127.0.0.1:20001;-", None),
            ("127.0.0.1:20001, 127.0.0.1:20000;-, -", None),
            (";", None),
            ("", None),
        ] {
            assert_eq!(answerer(header), port, "{header}");
        }
    }

    #[test]
    fn a_route_is_in_force_only_if_its_own_target_answers() {
        let answer = |status, header: &str| {
            let mut headers = hyper::HeaderMap::new();
            let value = header.parse().unwrap_or_else(|e| panic!("{header}: {e}"));
            headers.insert(ANSWERED_BY_HEADER, value);
            Answer {
                status,
                headers,
                body: hyper::body::Bytes::new(),
            }
        };
        let port = RouteTarget::Port {
            primary: 20001,
            backup: Some(20000),
        };
        assert_eq!(
            came_from(&answer(404, "127.0.0.1:20001;0.001"), port),
            Ok(())
        );
        assert!(
            came_from(
                &answer(200, "127.0.0.1:20001, 127.0.0.1:20000;-, 0.001"),
                port
            )
            .is_err()
        );
        assert!(came_from(&answer(502, "127.0.0.1:20001;-"), port).is_err());
        assert!(came_from(&answer(200, ""), port).is_err());
        assert_eq!(
            came_from(&answer(503, ""), RouteTarget::Unavailable),
            Ok(())
        );
        for (status, header) in [
            (200, "127.0.0.1:20001;0.001"),
            // A process was asked, and was not there.
            (503, "127.0.0.1:20001;-"),
        ] {
            assert!(came_from(&answer(status, header), RouteTarget::Unavailable).is_err());
        }
    }
}
