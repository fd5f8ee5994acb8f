//! What the tests of the planner are made from: a Deployment, nodes, and a simulation of their agents.
//!
//! The simulation is the controller's world in plain data: it carries a plan out as the API server and
//! the agents would, and lets an agent take one step when a test says so.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use serde_json::json;

use crate::api::names::{Commit, NodeName};
use crate::api::reasons::Reason;
use crate::api::release::{AttemptStatus, Failure, Phase, Serving};
use crate::api::{DeploymentSpec, DeploymentStatus, ReleaseSpec, ReleaseStatus, conditions};

use super::observed::{
    Lookup, LookupFailure, Observed, ObservedDeployment, ObservedNode, ObservedRelease,
    ObservedRevision, Outcome, Presence, Reach,
};
use super::plan::{Plan, RevisionStep, plan};
use super::references::Contents;
use super::rollout::Step;
use super::sealing::{Unsealed, sealed};

/// A commit of one digit.
pub fn commit(digit: char) -> Commit {
    Commit::parse(&digit.to_string().repeat(40)).unwrap_or_else(|e| panic!("{e}"))
}

/// A spec that uses a bit of everything.
pub fn deployment_spec() -> DeploymentSpec {
    serde_json::from_value(json!({
        "placement": {"nodeSelector": {}},
        "source": {"git": {"url": "https://git.example.com/shop.git", "ref": {"branch": "main"}}},
        "env": [{"name": "LOG", "value": "info"}],
        "build": {"run": "make"},
        "processes": [{
            "name": "web",
            "command": ["./web", "--level=$(LOG)", "--port=$(PORT)"],
            "port": {"env": "PORT"},
            "route": {"hosts": ["shop.example.com"]},
        }],
        "strategy": {"maxUnavailable": 1, "minReadySeconds": 5, "progressDeadlineSeconds": 600},
    }))
    .unwrap_or_else(|e| panic!("{e}"))
}

/// The world around one Deployment.
#[derive(Clone, Debug)]
pub struct World {
    /// What the next plan sees.
    pub observed: Observed,
    /// The clock.
    pub now: Timestamp,
    /// The nodes that an observer saw at work at once, at most.
    pub most_at_work: usize,
    version: u64,
}

impl World {
    /// Nodes `n1`… that match and are reachable, nothing on them, and a source at commit `a…`.
    pub fn new(nodes: usize) -> Self {
        let observed = Observed {
            deployment: ObservedDeployment {
                namespace: "web".into(),
                name: "shop".into(),
                uid: "uid".into(),
                resource_version: "1".into(),
                generation: 1,
                spec: deployment_spec(),
                status: DeploymentStatus {
                    observed_generation: -1,
                    ..DeploymentStatus::default()
                },
                requested_at: None,
                retry: None,
            },
            nodes: (1..=nodes).map(|n| node(&format!("n{n}"))).collect(),
            revisions: Vec::new(),
            lookup: Lookup {
                outcome: Outcome::Found(commit('a')),
                answered_request: None,
            },
            contents: Contents::new(),
            denied: None,
            insecure_source_schemes: false,
        };
        Self {
            observed,
            now: Timestamp::UNIX_EPOCH + SignedDuration::from_hours(10_000),
            most_at_work: 0,
            version: 1,
        }
    }

    /// The same with the first revision served everywhere.
    pub fn deployed(nodes: usize) -> Self {
        let mut world = Self::new(nodes);
        world.roll_out();
        assert_eq!(world.served(), vec!["a"; nodes], "{:?}", world.status());
        world.most_at_work = 0;
        world
    }

    pub fn spec(&mut self) -> &mut DeploymentSpec {
        self.observed.deployment.generation += 1;
        &mut self.observed.deployment.spec
    }

    pub fn max_unavailable(&mut self, number: i32) {
        self.spec().strategy.get_or_insert_default().max_unavailable = IntOrString::Int(number);
    }

    pub fn push(&mut self, digit: char) {
        self.observed.lookup.outcome = Outcome::Found(commit(digit));
    }

    pub fn lose_source(&mut self, reason: Reason) {
        self.observed.lookup.outcome = Outcome::Failed(LookupFailure {
            reason,
            message: "no".into(),
        });
    }

    pub fn pass(&mut self, seconds: i64) {
        self.now += SignedDuration::from_secs(seconds);
        for release in self
            .observed
            .nodes
            .iter_mut()
            .filter_map(|n| n.release.as_mut())
        {
            if let Some(held) = &mut release.held_up_for {
                *held += Duration::from_secs(seconds.unsigned_abs());
            }
        }
    }

    pub fn status(&self) -> &DeploymentStatus {
        &self.observed.deployment.status
    }

