//! Both sides together: the controller's planner and those of three agents, over an API server in memory.
//!
//! The planners, the way from a Release to what an agent wants, an agent's report and the end of a Release
//! are the real ones. In memory are the objects, with generations, versions and preconditions, what each
//! side has seen of them so far, and the hosts, which check with each step that what runs is not touched
//! before a commit.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{OwnerReference, Time};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use k8s_openapi::jiff::Timestamp;
use kube::core::DeserializeGuard;
use proptest::prelude::*;

use crate::agent::testing::{Fate, Wanted, World as Host, plan as plan_app, status, wanted};
use crate::api::deployment::{DeletionPolicy, Switch};
use crate::api::names::ReleaseId;
use crate::api::{DeploymentStatus, RELEASE_FINALIZER, Release};
use crate::controller::observed::{
    FailureClass, Observed, ObservedNode, ObservedRelease, ObservedRevision, Presence, Reach,
};
use crate::controller::plan::{Plan, RevisionStep, plan};
use crate::controller::release;
use crate::controller::rollout::{Step, budget};
use crate::controller::testing::{World, commit, written_spec};

const NODES: usize = 3;

/// A Release as the API server has it.
#[derive(Clone, Debug)]
struct Stored {
    release: ObservedRelease,
    /// The uid of the Deployment that is its controller.
    owner: Option<String>,
}

impl Stored {
    fn object(&self) -> DeserializeGuard<Release> {
        let ObservedRelease {
            name,
            uid,
            generation,
            deleting,
            spec,
            status,
            ..
        } = &self.release;
        let mut release = Release::new(name, spec.clone());
        let meta = &mut release.metadata;
        meta.namespace = Some("web".into());
        meta.uid = Some(uid.clone());
        meta.generation = Some(*generation);
        meta.finalizers = Some(vec![RELEASE_FINALIZER.into()]);
        meta.deletion_timestamp = deleting.then_some(Time(Timestamp::UNIX_EPOCH));
        meta.owner_references = self.owner.as_ref().map(|uid| {
            vec![OwnerReference {
                uid: uid.clone(),
                controller: Some(true),
                ..OwnerReference::default()
            }]
        });
        release.status = Some(status.clone());
        DeserializeGuard(Ok(release))
    }
}

/// A node's agent.
struct Agent {
    host: Host,
    is_up: bool,
    /// What it has seen last.
    seen: Option<Stored>,
}

struct Cluster {
    /// The Deployment, its history, its source, the Nodes, the clock.
    world: World,
    /// The Releases, by node.
    stored: BTreeMap<usize, Stored>,
    /// What the controller has seen of them.
    seen: BTreeMap<usize, Stored>,
    agents: Vec<Agent>,
    held_up: BTreeMap<(usize, ReleaseId), Timestamp>,
    gave_back: (Option<String>, BTreeSet<usize>),
    version: u64,
    /// Every release id that was decided, with the Release it was decided for.
    decided: BTreeSet<(String, ReleaseId)>,
    /// What an id stands for.
    meaning: BTreeMap<ReleaseId, (String, String)>,
    story: Vec<String>,
}

fn index(node: &str) -> usize {
    node[1..].parse::<usize>().unwrap() - 1
}

impl Cluster {
    fn new() -> Self {
        let mut world = World::new(NODES);
        world.observed.deployment.resource_version = "1".into();
        Self {
            world,
            stored: BTreeMap::new(),
            seen: BTreeMap::new(),
            agents: (0..NODES)
                .map(|_| Agent {
                    host: Host::new(),
                    is_up: true,
                    seen: None,
                })
                .collect(),
            held_up: BTreeMap::new(),
            gave_back: (None, BTreeSet::new()),
            version: 1,
            decided: BTreeSet::new(),
            meaning: BTreeMap::new(),
            story: vec![],
        }
    }

    fn next_version(&mut self) -> String {
        self.version += 1;
        self.version.to_string()
    }

    fn node(&mut self, n: usize) -> &mut ObservedNode {
        &mut self.world.observed.nodes[n]
    }

    fn tell(&self) -> String {
        self.story.join("\n")
    }

    // ---- The controller ----------------------------------------------------

