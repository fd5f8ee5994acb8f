//! A host that does what steps say, in memory, and checks with each step that
//! nothing is done that must not be.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use jiff::Timestamp;
use uuid::Uuid;

use super::traffic::virtual_host;
use super::{CRASH_LOOP_RESTARTS, Plan, Progress, Step, plan};
use crate::agent::host::proxy::{HostName, RouteTarget, VirtualHost};
use crate::agent::host::records::{
    AppliedRecord, AttemptRecord, BuildKey, ContentDigest, EnvDigest, KeptRecord, ProcessRecord,
    RECORD_VERSION, RecordedFailure, ReleaseRecord, StepResult, Wish,
};
use crate::agent::host::unit;
use crate::agent::view::{
    Activity, BuildView, DrainView, FileView, Health, HeldUp, HostView, Observed, ServiceView,
    SlotView, SourceView, TargetView, VirtualHostView, Wanted,
};
use crate::api::deployment::Switch;
use crate::api::names::{AppName, Commit, ReleaseId, RevisionName};
use crate::api::reasons::Reason;
use crate::api::release::Template;

/// How a release behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Fate {
    #[default]
    Good,
    BuildFails,
    ToolMissing,
    NeverReady,
    CrashesBaking,
}

/// A wish in short: the id and the commit follow from `number`, the processes' content from the letters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Draft {
    pub number: u8,
    pub commit: u8,
    pub web: char,
    pub worker: char,
    pub routed: bool,
    pub recreate: bool,
}

pub fn draft(number: u8) -> Draft {
    Draft {
        number,
        commit: number,
        web: 'a',
        worker: 'a',
        routed: true,
        recreate: false,
    }
}

pub fn release_id(number: u8) -> ReleaseId {
    ReleaseId(Uuid::from_u128(u128::from(number)))
}

pub fn wish(draft: Draft) -> Wish {
    let route = draft
        .routed
        .then(|| serde_json::json!({"hosts": ["shop.test"]}));
    let mut web = serde_json::json!({"name": "web", "command": ["web", draft.web.to_string()], "port": {"env": "PORT"}});
    if let Some(route) = route {
        web["route"] = route;
    }
    let template: Template = serde_json::from_value(serde_json::json!({
        "source": {"url": "https://git.test/shop.git"},
        "build": {"run": "make"},
        "processes": [web, {"name": "worker", "command": ["worker", draft.worker.to_string()]}],
        "switch": if draft.recreate { "Recreate" } else { "BlueGreen" }, "minReadySeconds": 5, "keepReleases": 2,
    }))
    .unwrap();
    Wish {
        app: app(),
        deployment_uid: None,
        release_id: release_id(draft.number),
        attempt: 1,
        generation: 1,
        revision: RevisionName::new(format!("shop-{}", draft.number)),
        commit: Commit::parse(&format!("{:040x}", draft.commit)).unwrap(),
        template,
        retain: vec![],
        sealed: vec![],
    }
}

pub fn app() -> AppName {
    AppName::new("web", "shop").unwrap()
}

#[derive(Debug, Clone)]
struct Service {
    activity: Activity,
    since: Duration,
    restarts: u32,
}

/// A build unit.
#[derive(Debug, Clone)]
struct Build {
    view: BuildView,
    fate: Fate,
}