    pub fn active(&self) -> Vec<&str> {
        self.status().active.iter().map(String::as_str).collect()
    }

    pub fn node(&mut self, name: &str) -> &mut ObservedNode {
        self.observed
            .nodes
            .iter_mut()
            .find(|n| n.name.as_str() == name)
            .unwrap_or_else(|| panic!("no node {name}"))
    }

    pub fn release(&mut self, name: &str) -> &mut ObservedRelease {
        self.node(name)
            .release
            .as_mut()
            .unwrap_or_else(|| panic!("no release on {name}"))
    }

    /// The first digit of the commit that each node serves, `-` for none.
    pub fn served(&self) -> Vec<String> {
        self.each(|r| r.status.serving.as_ref().map(|s| s.commit[..1].to_owned()))
    }

    /// The first digit of the commit that each node is to serve, `-` for none.
    pub fn told(&self) -> Vec<String> {
        self.each(|r| Some(r.spec.commit[..1].to_owned()))
    }

    fn each(&self, what: impl Fn(&ObservedRelease) -> Option<String>) -> Vec<String> {
        let of = |n: &ObservedNode| n.release.as_ref().and_then(&what);
        let nodes = self.observed.nodes.iter();
        nodes.map(|n| of(n).unwrap_or_else(|| "-".into())).collect()
    }

    /// The condition as `Type=Status/Reason`, and its message.
    pub fn condition(&self, kind: &str) -> (String, String) {
        let found = self.status().conditions.iter().find(|c| c.type_ == kind);
        let c = found.unwrap_or_else(|| panic!("no condition {kind}"));
        (format!("{}/{}", c.status, c.reason), c.message.clone())
    }

    pub fn ready(&self) -> (String, String) {
        self.condition(conditions::READY)
    }

    pub fn stalled(&self) -> (String, String) {
        self.condition(conditions::STALLED)
    }

    /// One reconcile: the plan, carried out as the API server would.
    pub fn reconcile(&mut self) -> Plan {
        let plan = plan(&self.observed, self.now);
        self.carry_out(&plan);
        plan
    }

    fn next_version(&mut self) -> String {
        self.version += 1;
        self.version.to_string()
    }

    fn carry_out(&mut self, plan: &Plan) {
        match &plan.revision {
            Some(RevisionStep::Create { name, number, data }) => {
                let resource_version = self.next_version();
                self.observed.revisions.push(ObservedRevision {
                    name: name.clone(),
                    uid: format!("uid-{name}"),
                    resource_version,
                    number: *number,
                    data: Some((**data).clone()),
                });
            }
            Some(RevisionStep::Renumber { name, number, .. }) => {
                for revision in self
                    .observed
                    .revisions
                    .iter_mut()
                    .filter(|r| r.name == *name)
                {
                    revision.number = *number;
                }
            }
            None => {}
        }
        self.observed.deployment.status = plan.status.clone();
        for step in &plan.steps {
            self.write(step);
        }
        for node in &mut self.observed.nodes {
            node.gave_back |= plan.giving_back.contains(&node.name);
        }
        let gone: BTreeSet<_> = plan.surplus.iter().map(|r| r.name.clone()).collect();
        self.observed.revisions.retain(|r| !gone.contains(&r.name));
        let at_work = self.at_work();
        self.most_at_work = self.most_at_work.max(at_work);
    }

    /// Nodes that an observer of the API sees between two releases.
    fn at_work(&self) -> usize {
        let nodes = self.observed.nodes.iter();
        nodes
            .filter(|n| n.matches() && n.reach == Reach::Fresh)
            .filter_map(|n| n.release.as_ref())
            .filter(|r| !r.deleting && !r.committed() && r.failed().is_none())
            .count()
    }

    fn write(&mut self, step: &Step) {
        let resource_version = self.next_version();
        match step {
            Step::Create {
                name,
                spec,
                unsealed,
                retry,
            } => {
                let spec = written_spec(name, spec, unsealed);
                let node = self.node(&spec.node_name);
                assert!(node.release.is_none(), "created twice: {name}");
                node.release = Some(ObservedRelease {
                    uid: format!("uid-{name}-{resource_version}"),
                    name: name.clone(),
                    resource_version,
                    generation: 1,
                    deleting: false,
                    orphaned: false,
                    retry: retry.clone(),
                    spec,
                    status: ReleaseStatus::default(),
                    held_up_for: None,
                });
            }
            Step::Update {
                name,
                uid,
                spec,
                unsealed,
                retry,
                ..
            } => {
                let spec = written_spec(name, spec, unsealed);
                let release = self.written(name, uid);
                assert!(!release.deleting, "wrote to a dying Release: {name}");
                if release.spec.release_id != spec.release_id {
                    release.held_up_for = None;
                }
                release.spec = spec;
                release.retry = retry.clone();
                release.orphaned = false;
                release.generation += 1;
                release.resource_version = resource_version;
            }
            Step::Delete { name, uid, .. } => {
                let release = self.written(name, uid);
                release.deleting = true;
                release.generation += 1;
            }
        }
    }