    /// What the controller makes its plan from.
    fn observe(&self) -> Observed {
        let mut observed = self.world.observed.clone();
        for node in &mut observed.nodes {
            let n = index(node.name.as_str());
            node.gave_back = self.gave_back.0 == observed.deployment.status.revision
                && self.gave_back.1.contains(&n);
            let Some(Stored { release, owner }) = self.seen.get(&n) else {
                continue;
            };
            if owner
                .as_ref()
                .is_some_and(|uid| *uid != observed.deployment.uid)
            {
                node.name_taken = true;
                continue;
            }
            let held_up = self.held_up.get(&(n, release.spec.release_id));
            node.release = Some(ObservedRelease {
                orphaned: owner.is_none(),
                held_up_for: held_up.map(|since| {
                    Duration::try_from(self.world.now.duration_since(*since)).unwrap()
                }),
                ..release.clone()
            });
        }
        observed
            .nodes
            .retain(|node| node.presence != Presence::Gone || node.release.is_some());
        observed
    }

    /// Nodes that are being changed and have neither recorded nor reported an end of it, or do not serve
    /// what they committed.
    fn unavailable(&self) -> usize {
        let nodes = self.world.observed.nodes.iter().enumerate();
        nodes
            .filter(|(n, node)| {
                let Some(Stored { release, owner }) = self.stored.get(n) else {
                    return false;
                };
                let ours = owner
                    .as_ref()
                    .is_none_or(|uid| *uid == self.world.observed.deployment.uid);
                let told = release.spec.release_id;
                let is_over = self.agents[*n]
                    .host
                    .attempt
                    .as_ref()
                    .is_some_and(|attempt| {
                        attempt.wish.release_id == told && attempt.outcome.is_some()
                    });
                let changes = node.matches()
                    && matches!(node.reach, Reach::Fresh | Reach::Unknown)
                    && self.agents[*n].host.serving() != Some(told)
                    && !is_over
                    && release.failed().is_none();
                let broken = node.takes_part() && release.degraded();
                ours && !release.deleting && (changes || broken)
            })
            .count()
    }

    /// One reconcile from what was seen. Where the process dies, it dies before the first Release.
    fn reconcile(&mut self, dies: bool) -> Plan {
        let observed = self.observe();
        let planned = plan(&observed, self.world.now);
        assert_eq!(
            planned,
            plan(&observed, self.world.now),
            "the plan is deterministic"
        );
        self.check_decisions(&observed, &planned);
        let before = self.unavailable();
        match &planned.revision {
            Some(RevisionStep::Create { name, number, data }) => {
                let resource_version = self.next_version();
                let revisions = &mut self.world.observed.revisions;
                assert!(revisions.iter().all(|r| r.name != *name));
                revisions.push(ObservedRevision {
                    name: name.clone(),
                    uid: format!("uid-{name}"),
                    resource_version,
                    number: *number,
                    data: Some((**data).clone()),
                });
            }
            Some(RevisionStep::Renumber { name, number, .. }) => {
                let mut revisions = self.world.observed.revisions.iter_mut();
                revisions.find(|r| r.name == *name).unwrap().number = *number;
            }
            None => {}
        }
        if self.world.observed.deployment.status != planned.status {
            let version = self.next_version();
            let deployment = &mut self.world.observed.deployment;
            deployment.status = planned.status.clone();
            deployment.resource_version = version;
        }
        if dies {
            return planned;
        }
        let mut dropped = false;
        for step in &planned.steps {
            dropped |= !self.write(step);
        }
        // The next plan is not made before the caches show what this one has written.
        let written: Vec<&str> = planned.steps.iter().map(Step::name).collect();
        for n in 0..NODES {
            let stored = self.stored.get(&n);
            if stored.is_some_and(|stored| written.contains(&stored.release.name.as_str())) {
                self.see(n);
            }
        }
        if !dropped {
            let surplus: BTreeSet<_> = planned.surplus.iter().map(|r| r.name.clone()).collect();
            let revisions = &mut self.world.observed.revisions;
            revisions.retain(|r| !surplus.contains(&r.name));
        }
        if self.gave_back.0 != planned.status.revision {
            self.gave_back = (planned.status.revision.clone(), BTreeSet::new());
        }
        let giving = planned.giving_back.iter().map(|node| index(node.as_str()));
        self.gave_back.1.extend(giving);
        let (after, slots) = (self.unavailable(), budget(&observed));
        assert!(
            after <= slots.max(before),
            "{after} unavailable, {before} before, of {slots}:\n{}",
            self.tell()
        );
        planned
    }