/// The whole host, what is durable of it and what is not.
#[derive(Debug, Clone)]
pub struct World {
    // Durable.
    pub attempt: Option<AttemptRecord>,
    pub applied: Option<AppliedRecord>,
    releases: Vec<ReleaseRecord>,
    pub files: BTreeMap<String, String>,
    pub target: Option<TargetView>,
    enabled: bool,
    trees: BTreeSet<BuildKey>,
    stages: BTreeSet<(BuildKey, u32)>,
    virtual_host_file: Option<VirtualHost>,
    has_files: bool,
    /// Unit files that an admin has deleted at some time.
    deleted: BTreeSet<String>,
    kept_state: Option<KeptRecord>,
    // Gone after a reboot.
    services: BTreeMap<String, Service>,
    builds: BTreeMap<String, Build>,
    proxy: Option<VirtualHost>,
    // Gone with the agent.
    in_force: Option<(VirtualHost, Duration)>,
    drain: DrainView,
    held_up: Option<HeldUp>,
    source_wanted: bool,
    // The surroundings.
    pub wanted: Wanted,
    pub fates: BTreeMap<u8, Fate>,
    /// The same by commit.
    pub commits: BTreeMap<Commit, Fate>,
    pub now: Duration,
    pub stolen: BTreeSet<u16>,
    pub proxy_down: bool,
    pub conflict: bool,
    pub slot: SlotView,
    next_port: u16,
    /// Every step that was done, in words.
    pub log: Vec<String>,
    /// Starts of build units.
    pub build_starts: u32,
}

const READY_AFTER: Duration = Duration::from_secs(1);
const DRAIN: Duration = Duration::from_secs(2);

impl World {
    pub fn new() -> Self {
        Self {
            attempt: None,
            applied: None,
            releases: vec![],
            files: BTreeMap::new(),
            target: None,
            enabled: false,
            trees: BTreeSet::new(),
            stages: BTreeSet::new(),
            virtual_host_file: None,
            has_files: false,
            deleted: BTreeSet::new(),
            kept_state: None,
            services: BTreeMap::new(),
            builds: BTreeMap::new(),
            proxy: None,
            in_force: None,
            drain: DrainView::Unknown,
            held_up: None,
            source_wanted: false,
            wanted: Wanted::Unknown,
            fates: BTreeMap::new(),
            commits: BTreeMap::new(),
            now: Duration::ZERO,
            stolen: BTreeSet::new(),
            proxy_down: false,
            conflict: false,
            slot: SlotView::Granted,
            next_port: 20000,
            log: vec![],
            build_starts: 0,
        }
    }

    // ---- What happens to it -----------------------------------------------

    pub fn want(&mut self, draft: Draft) {
        self.want_anew(Wanted::Release(Box::new(wish(draft))));
    }

    pub fn want_anew(&mut self, wanted: Wanted) {
        self.wanted = wanted;
        self.held_up = None;
    }

    pub fn remove(&mut self) {
        self.wanted = Wanted::Removal { keep_state: false };
        self.held_up = None;
    }

    /// kill -9 and a new start.
    pub fn restart_agent(&mut self) {
        self.in_force = None;
        self.drain = DrainView::Unknown;
        self.held_up = None;
        self.source_wanted = false;
        self.log.push("-- agent restarted".into());
    }

    pub fn reboot(&mut self) {
        self.restart_agent();
        self.builds.clear();
        self.services.clear();
        self.proxy = self.virtual_host_file.clone();
        if self.enabled
            && let Some(target) = self.target.clone()
        {
            for unit in target.units {
                if !self.files.contains_key(&unit) {
                    let by_an_admin = self.deleted.contains(&unit);
                    assert!(by_an_admin, "the boot starts {unit}, which has no file");
                    continue;
                }
                self.services.insert(
                    unit,
                    Service {
                        activity: Activity::Active,
                        since: self.now,
                        restarts: 0,
                    },
                );
            }
        }
        self.log.push("-- rebooted".into());
    }

    /// An admin stops a service.
    pub fn stop_a_service(&mut self) {
        if let Some(service) = self.services.values_mut().next() {
            service.activity = Activity::Inactive;
        }
        self.unload();
    }

    /// An admin deletes a unit file.
    pub fn delete_a_file(&mut self) {
        let deleted = self.files.pop_first();
        self.deleted.extend(deleted.map(|(unit, _)| unit));
        self.unload();
    }

