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

fn path(text: &str) -> RoutePath {
    RoutePath::parse(text).unwrap_or_else(|e| panic!("{e}"))
}

fn route(process: &str, hosts: &[&str], at: &str, port: u16) -> Route {
    Route {
        process: process.into(),
        hosts: hosts.iter().map(|name| host(name)).collect(),
        path: path(at),
        target: RouteTarget::Port {
            primary: port,
            backup: None,
        },
        probe_path: None,
        certificate: None,
    }
}

fn settings() -> ProxySettings {
    ProxySettings {
        http_port: 8080,
        https_port: 8443,
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
            path: path("/"),
            target,
            probe_path: None,
            certificate: None,
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
fn a_path_is_whole_segments_and_nothing_that_nginx_takes_for_more() {
    let long = format!("/{}", "a".repeat(255));
    for good in [
        "/",
        "/a",
        "/api/v2.1",
        "/@me/~x/a_b-c+d:e",
        "/.well-known",
        "/.well-known/karix",
        &long,
    ] {
        assert!(RoutePath::parse(good).is_ok(), "{good}");
    }
    let too_long = format!("/{}", "a".repeat(256));
    for bad in [
        "",
        "a",
        "a/b",
        "//",
        "/a/",
        "/a//b",
        "/./a",
        "/a/..",
        "/a b",
        "/a;",
        "/a{",
        "/$a",
        "/\"a",
        "/'a",
        "/a\\b",
        "/a#b",
        "/a?b",
        "/a*",
        "/a%20b",
        "/ü",
        "/a\n",
        "/.well-known/kari",
        "/.well-known/kari/x",
        &too_long,
    ] {
        assert!(RoutePath::parse(bad).is_err(), "{bad}");
    }
    for (of, asked, fits) in [
        ("/api", "/api", true),
        ("/api", "/api/", true),
        ("/api", "/api/x", true),
        ("/api", "/apix", false),
        ("/api", "/", false),
        ("/", "/apix", true),
    ] {
        assert_eq!(path(of).matches(asked), fits, "{of} {asked}");
    }
}

#[test]
fn a_server_has_the_hosts_that_have_the_same_routes_and_refuses_other_paths() {
    let mut shop = shop(RouteTarget::Unavailable);
    shop.routes = vec![
        route("web", &["a.test", "b.test"], "/", 1),
        route("api", &["b.test", "a.test", "c.test"], "/api", 2),
    ];
    let text = render_virtual_host(&shop, &settings(), Path::new("/proxy"));
    let servers: Vec<&str> = text.split("\nserver {").skip(1).collect();
    assert_eq!(servers.len(), 2, "{text}");
    assert!(servers[0].contains("server_name a.test b.test;"), "{text}");
    assert!(servers[1].contains("server_name c.test;"), "{text}");
    for server in &servers {
        for location in [
            "location = /api {",
            "location /api/ {",
            "location @paused.api {",
        ] {
            assert_eq!(server.matches(location).count(), 1, "{text}");
        }
        assert_eq!(server.matches("location / {").count(), 1, "{text}");
    }
    assert!(
        !servers[0].contains("return 404 \"") && servers[1].contains("return 404 \""),
        "{text}"
    );
    // Each upstream once, whatever the servers that name it.
    assert_eq!(
        text.matches("upstream kari.web.shop.api {").count(),
        1,
        "{text}"
    );
}

#[test]
fn a_route_is_measured_by_its_probes_path_only_where_that_comes_to_it() {
    let probed = |at: &str, probe: &str| Route {
        probe_path: Some(probe.into()),
        ..route("web", &["a.test"], at, 1)
    };
    for (at, probe, others, asked) in [
        ("/", "/healthz", vec![], "/healthz"),
        ("/", "/healthz?deep=1", vec![], "/healthz?deep=1"),
        ("/api", "/healthz", vec![], "/api"),
        ("/api", "/api/healthz", vec![], "/api/healthz"),
        ("/", "/api/healthz", vec!["/api"], "/"),
        ("/api", "/api/healthz", vec!["/"], "/api/healthz"),
        ("/", "/%61pi", vec!["/api"], "/"),
        ("/", "/x/../api", vec!["/api"], "/"),
        ("/", "/.well-known/kari", vec![], "/"),
    ] {
        let route_of = probed(at, probe);
        let others: Vec<Route> = others
            .iter()
            .map(|at| route("other", &["a.test"], at, 2))
            .collect();
        let all: Vec<&Route> = others.iter().chain([&route_of]).collect();
        assert_eq!(measured_path(&route_of, &all), asked, "{at} {probe}");
    }
    assert_eq!(
        measured_path(&route("web", &["a.test"], "/x", 1), &[]),
        "/x"
    );
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

    #[test]
    fn no_accepted_path_holds_a_character_that_nginx_reads_as_more_than_a_path(text in "/[ -~ü]{0,12}") {
        if let Ok(path) = RoutePath::parse(&text) {
            prop_assert!(path.as_str().bytes().all(|b| b.is_ascii_alphanumeric() || b"/._~@:+-".contains(&b)));
            prop_assert!(!path.as_str().contains("//") && !path.as_str().contains("/../"));
        }
    }
}
