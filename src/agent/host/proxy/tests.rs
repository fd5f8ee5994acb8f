use std::path::Path;

use proptest::prelude::*;

use super::configuration::render_virtual_host;
use super::control::hosts_of;
use super::reload::{Worker, has_settled, worker};
use super::*;

fn app(name: &str) -> AppName {
    AppName::parse(name).unwrap_or_else(|e| panic!("{e}"))
}

fn host(name: &str) -> HostName {
    HostName::parse(name).unwrap_or_else(|e| panic!("{e}"))
}

fn settings() -> ProxySettings {
    ProxySettings {
        http_port: 8080,
        nginx: "/usr/sbin/nginx".into(),
        ipv6: false,
        processors: 2,
    }
}

fn shop(target: RouteTarget) -> VirtualHost {
    VirtualHost {
        app: app("web.shop"),
        release_id: ReleaseId(uuid::Uuid::from_u128(7)),
        routes: vec![Route {
            process: "web".into(),
            hosts: vec![host("shop.test"), host("*.shop.test")],
            target,
            measured_path: "/".into(),
        }],
    }
}

#[test]
fn a_host_is_a_dns_name_and_nothing_that_nginx_takes_for_more() {
    let long = format!("{}.test", vec!["a".repeat(49); 5].join("."));
    assert_eq!(long.len(), 254);
    for good in [
        "a",
        "a.test",
        "*.a.test",
        "xn--bcher-kva.example",
        "1.2.3.4",
        "a-b.c",
        &long[1..],
    ] {
        assert!(HostName::parse(good).is_ok(), "{good}");
    }
    let label = "a".repeat(64);
    for bad in [
        "",
        ".",
        "*",
        "*.",
        "a.",
        ".a",
        "a..b",
        "A.test",
        "a.test; return 200 x",
        "~^.*$",
        "$host",
        "a}",
        "a b",
        "\"a\"",
        "a\n",
        "a_b.test",
        "*.*.a",
        "a.*",
        "-a.test",
        "a-.test",
        "ü.test",
        "a.test:80",
        "_",
        &label,
        &long,
    ] {
        assert!(HostName::parse(bad).is_err(), "{bad}");
    }
}

#[test]
fn the_old_port_is_a_backup_only_while_there_is_one() {
    let text = |backup| {
        render_virtual_host(
            &shop(RouteTarget::Port {
                primary: 20001,
                backup,
            }),
            &settings(),
            Path::new("/proxy"),
        )
    };
    assert!(text(Some(20000)).contains("server 127.0.0.1:20000 max_fails=0 backup;"));
    assert!(!text(None).contains("backup"));
    // A process that is not touched keeps its port: it is no backup of itself, which nginx would ask twice.
    assert!(!text(Some(20001)).contains("backup"));
    let stopped = render_virtual_host(
        &shop(RouteTarget::Unavailable),
        &settings(),
        Path::new("/proxy"),
    );
    assert!(
        stopped.contains("return 503") && !stopped.contains("upstream"),
        "{stopped}"
    );
}

#[test]
fn going_on_from_a_pause_changes_no_text_and_so_takes_no_reload() {
    let text = |target| render_virtual_host(&shop(target), &settings(), Path::new("/proxy"));
    let paused = text(RouteTarget::Paused { primary: 20001 });
    let port = |primary| RouteTarget::Port {
        primary,
        backup: None,
    };
    assert_eq!(paused, text(port(20001)));
    // What serves until the reload looks for another file.
    assert!(paused.contains("/proxy/paused/web.shop.web.20001)"));
    assert!(!text(port(20000)).contains("/proxy/paused/web.shop.web.20001)"));
}

#[test]
fn a_file_tells_its_hosts_again() {
    let text = render_virtual_host(
        &shop(RouteTarget::Unavailable),
        &settings(),
        Path::new("/proxy"),
    );
    assert_eq!(hosts_of(&text), [host("shop.test"), host("*.shop.test")]);
}

#[test]
fn a_host_belongs_to_one_deployment_and_the_conflict_names_it() {
    let served = BTreeMap::from([
        (app("web.blog"), vec![host("blog.test")]),
        (
            app("web.shop"),
            vec![host("shop.test"), host("old.shop.test")],
        ),
    ]);
    let wanted = [host("shop.test"), host("blog.test"), host("new.test")];
    let conflicts = route_conflicts(&app("web.shop"), &wanted, &served);
    assert_eq!(conflicts, [(&host("blog.test"), &app("web.blog"))]);
    assert_eq!(route_conflicts(&app("web.new"), &wanted, &served).len(), 2);
}

#[test]
fn a_reload_has_settled_when_only_new_workers_accept_connections() {
    use Worker::{Retiring, Serving};
    let set = |workers: &[(u32, Worker)]| workers.iter().copied().collect::<BTreeMap<_, _>>();
    let before = set(&[(10, Serving), (11, Serving), (5, Retiring)]);
    for (now, settled) in [
        (vec![(10, Serving), (11, Serving)], false),
        (vec![(10, Serving), (11, Retiring), (12, Serving)], false),
        (vec![(10, Retiring), (11, Retiring)], false),
        (vec![(10, Retiring), (11, Retiring), (12, Serving)], true),
        (vec![(12, Serving), (13, Serving)], true),
        (vec![], false),
    ] {
        assert_eq!(has_settled(&before, &set(&now)), settled, "{now:?}");
    }
    assert_eq!(worker("nginx: master process /usr/sbin/nginx -c x"), None);
    assert_eq!(worker("nginx: worker process"), Some(Serving));
    assert_eq!(
        worker("\"nginx: worker process is shutting down\""),
        Some(Retiring)
    );
}

proptest! {
    #[test]
    fn no_accepted_host_holds_a_character_that_nginx_reads_as_more_than_a_name(text in "\\PC{0,40}") {
        if let Ok(host) = HostName::parse(&text) {
            prop_assert!(host.as_str().bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'.' | b'-' | b'*')));
            prop_assert_eq!(host.as_str().matches('*').count(), usize::from(text.starts_with("*.")));
        }
    }
}