    pub fn pass_time(&mut self, by: Duration) {
        self.now += by;
        for build in self
            .builds
            .values_mut()
            .filter(|build| build.view == BuildView::Running)
        {
            let result = |result: &str, status| StepResult {
                result: result.into(),
                code: 1,
                status,
            };
            build.view = BuildView::Ended(match build.fate {
                Fate::BuildFails => result("exit-code", 2),
                Fate::ToolMissing => result("exit-code", 127),
                Fate::Good | Fate::NeverReady | Fate::CrashesBaking => result("success", 0),
            });
        }
        let crashing: Vec<String> = self
            .attempt
            .iter()
            .filter(|attempt| attempt.outcome.is_none() && attempt.switching)
            .filter(|attempt| self.fate(&attempt.wish) == Fate::CrashesBaking)
            .flat_map(|attempt| attempt.processes.iter().map(|p| p.unit.clone()))
            .filter(|unit| !self.committed().iter().any(|p| p.unit == *unit))
            .collect();
        for unit in crashing {
            if let Some(service) = self.services.get_mut(&unit) {
                service.restarts += 1;
            }
        }
        self.services
            .retain(|_, service| service.activity != Activity::Deactivating);
        self.unload();
    }

    /// systemd forgets a unit that neither runs nor has a file.
    fn unload(&mut self) {
        let files = &self.files;
        self.services.retain(|unit, service| {
            service.activity != Activity::Inactive || files.contains_key(unit)
        });
    }

    fn fate(&self, wish: &Wish) -> Fate {
        let number = u8::try_from(wish.release_id.0.as_u128()).ok();
        let fate = number.and_then(|number| self.fates.get(&number));
        fate.or_else(|| self.commits.get(&wish.commit))
            .copied()
            .unwrap_or_default()
    }

    pub fn committed(&self) -> &[ProcessRecord] {
        self.applied
            .as_ref()
            .and_then(|applied| applied.release.as_ref())
            .map_or(&[], |release| &release.processes)
    }

    pub fn serving(&self) -> Option<ReleaseId> {
        self.applied
            .as_ref()
            .and_then(|applied| applied.release.as_ref())
            .map(|release| release.release_id)
    }

    // ---- What the planner sees --------------------------------------------

    pub fn observe(&self) -> Observed {
        let records = self
            .attempt
            .iter()
            .flat_map(|attempt| &attempt.processes)
            .chain(self.committed());
        let ports: BTreeMap<&str, Option<u16>> =
            records.map(|p| (p.unit.as_str(), p.port)).collect();
        let names: BTreeSet<&String> = self.services.keys().chain(self.files.keys()).collect();
        let services = names
            .into_iter()
            .map(|unit| {
                let service = self.services.get(unit);
                let view = ServiceView {
                    file: if self.files.contains_key(unit) {
                        FileView::Intact
                    } else {
                        FileView::Missing
                    },
                    activity: service.map_or(Activity::Inactive, |service| service.activity),
                    stale: false,
                    health: self.health(unit, ports.get(unit.as_str()).copied().flatten()),
                };
                (unit.clone(), view)
            })
            .collect();
        Observed {
            app: app(),
            now: self.now,
            wall: Timestamp::UNIX_EPOCH,
            wanted: self.wanted.clone(),
            attempt: self.attempt.clone(),
            applied: self.applied.clone(),
            host: HostView {
                services,
                builds: self
                    .builds
                    .iter()
                    .map(|(unit, build)| (unit.clone(), build.view.clone()))
                    .collect(),
                target: self.target.clone(),
                target_active: false,
                enabled: self.enabled,
                trees: self.trees.clone(),
                stage: self
                    .attempt
                    .as_ref()
                    .is_some_and(|a| self.stages.contains(&(a.build_key.clone(), a.build_try))),
                source: self.source_wanted.then_some(SourceView::Ready),
                slot: self.slot,
                virtual_host: VirtualHostView {
                    file: self.virtual_host_file.is_some(),
                    in_force: self.in_force.clone(),
                },
                drain: match self.drain {
                    DrainView::Going { until } if self.now >= until => DrainView::Over,
                    drain => drain,
                },
                conflicts: if self.conflict {
                    vec![(
                        HostName::parse("shop.test").unwrap(),
                        AppName::new("web", "other").unwrap(),
                    )]
                } else {
                    vec![]
                },
                disk_pressure: None,
                has_files: self.has_files,
                kept_state: self.kept_state.clone(),
            },
            held_up: self.held_up.clone(),
        }
    }