    /// What is begun has a slot in the status, and there are no more slots than the budget has.
    fn check_decisions(&self, observed: &Observed, planned: &Plan) {
        let active: BTreeSet<&str> = planned.status.active.iter().map(String::as_str).collect();
        let mut begun = Vec::new();
        for step in &planned.steps {
            let spec = match step {
                Step::Delete { .. } => continue,
                Step::Create { spec, .. } | Step::Update { spec, .. } => spec,
            };
            let node = observed
                .nodes
                .iter()
                .find(|node| node.name.as_str() == spec.node_name)
                .unwrap();
            let begins = node.release.as_ref().is_none_or(|release| {
                assert!(!release.deleting, "a Release in deletion is written");
                release.spec.release_id != spec.release_id
                    && (release.committed() || release.failed().is_some())
            });
            if begins {
                assert!(
                    node.takes_work(),
                    "{} is left out and told something new",
                    node.name
                );
                begun.push(node);
            }
        }
        if begun.is_empty() {
            return;
        }
        let broken = |node: &ObservedNode| {
            node.takes_part()
                && node
                    .release
                    .as_ref()
                    .is_some_and(|release| !release.deleting && release.degraded())
        };
        let slots = budget(observed);
        let nodes = observed.nodes.iter();
        let unavailable = nodes
            .filter(|node| active.contains(node.name.as_str()) || broken(node))
            .count();
        for node in &begun {
            assert!(
                active.contains(node.name.as_str()),
                "{} has no slot",
                node.name
            );
        }
        assert!(active.len() <= slots, "{active:?} of {slots}");
        assert!(
            unavailable <= slots || begun.iter().all(|node| broken(node)),
            "{unavailable} unavailable of {slots}"
        );
    }

    /// One write to a Release, refused where it was planned from something else than what is there.
    fn write(&mut self, step: &Step) -> bool {
        let resource_version = self.next_version();
        match step {
            Step::Create {
                name,
                spec,
                unsealed,
                retry,
            } => {
                let spec = written_spec(name, spec, unsealed);
                let n = index(&spec.node_name);
                if self.stored.contains_key(&n) {
                    return false;
                }
                let release = ObservedRelease {
                    name: name.clone(),
                    uid: format!("uid-{resource_version}"),
                    resource_version,
                    generation: 1,
                    deleting: false,
                    orphaned: false,
                    retry: retry.clone(),
                    spec,
                    status: crate::api::ReleaseStatus::default(),
                    held_up_for: None,
                };
                self.note(&release);
                let owner = Some(self.world.observed.deployment.uid.clone());
                self.stored.insert(n, Stored { release, owner });
            }
            Step::Update {
                name,
                uid,
                resource_version: read,
                spec,
                unsealed,
                retry,
            } => {
                let spec = written_spec(name, spec, unsealed);
                let owner = self.world.observed.deployment.uid.clone();
                let Some(stored) = self.stored.get_mut(&index(&spec.node_name)) else {
                    return false;
                };
                let release = &mut stored.release;
                if release.uid != *uid || release.resource_version != *read {
                    return false;
                }
                let is_new = release.spec.release_id != spec.release_id;
                let is_served = release
                    .status
                    .serving
                    .as_ref()
                    .is_some_and(|serving| serving.release_id == spec.release_id);
                release.generation += i64::from(release.spec != spec);
                release.spec = spec;
                release.retry = retry.clone();
                release.resource_version = resource_version;
                stored.owner = Some(owner);
                let release = release.clone();
                if is_new && !is_served {
                    self.note(&release);
                }
            }
            Step::Delete {
                name,
                uid,
                resource_version: read,
            } => {
                let found = self.stored.values_mut().find(|s| s.release.name == *name);
                let Some(Stored { release, .. }) = found else {
                    return true;
                };
                if release.uid != *uid || release.resource_version != *read {
                    return false;
                }
                release.deleting = true;
                release.generation += 1;
                release.resource_version = resource_version;
            }
        }
        true
    }

    fn note(&mut self, release: &ObservedRelease) {
        let spec = &release.spec;
        assert!(
            self.decided.insert((release.uid.clone(), spec.release_id)),
            "two decisions have the id {}:\n{}",
            spec.release_id,
            self.tell()
        );
        let meaning = (spec.node_name.clone(), spec.revision.clone());
        let known = self.meaning.insert(spec.release_id, meaning.clone());
        assert!(
            known.is_none_or(|known| known == meaning),
            "an id has two meanings:\n{}",
            self.tell()
        );
    }