    fn written(&mut self, name: &str, uid: &str) -> &mut ObservedRelease {
        let mut releases = self
            .observed
            .nodes
            .iter_mut()
            .filter_map(|n| n.release.as_mut());
        releases
            .find(|r| r.name == name && r.uid == uid)
            .unwrap_or_else(|| panic!("no Release {name} {uid}"))
    }

    /// The agent reads its Release and starts on it, or takes the app away.
    pub fn agent_reads(&mut self, name: &str) {
        let node = self.node(name);
        let Some(release) = &mut node.release else {
            return;
        };
        if release.deleting {
            node.release = None;
            return;
        }
        release.status.observed_generation = release.generation;
        if !release.committed() {
            let current = release.status.attempt.as_ref();
            if current.is_none_or(|a| a.release_id != release.spec.release_id) {
                release.status.phase = Phase::Building;
                release.status.attempt = Some(AttemptStatus {
                    release_id: release.spec.release_id,
                    step: Some(Phase::Building),
                    queue: None,
                    failure: None,
                });
            }
        } else {
            release.status.phase = Phase::Running;
        }
    }

    /// The agent brings what it read to its commit, unless it has failed.
    pub fn agent_commits(&mut self, name: &str) {
        self.agent_reads(name);
        let Some(release) = self.node(name).release.as_mut() else {
            return;
        };
        if release.failed().is_some() {
            return;
        }
        release.held_up_for = None;
        release.status.phase = Phase::Running;
        release.status.attempt = None;
        release.status.serving = Some(Serving {
            release_id: release.spec.release_id,
            revision: release.spec.revision.clone(),
            commit: release.spec.commit.clone(),
            available_since: None,
            processes: Vec::new(),
        });
    }

    /// The agent fails at what it read.
    pub fn agent_fails(&mut self, name: &str, reason: Reason) {
        self.agent_reads(name);
        let Some(release) = self.node(name).release.as_mut() else {
            return;
        };
        if release.committed() {
            return;
        }
        let class = reason.class().to_string();
        let passing = class != "Revision" && class != "Invalid";
        if passing {
            release.held_up_for.get_or_insert(Duration::ZERO);
        } else {
            release.held_up_for = None;
            release.status.phase = Phase::Failed;
        }
        release.status.attempt = Some(AttemptStatus {
            release_id: release.spec.release_id,
            step: None,
            queue: None,
            failure: Some(Failure {
                class,
                reason: reason.to_string(),
                message: "it broke".into(),
                log_tail: Some("make: *** [all] Error 2".into()),
            }),
        });
    }

    /// Lets every agent that is there finish, and reconciles, until nothing changes.
    pub fn roll_out(&mut self) {
        for _ in 0..200 {
            let before = self.fingerprint();
            self.reconcile();
            let names: Vec<_> = self
                .observed
                .nodes
                .iter()
                .map(|n| n.name.to_string())
                .collect();
            for name in names {
                if self.node(&name).reach == Reach::Fresh {
                    self.agent_commits(&name);
                }
            }
            if self.fingerprint() == before {
                return;
            }
        }
        panic!("no rest after 200 rounds: {:?}", self.status());
    }

    /// All that a plan could have changed.
    pub fn fingerprint(&self) -> String {
        format!("{:?}", self.observed)
    }

    /// Labels on the history: revision of each commit's digit.
    pub fn revision_of(&self, digit: char) -> String {
        let of: BTreeMap<_, _> = self
            .observed
            .revisions
            .iter()
            .filter_map(|r| Some((r.data.as_ref()?.commit.clone(), r.name.to_string())))
            .collect();
        of.get(&commit(digit))
            .cloned()
            .unwrap_or_else(|| panic!("no revision of {digit}"))
    }
}

/// What the API server is sent.
pub fn written_spec(name: &str, spec: &ReleaseSpec, unsealed: &[Unsealed]) -> ReleaseSpec {
    sealed("web", name, spec, unsealed).unwrap_or_else(|e| panic!("{e}"))
}

/// A node that matches and is reachable, with nothing on it.
pub fn node(name: &str) -> ObservedNode {
    ObservedNode {
        name: NodeName::new(name),
        presence: Presence::There {
            matches: true,
            canary: false,
            cordoned: false,
        },
        reach: Reach::Fresh,
        key: None,
        release: None,
        name_taken: false,
        unreadable: false,
        gave_back: false,
    }
}