    fn health(&self, unit: &str, port: Option<u16>) -> Health {
        let Some(service) = self.services.get(unit) else {
            return Health::Waiting {
                what: "not started".into(),
                until: None,
            };
        };
        if let Some(port) = port.filter(|port| self.stolen.contains(port)) {
            return Health::PortTaken {
                by: format!("a stranger on {port}"),
            };
        }
        let fate = self
            .attempt
            .as_ref()
            .filter(|attempt| attempt.processes.iter().any(|p| p.unit == unit))
            .filter(|_| !self.committed().iter().any(|p| p.unit == unit))
            .map_or(Fate::Good, |attempt| self.fate(&attempt.wish));
        let failed = |reason| {
            Health::Failed(RecordedFailure {
                reason,
                message: "m".into(),
                log_tail: None,
            })
        };
        let ready = service.since + READY_AFTER;
        match service.activity {
            Activity::Active if fate == Fate::NeverReady => failed(Reason::ProbeFailed),
            Activity::Active if service.restarts >= CRASH_LOOP_RESTARTS => {
                failed(Reason::CrashLooping)
            }
            Activity::Active if self.now < ready => Health::Waiting {
                what: "its probe".into(),
                until: Some(ready),
            },
            Activity::Active => Health::Ready { since: ready },
            Activity::Inactive
            | Activity::Activating
            | Activity::Deactivating
            | Activity::Failed => Health::Waiting {
                what: "it starts".into(),
                until: None,
            },
        }
    }

    // ---- Doing steps ------------------------------------------------------

    /// Plans and does at most `limit` steps. Whether anything was done.
    pub fn round(&mut self, limit: usize) -> (Plan, usize) {
        let observed = self.observe();
        let plan = plan(&observed);
        assert_eq!(plan, super::plan(&observed), "the plan is deterministic");
        let mut done = 0;
        for step in plan.steps.iter().take(limit) {
            self.log
                .push(format!("{} {step:.160?}", self.now.as_secs()));
            if !self.apply(step) {
                break;
            }
            done += 1;
        }
        (plan, done)
    }

    /// Plans and does until nothing happens any more, letting time pass. Panics when it does not settle.
    pub fn settle(&mut self) -> Progress {
        for _ in 0..400 {
            let (plan, done) = self.round(usize::MAX);
            if done > 0 {
                continue;
            }
            let before = self.fingerprint();
            self.pass_time(Duration::from_secs(1));
            if plan.wake.is_none()
                && plan.steps.is_empty()
                && before == self.fingerprint()
                && self.is_quiet(&plan)
            {
                return plan.progress;
            }
        }
        panic!("it does not settle:\n{}", self.log.join("\n"));
    }

    fn is_quiet(&self, plan: &Plan) -> bool {
        self.builds.is_empty()
            && !matches!(&plan.progress, Progress::At(..))
            && self
                .services
                .values()
                .all(|service| self.now > service.since + READY_AFTER + Duration::from_secs(2))
    }

    fn fingerprint(&self) -> String {
        format!("{:?}{:?}", self.services.keys(), self.builds)
    }