    fn see(&mut self, n: usize) {
        match self.stored.get(&n) {
            Some(stored) => self.seen.insert(n, stored.clone()),
            None => self.seen.remove(&n),
        };
    }

    /// The reconcile that is keyed by Release.
    fn finish_deletions(&mut self) {
        for n in 0..NODES {
            let node = &self.world.observed.nodes[n];
            let exists = node.presence != Presence::Gone;
            let Some(stored) = self.stored.get(&n) else {
                continue;
            };
            let object = stored.object().0.unwrap().into();
            if release::decide(&object, exists, node.reach) == Some(release::Step::DropFinalizer) {
                self.stored.remove(&n);
            }
        }
    }

    // ---- The agents --------------------------------------------------------

    fn agent_sees(&mut self, n: usize) {
        let agent = &mut self.agents[n];
        if !agent.is_up {
            return;
        }
        agent.seen = self.stored.get(&n).cloned();
        let wanted = agent
            .seen
            .as_ref()
            .map_or(Wanted::Absent, |stored| wanted(&stored.object()));
        if wanted != agent.host.wanted {
            agent.host.want_anew(wanted);
        }
    }

    fn agent_works(&mut self, n: usize, steps: usize) {
        if self.agents[n].is_up {
            self.agents[n].host.round(steps);
        }
    }

    fn agent_reports(&mut self, n: usize) {
        let version = self.next_version();
        let Agent { host, is_up, seen } = &mut self.agents[n];
        let (Some(seen), true) = (seen, *is_up) else {
            return;
        };
        let observed = host.observe();
        if observed.wanted == Wanted::Unknown {
            return;
        }
        let planned = plan_app(&observed);
        let Some(stored) = self.stored.get_mut(&n) else {
            return;
        };
        let release = &mut stored.release;
        if release.uid != seen.release.uid {
            return;
        }
        let said = status(
            &observed,
            &planned,
            seen.release.generation,
            &release.status.conditions,
            None,
        );
        if said != release.status {
            release.status = said;
            release.resource_version = version;
        }
        let key = (n, release.spec.release_id);
        let held = release
            .failure()
            .is_some_and(|(_, class)| class == FailureClass::Passing);
        if held {
            self.held_up.entry(key).or_insert(self.world.now);
        } else {
            self.held_up.remove(&key);
        }
    }

    // ---- What happens ------------------------------------------------------

    fn happen(&mut self, event: &Event) {
        self.story.push(format!("{event:?}"));
        match event {
            Event::Push(digit) => self.world.push(*digit),
            Event::Fate(digit, fate) => {
                for agent in &mut self.agents {
                    agent.host.commits.insert(commit(*digit), *fate);
                }
            }
            Event::Budget(slots) => {
                let strategy = self.world.spec().strategy.get_or_insert_default();
                strategy.max_unavailable = slots.clone();
            }
            Event::Switch(switch) => {
                self.world.spec().strategy.get_or_insert_default().switch = *switch;
            }
            Event::Policy(policy) => self.world.spec().deletion_policy = *policy,
            Event::Keep(number) => self.world.spec().keep_releases = *number,
            Event::Suspend(is_on) => self.world.spec().suspend = *is_on,
            Event::Retry(value) => {
                self.world.observed.deployment.retry = Some(value.to_string());
            }
            Event::Presence(n, presence) => {
                self.node(*n).presence = *presence;
            }
            Event::Reach(n, reach) => self.node(*n).reach = *reach,
            Event::AgentUp(n, is_up) => {
                self.agents[*n].is_up = *is_up;
                self.node(*n).reach = match is_up {
                    true => Reach::Fresh,
                    false => Reach::Stale,
                };
            }
            Event::KillAgent(n) => self.restart(*n, Host::restart_agent),
            Event::Reboot(n) => self.restart(*n, Host::reboot),
            Event::ProxyDown(n, is_down) => self.agents[*n].host.proxy_down = *is_down,
            Event::StopAService(n) => self.agents[*n].host.stop_a_service(),
            Event::DeleteRelease(n) => {
                let resource_version = self.next_version();
                if let Some(Stored { release, .. }) = self.stored.get_mut(n)
                    && !release.deleting
                {
                    release.deleting = true;
                    release.generation += 1;
                    release.resource_version = resource_version;
                }
            }
            Event::ApplyAnew { orphan } => self.apply_anew(*orphan),
            Event::Pass(seconds) => {
                self.world.pass(*seconds);
                for agent in &mut self.agents {
                    let by = Duration::from_secs(seconds.unsigned_abs());
                    agent.host.pass_time(by);
                }
            }
            Event::ControllerSees(n) => self.see(*n),
            Event::Reconcile { dies } => {
                self.reconcile(*dies);
            }
            Event::FinishDeletions => self.finish_deletions(),
            Event::AgentSees(n) => self.agent_sees(*n),
            Event::AgentWorks(n, steps) => self.agent_works(*n, *steps),
            Event::AgentReports(n) => self.agent_reports(*n),
            Event::Agent(n) => {
                self.agent_sees(*n);
                self.agent_works(*n, 3);
                self.agent_reports(*n);
                self.see(*n);
            }
        }
    }

