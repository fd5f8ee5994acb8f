//! The connection's watcher: signals in, events out, a lost bus found again.

use std::collections::BTreeSet;
use std::ops::ControlFlow;
use std::time::Duration;

use futures::{StreamExt, stream};
use tokio::sync::{broadcast, mpsc, watch};
use zbus::{MatchRule, MessageStream, OwnedObjectPath, message};
use zbus_systemd::systemd1::ManagerProxy;

use super::{CALL_LIMIT, HostEvent, JobEnd, Manager, bounded};

/// Before the first and before a later attempt to find a lost bus again.
const RECONNECT_DELAYS: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// Units that are marked one by one while the reader is away; above it, everything is.
const MARKED_UNITS: usize = 4096;

/// A connection with its signals.
pub(super) struct Session {
    pub(super) manager: Manager,
    signals: stream::SelectAll<MessageStream>,
}

impl Session {
    /// Connects, adds the matches, subscribes: in this order, or signals are missed.
    pub(super) async fn open(address: Option<&str>) -> zbus::Result<Self> {
        let builder = match address {
            Some(address) => zbus::connection::Builder::address(address),
            None => zbus::connection::Builder::system(),
        };
        let connection = builder.build().await?;
        let manager_signal = |member| {
            MatchRule::builder()
                .msg_type(message::Type::Signal)
                .sender("org.freedesktop.systemd1")
                .path("/org/freedesktop/systemd1")
                .interface("org.freedesktop.systemd1.Manager")
                .member(member)
                .build()
        };
        let rules = [
            manager_signal("JobRemoved")?,
            manager_signal("UnitRemoved")?,
            manager_signal("Reloading")?,
            MatchRule::builder()
                .msg_type(message::Type::Signal)
                .sender("org.freedesktop.systemd1")
                .path_namespace(UNIT_PATHS)
                .interface("org.freedesktop.DBus.Properties")
                .member("PropertiesChanged")
                .build()?,
            MatchRule::builder()
                .msg_type(message::Type::Signal)
                .sender("org.freedesktop.DBus")
                .interface("org.freedesktop.DBus")
                .member("NameOwnerChanged")
                .add_arg("org.freedesktop.systemd1")
                .build()?,
        ];
        let mut signals = stream::SelectAll::new();
        for rule in rules {
            signals.push(MessageStream::for_match_rule(rule, &connection, None).await?);
        }
        let proxy = ManagerProxy::builder(&connection)
            .cache_properties(zbus::proxy::CacheProperties::No)
            .build()
            .await?;
        proxy.subscribe().await?;
        Ok(Self {
            manager: Manager { connection, proxy },
            signals,
        })
    }
}

/// The parent of all units' object paths.
const UNIT_PATHS: &str = "/org/freedesktop/systemd1/unit";

/// Turns signals into events, and keeps the connection.
pub(super) struct Watcher {
    /// Where the bus is; the system bus at its usual place if absent.
    pub(super) address: Option<String>,
    /// The connection of the moment, for the callers.
    pub(super) manager: watch::Sender<Option<Manager>>,
    /// Ends of jobs, for whoever waits for one.
    pub(super) jobs: broadcast::Sender<JobEnd>,
    /// Where events go.
    pub(super) events: mpsc::Sender<HostEvent>,
    /// Those that wait.
    pub(super) marked: Marked,
}

/// What the reader has not yet been told.
#[derive(Default)]
pub(super) struct Marked {
    everything: bool,
    units: BTreeSet<String>,
}

impl Marked {
    fn mark(&mut self, unit: &str) {
        if self.everything || !unit.starts_with("kari") {
            return;
        }
        if self.units.len() >= MARKED_UNITS {
            self.mark_everything();
        } else {
            self.units.insert(unit.to_owned());
        }
    }
    fn mark_everything(&mut self) {
        self.everything = true;
        self.units.clear();
    }
    fn is_empty(&self) -> bool {
        !self.everything && self.units.is_empty()
    }
    fn take(&mut self) -> Option<HostEvent> {
        if std::mem::take(&mut self.everything) {
            return Some(HostEvent::Everything);
        }
        self.units.pop_first().map(HostEvent::Unit)
    }
}