    fn apply(&mut self, step: &Step) -> bool {
        let removing = self
            .applied
            .as_ref()
            .is_some_and(|applied| applied.removing.is_some());
        let touches_committed = |world: &Self, units: &[String]| {
            world.committed().iter().any(|p| units.contains(&p.unit))
        };
        match step {
            Step::WriteAttempt(record) => {
                self.has_files = true;
                if record.wish.release_id
                    != self
                        .attempt
                        .as_ref()
                        .map_or(record.wish.release_id, |a| a.wish.release_id)
                {
                    self.source_wanted = false;
                }
                self.attempt = Some((**record).clone());
            }
            Step::WriteApplied(record) => {
                if let Some(release) = record
                    .release
                    .as_ref()
                    .filter(|_| record.removing.is_none())
                {
                    let target = self
                        .target
                        .as_ref()
                        .expect("a release is recorded only after its target");
                    assert_eq!(target.release_id, Some(release.release_id));
                }
                self.has_files = true;
                self.applied = Some((**record).clone());
            }
            Step::WriteRelease(record) => self.releases.push((**record).clone()),
            Step::WantCommit => self.source_wanted = true,
            Step::StartBuild => {
                let attempt = self
                    .attempt
                    .clone()
                    .expect("a wish is durable before its first effect");
                assert!(self.source_wanted && self.slot == SlotView::Granted);
                assert!(self.builds.is_empty(), "one build at a time");
                let name =
                    unit::build_unit_name(&app(), &attempt.wish.release_id, attempt.build_try);
                self.stages
                    .insert((attempt.build_key.clone(), attempt.build_try));
                let fate = self.fate(&attempt.wish);
                self.builds.insert(
                    name,
                    Build {
                        view: BuildView::Running,
                        fate,
                    },
                );
                self.build_starts += 1;
            }
            Step::StopBuild { unit, kill: _ } => {
                let is_attempt = self.attempt.as_ref().is_some_and(|a| {
                    a.outcome.is_none()
                        && unit::build_unit_name(&app(), &a.wish.release_id, a.build_try) == *unit
                });
                let unread = self
                    .attempt
                    .as_ref()
                    .is_some_and(|a| a.build_result.is_none());
                assert!(
                    !(is_attempt && unread && !removing),
                    "a result that is not on disk is thrown away"
                );
                self.builds.remove(unit);
            }
            Step::Seal => {
                let attempt = self.attempt.as_ref().expect("an attempt");
                assert!(self.builds.is_empty(), "sealed while the build runs");
                assert!(
                    attempt
                        .build_result
                        .as_ref()
                        .is_some_and(StepResult::is_success)
                );
                assert!(
                    self.stages
                        .remove(&(attempt.build_key.clone(), attempt.build_try)),
                    "no stage to seal"
                );
                self.trees.insert(attempt.build_key.clone());
            }
            Step::HoldUp(failure) => {
                self.held_up = Some(HeldUp {
                    failure: failure.clone(),
                    until: self.now + Duration::from_secs(5),
                });
            }
            Step::SuspectMirror | Step::ReloadManager => {}
            Step::ChooseProcesses { keep } => self.choose(keep),
            Step::WriteUnits(records) => {
                for record in records {
                    let recorded = self.committed().contains(record)
                        || self
                            .attempt
                            .as_ref()
                            .is_some_and(|a| a.processes.contains(record));
                    assert!(recorded, "{} is written before it is recorded", record.unit);
                    self.files.insert(record.unit.clone(), record.text.clone());
                }
            }
            Step::StartUnits(units) => {
                for unit in units {
                    self.check_alone(unit);
                    assert!(
                        self.files.contains_key(unit),
                        "{unit} is started without a file"
                    );
                    self.services.insert(
                        unit.clone(),
                        Service {
                            activity: Activity::Active,
                            since: self.now,
                            restarts: 0,
                        },
                    );
                }
            }
            Step::StopUnits(units) => {
                let gives_way = |unit: &String| {
                    self.attempt
                        .as_ref()
                        .is_some_and(|a| a.outcome.is_none() && a.stopped_old.contains(unit))
                };
                assert!(
                    removing || !touches_committed(self, units) || units.iter().all(gives_way),
                    "a committed unit is stopped"
                );
                for unit in units {
                    let served = self
                        .proxy
                        .iter()
                        .flat_map(|host| &host.routes)
                        .any(|route| match route.target {
                            RouteTarget::Port { primary, .. } => {
                                unit.contains(&primary.to_string())
                            }
                            RouteTarget::Paused { .. } | RouteTarget::Unavailable => false,
                        });
                    assert!(
                        !served,
                        "{unit} is stopped while the proxy gives it traffic"
                    );
                    if let Some(service) = self.services.get_mut(unit) {
                        service.activity = Activity::Deactivating;
                    }
                }
            }
            Step::RemoveUnits(units) => {
                assert!(
                    removing || !touches_committed(self, units),
                    "a committed unit's file is removed"
                );
                for unit in units {
                    assert!(
                        !self.services.contains_key(unit)
                            || self.services[unit].activity == Activity::Inactive
                    );
                    self.files.remove(unit);
                    self.services.remove(unit);
                }
            }
            Step::Publish(host) => {
                if self.proxy_down {
                    self.held_up = Some(HeldUp {
                        failure: RecordedFailure {
                            reason: Reason::ProxyUnavailable,
                            message: "down".into(),
                            log_tail: None,
                        },
                        until: self.now + Duration::from_secs(5),
                    });
                    return false;
                }
                self.virtual_host_file = Some((**host).clone());
                if self.proxy.as_ref() != Some(host) {
                    self.proxy = Some((**host).clone());
                    self.drain = DrainView::Going {
                        until: self.now + DRAIN,
                    };
                }
                self.in_force = Some(((**host).clone(), self.now));
            }
            Step::RemoveVirtualHost => {
                self.virtual_host_file = None;
                self.proxy = None;
                self.in_force = None;
                self.drain = DrainView::Going {
                    until: self.now + DRAIN,
                };
            }
            Step::BeginDrain => {
                self.drain = DrainView::Going {
                    until: self.now + DRAIN,
                }
            }
            Step::WriteTarget { release_id, units } => {
                for unit in units {
                    assert!(
                        self.files.contains_key(unit),
                        "{unit} is enabled without a file"
                    );
                }
                let is_committed = self.serving() == Some(*release_id);
                if !is_committed {
                    self.check_commit(*release_id, units);
                }
                self.target = Some(TargetView {
                    release_id: Some(*release_id),
                    units: units.clone(),
                });
                self.enabled = true;
            }
            Step::RemoveTarget => {
                assert!(removing);
                self.target = None;
                self.enabled = false;
            }
            Step::TakeState { keep: _ } => self.kept_state = None,
            Step::RemoveFiles { keep_state } => {
                assert!(
                    removing
                        && self.services.is_empty()
                        && self.builds.is_empty()
                        && self.files.is_empty()
                );
                assert!(self.virtual_host_file.is_none() && self.target.is_none());
                self.trees.clear();
                self.stages.clear();
                self.releases.clear();
                self.has_files = false;
                let applied = self.applied.as_ref();
                self.kept_state = keep_state.then(|| KeptRecord {
                    version: RECORD_VERSION,
                    deployment_uid: applied.and_then(|applied| applied.deployment_uid.clone()),
                    since: Timestamp::UNIX_EPOCH,
                });
                self.attempt = None;
                self.applied = None;
            }
        }
        true
    }