    fn restart(&mut self, n: usize, how: fn(&mut Host)) {
        let agent = &mut self.agents[n];
        how(&mut agent.host);
        agent.host.want_anew(Wanted::Unknown);
        agent.seen = None;
    }

    /// The Deployment is deleted and applied again at once, and the garbage collector follows, or leaves
    /// what the Deployment had to nobody.
    fn apply_anew(&mut self, orphan: bool) {
        for n in 0..NODES {
            let resource_version = self.next_version();
            let Some(Stored { release, owner }) = self.stored.get_mut(&n) else {
                continue;
            };
            if owner.as_ref() != Some(&self.world.observed.deployment.uid) {
                continue;
            }
            release.resource_version = resource_version;
            if orphan {
                // Seen before the Deployment is: its finalizer waits for the garbage collector.
                *owner = None;
                self.see(n);
            } else if !release.deleting {
                release.deleting = true;
                release.generation += 1;
            }
        }
        let version = self.next_version();
        let deployment = &mut self.world.observed.deployment;
        deployment.uid = format!("uid-{version}");
        deployment.resource_version = version;
        deployment.generation = 1;
        deployment.retry = None;
        deployment.status = DeploymentStatus {
            observed_generation: -1,
            ..DeploymentStatus::default()
        };
        self.world.observed.revisions.clear();
        self.gave_back = (None, BTreeSet::new());
    }

    /// All is well again and everybody does what is left to do.
    fn come_to_rest(&mut self) {
        self.story.push("-- quiet".into());
        for n in 0..NODES {
            self.node(n).presence = there(true, false, false);
            self.happen(&Event::AgentUp(n, true));
            self.agents[n].host.proxy_down = false;
            self.agents[n].host.commits.clear();
        }
        self.world.spec().suspend = false;
        self.world.observed.deployment.retry = Some("at last".into());
        for _ in 0..100 {
            let before = self.fingerprint();
            for n in 0..NODES {
                self.see(n);
            }
            self.reconcile(false);
            for n in 0..NODES {
                self.agent_sees(n);
                self.agents[n].host.settle();
                self.agent_reports(n);
            }
            self.finish_deletions();
            self.world.pass(1);
            if self.fingerprint() == before {
                return;
            }
        }
        panic!(
            "no rest:\n{}\n{:?}\n{:?}",
            self.tell(),
            self.world.status(),
            self.stored
        );
    }

    fn fingerprint(&self) -> String {
        format!("{:?}{:?}", self.world.observed, self.stored)
    }
}

fn there(matches: bool, canary: bool, cordoned: bool) -> Presence {
    Presence::There {
        matches,
        canary,
        cordoned,
    }
}

/// Something that happens.
#[derive(Debug, Clone)]
enum Event {
    Push(char),
    Fate(char, Fate),
    Budget(IntOrString),
    Switch(Option<Switch>),
    Policy(DeletionPolicy),
    Keep(u32),
    Suspend(bool),
    Retry(u8),
    Presence(usize, Presence),
    Reach(usize, Reach),
    AgentUp(usize, bool),
    KillAgent(usize),
    Reboot(usize),
    ProxyDown(usize, bool),
    StopAService(usize),
    DeleteRelease(usize),
    ApplyAnew {
        orphan: bool,
    },
    Pass(i64),
    ControllerSees(usize),
    Reconcile {
        dies: bool,
    },
    FinishDeletions,
    AgentSees(usize),
    AgentWorks(usize, usize),
    AgentReports(usize),
    /// An agent sees, works and reports, and the controller sees what it said.
    Agent(usize),
}