impl Watcher {
    pub(super) async fn run(mut self, first: Session) {
        let mut session = first;
        loop {
            self.marked.mark_everything();
            if self.watch(&mut session).await.is_break() {
                return;
            }
            self.manager.send_replace(None);
            tracing::warn!("the connection to the system bus is lost; making it again");
            session = match self.reopen().await {
                Some(session) => session,
                None => return,
            };
            tracing::info!("connected to the system bus again");
            self.manager.send_replace(Some(session.manager.clone()));
        }
    }

    /// Turns signals into events until the connection ends, or breaks when nobody reads them.
    async fn watch(&mut self, session: &mut Session) -> ControlFlow<()> {
        let events = self.events.clone();
        loop {
            tokio::select! {
                signal = session.signals.next() => match signal {
                    Some(Ok(signal)) => self.note(&signal),
                    Some(Err(_)) | None => return ControlFlow::Continue(()),
                },
                permit = events.reserve(), if !self.marked.is_empty() => match (permit, self.marked.take()) {
                    (Ok(permit), Some(event)) => permit.send(event),
                    (Ok(_), None) => {}
                    (Err(_), _) => return ControlFlow::Break(()),
                },
                () = events.closed() => return ControlFlow::Break(()),
            }
        }
    }

    fn note(&mut self, signal: &message::Message) {
        let header = signal.header();
        match header.member().map(|member| member.as_str()) {
            Some("JobRemoved") => {
                if let Ok((_, job, unit, result)) =
                    signal
                        .body()
                        .deserialize::<(u32, OwnedObjectPath, String, String)>()
                {
                    self.marked.mark(&unit);
                    // An error says that nobody waits for a job.
                    let _ = self.jobs.send(JobEnd { job, result });
                }
            }
            Some("UnitRemoved") => {
                if let Ok((unit, _)) = signal.body().deserialize::<(String, OwnedObjectPath)>() {
                    self.marked.mark(&unit);
                }
            }
            Some("PropertiesChanged") => {
                let label = header
                    .path()
                    .and_then(|path| path.as_str().strip_prefix(UNIT_PATHS));
                if let Some(label) = label.and_then(|label| label.strip_prefix('/')) {
                    self.marked.mark(&zbus_systemd::bus_label_unescape(label));
                }
            }
            // `Reloading(false)`: done. `Reloading(true)` is marked too; looking twice is cheap.
            Some("Reloading" | "NameOwnerChanged") => self.marked.mark_everything(),
            Some(_) | None => {}
        }
    }

    /// Connects again, with growing delays; nothing when nobody reads events any more.
    async fn reopen(&self) -> Option<Session> {
        let (mut delay, longest) = RECONNECT_DELAYS;
        loop {
            tokio::select! {
                () = tokio::time::sleep(delay) => {}
                () = self.events.closed() => return None,
            }
            match bounded(
                "Subscribe",
                "",
                CALL_LIMIT,
                Session::open(self.address.as_deref()),
            )
            .await
            {
                Ok(session) => return Some(session),
                Err(error) => tracing::debug!(%error, "the system bus is still away"),
            }
            delay = (delay * 2).min(longest);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken(marked: &mut Marked) -> Vec<HostEvent> {
        std::iter::from_fn(|| marked.take()).collect()
    }

    #[test]
    fn marks_of_one_unit_are_one_event_and_other_peoples_units_are_none() {
        let mut marked = Marked::default();
        for unit in [
            "kari.b.service",
            "sshd.service",
            "kari.a.service",
            "kari.b.service",
        ] {
            marked.mark(unit);
        }
        let unit = |name: &str| HostEvent::Unit(name.to_owned());
        assert_eq!(
            taken(&mut marked),
            [unit("kari.a.service"), unit("kari.b.service")]
        );
        assert!(marked.is_empty());
    }

    #[test]
    fn everything_stands_for_each_and_what_comes_later_is_told_too() {
        let mut marked = Marked::default();
        marked.mark("kari.a.service");
        marked.mark_everything();
        marked.mark("kari.b.service");
        assert_eq!(taken(&mut marked), [HostEvent::Everything]);
        marked.mark("kari.c.service");
        assert_eq!(
            taken(&mut marked),
            [HostEvent::Unit("kari.c.service".to_owned())]
        );
    }

    #[test]
    fn a_reader_that_stays_away_costs_a_bounded_amount() {
        let mut marked = Marked::default();
        for number in 0..=MARKED_UNITS {
            marked.mark(&format!("kari.{number}.service"));
        }
        assert_eq!(taken(&mut marked), [HostEvent::Everything]);
    }
}