    fn choose(&mut self, keep: &BTreeSet<String>) {
        let mut attempt = self.attempt.clone().expect("an attempt");
        let processes = attempt.wish.template.processes.clone();
        attempt.processes = processes
            .iter()
            .map(|process| {
                let content = ContentDigest::of(
                    format!("{:?}{}", process.command, attempt.build_key.as_str()).as_bytes(),
                );
                let old = self.committed().iter().find(|old| {
                    old.name == process.name
                        && old.content == content
                        && keep.contains(&process.name)
                });
                if let Some(old) = old {
                    return old.clone();
                }
                let port = process.port.is_some().then(|| {
                    self.next_port += 1;
                    self.next_port
                });
                let unit = format!(
                    "kari.web.shop.{}.{}-{}.service",
                    process.name,
                    port.unwrap_or(0),
                    &content.as_str()[..8]
                );
                ProcessRecord {
                    name: process.name.clone(),
                    text: unit.clone(),
                    unit,
                    content,
                    port,
                    env_digest: EnvDigest::of(b""),
                }
            })
            .collect();
        self.attempt = Some(attempt);
    }

    /// In a Recreate no two units of one process run at the same time.
    fn check_alone(&self, unit: &str) {
        let Some(attempt) = &self.attempt else { return };
        let is_new = attempt.processes.iter().any(|p| p.unit == unit)
            && !self.committed().iter().any(|p| p.unit == unit);
        let is_old = attempt.stopped_old.iter().any(|old| old == unit);
        if !(is_new && attempt.wish.template.switch == Switch::Recreate || is_old) {
            return;
        }
        let process = |unit: &str| unit.split('.').nth(3).map(str::to_owned);
        for (other, service) in &self.services {
            assert!(
                other == unit
                    || process(other) != process(unit)
                    || service.activity == Activity::Inactive,
                "{unit} is started beside {other}:\n{}",
                self.log.join("\n")
            );
        }
    }