fn event() -> impl Strategy<Value = Event> {
    let n = 0..NODES;
    let digit = prop::sample::select(vec!['a', 'b', 'c']);
    let of_a_node = prop_oneof![
        2 => (n.clone(), any::<[bool; 3]>())
            .prop_map(|(n, [matches, canary, cordoned])| Event::Presence(n, there(matches, canary, cordoned))),
        1 => n.clone().prop_map(|n| Event::Presence(n, Presence::Gone)),
        2 => n.clone().prop_map(|n| Event::Presence(n, there(true, false, false))),
        2 => (n.clone(), prop::sample::select(vec![Reach::Fresh, Reach::Stale, Reach::Unknown, Reach::NoAgent]))
            .prop_map(|(n, reach)| Event::Reach(n, reach)),
        2 => (n.clone(), any::<bool>()).prop_map(|(n, is_up)| Event::AgentUp(n, is_up)),
        2 => n.clone().prop_map(Event::KillAgent),
        2 => n.clone().prop_map(Event::Reboot),
        2 => (n.clone(), any::<bool>()).prop_map(|(n, is_down)| Event::ProxyDown(n, is_down)),
        1 => n.clone().prop_map(Event::StopAService),
        1 => n.clone().prop_map(Event::DeleteRelease),
    ];
    let of_the_user = prop_oneof![
        4 => digit.clone().prop_map(Event::Push),
        3 => (digit, prop::sample::select(vec![Fate::Good, Fate::BuildFails, Fate::ToolMissing, Fate::NeverReady, Fate::CrashesBaking]))
            .prop_map(|(digit, fate)| Event::Fate(digit, fate)),
        1 => (1..4).prop_map(|slots| Event::Budget(IntOrString::Int(slots))),
        1 => Just(Event::Budget(IntOrString::String("70%".into()))),
        1 => prop::sample::select(vec![None, Some(Switch::Recreate), Some(Switch::BlueGreen)]).prop_map(Event::Switch),
        1 => prop::sample::select(vec![DeletionPolicy::Delete, DeletionPolicy::Orphan]).prop_map(Event::Policy),
        1 => (0_u32..3).prop_map(Event::Keep),
        1 => any::<bool>().prop_map(Event::Suspend),
        2 => (0_u8..3).prop_map(Event::Retry),
        1 => any::<bool>().prop_map(|orphan| Event::ApplyAnew { orphan }),
    ];
    prop_oneof![
        3 => of_a_node,
        3 => of_the_user,
        2 => (1_i64..6).prop_map(Event::Pass),
        1 => (100_i64..900).prop_map(Event::Pass),
        4 => n.clone().prop_map(Event::ControllerSees),
        8 => Just(Event::Reconcile { dies: false }),
        1 => Just(Event::Reconcile { dies: true }),
        2 => Just(Event::FinishDeletions),
        2 => n.clone().prop_map(Event::AgentSees),
        3 => (n.clone(), 1_usize..4).prop_map(|(n, steps)| Event::AgentWorks(n, steps)),
        2 => n.clone().prop_map(Event::AgentReports),
        12 => n.prop_map(Event::Agent),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    /// Whatever happens in whatever order, and however late each side sees it: the budget is kept, no two
    /// decisions share an id, nothing that runs is touched before a commit (the hosts check each step), and
    /// when all is well again every node serves what is wanted and both sides leave it alone.
    #[test]
    fn no_history_of_both_sides_does_harm_and_every_history_comes_to_rest(
        events in prop::collection::vec(event(), 0..120),
    ) {
        let mut cluster = Cluster::new();
        for event in &events {
            cluster.happen(event);
        }
        cluster.come_to_rest();
        let again = cluster.reconcile(false);
        prop_assert_eq!(again.steps, vec![]);
        prop_assert_eq!(again.revision, None);
        prop_assert_eq!(&again.status, cluster.world.status());
        prop_assert_eq!(cluster.world.ready().0, "True/Deployed");
        prop_assert_eq!(cluster.world.active(), Vec::<&str>::new());
        let revision = again.status.revision.unwrap();
        for agent in &cluster.agents {
            agent.host.check_settled();
            let serving = agent.host.applied.as_ref().and_then(|applied| applied.release.as_ref());
            prop_assert_eq!(serving.map(|s| s.revision.as_str()), Some(revision.as_str()));
            prop_assert_eq!(plan_app(&agent.host.observe()).steps, vec![]);
        }
    }
}