    /// The commit: everything that must hold before it.
    fn check_commit(&self, id: ReleaseId, units: &[String]) {
        let attempt = self.attempt.as_ref().expect("an attempt");
        assert_eq!(attempt.wish.release_id, id);
        assert!(attempt.outcome.is_none() && attempt.switching);
        for unit in units {
            let service = self
                .services
                .get(unit)
                .expect("committed without a service");
            assert_eq!(service.activity, Activity::Active, "{unit}");
        }
        let backup = match attempt.stopped_old.is_empty() {
            true => self.committed(),
            false => &[],
        };
        let wanted = virtual_host(
            &app(),
            id,
            (&attempt.wish.template, &attempt.wish.sealed),
            &attempt.processes,
            backup,
        );
        assert_eq!(self.proxy, wanted, "committed without the traffic");
        if let Some((_, since)) = &self.in_force {
            assert!(
                self.now >= *since + Duration::from_secs(5),
                "committed before it was baked"
            );
        }
    }

    // ---- What must hold when it is quiet -----------------------------------

    /// Exactly what is committed runs, is named and has the traffic, and nothing else is left.
    pub fn check_settled(&self) {
        let committed: BTreeSet<&String> = self.committed().iter().map(|p| &p.unit).collect();
        let story = || self.log.join("\n");
        let running: BTreeSet<&String> = self
            .services
            .iter()
            .filter(|(_, s)| s.activity == Activity::Active)
            .map(|(unit, _)| unit)
            .collect();
        assert_eq!(running, committed, "what runs\n{}", story());
        assert_eq!(
            self.files.keys().collect::<BTreeSet<_>>(),
            committed,
            "unit files\n{}",
            story()
        );
        assert!(self.builds.is_empty());
        let release = self
            .applied
            .as_ref()
            .and_then(|applied| applied.release.as_ref());
        let wanted = release.and_then(|r| {
            virtual_host(
                &app(),
                r.release_id,
                (&r.template, &r.sealed),
                &r.processes,
                &[],
            )
        });
        if !self.proxy_down {
            assert_eq!(self.proxy, wanted, "the traffic\n{}", story());
        }
        assert_eq!(
            self.target.as_ref().and_then(|t| t.release_id),
            release.map(|r| r.release_id),
            "the target\n{}",
            story()
        );
    }

    pub fn check_empty(&self) {
        self.check_settled();
        assert!(
            self.applied.is_none() && self.attempt.is_none() && !self.has_files && !self.enabled
        );
        assert!(self.trees.is_empty() && self.virtual_host_file.is_none());
    }

    pub fn steps_done(&self) -> usize {
        self.log.len()
    }

    /// The committed service's unit of a process.
    pub fn unit_of(&self, process: &str) -> Option<String> {
        self.committed()
            .iter()
            .find(|p| p.name == process)
            .map(|p| p.unit.clone())
    }
}
