//! Does what was planned: small steps, each safe to do twice.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::host::mirror::{MirrorError, MirrorState, Want};
use super::host::port::{self, PortError};
use super::host::proxy::{DRAIN_LIMIT, OldWorkers, ProxyError, VirtualHost};
use super::host::records::{
    AttemptRecord, EnvDigest, KeptRecord, Outcome, ProcessRecord, RECORD_VERSION, RecordedFailure,
};
use super::host::seal::{self, SealError};
use super::host::store::{AppFolder, LOG_TAIL_BYTES, StoreError};
use super::host::systemd::SystemdError;
use super::host::unit::{self, BuildSpec, ProcessVariables, ServiceSpec, ServiceUnit, UnitError};
use super::host::users::{AppUsers, UsersError};
use super::mask::Masks;
use super::memory::InForce;
use super::node::{Node, is_over, lock, monotonic};
use super::observe::target_text;
use super::plan::{self, Step};
use super::secrets::{Carried, SecretError};
use super::view::{Health, Observed};
use super::wanted::source_want;
use crate::api::deployment::Process;
use crate::api::reasons::{Class, Reason};
use crate::api::release::{Purpose, SealedValue, Template};
use crate::certificate::{CertificateError, ServerCertificate};
use crate::git_credential::{GitCredential, GitCredentialError};
use crate::runtime::error_chain;
use crate::seal::data::{MalformedData, from_bytes};
use crate::seal::environment::SecretEnvironment;

/// The step of a build, in the names of logs.
pub const BUILD_STEP: &str = "build";

/// How long a step's unit may take to stop: its processes are killed, which is a matter of milliseconds.
const STEP_STOP_LIMIT: Duration = Duration::from_secs(20);

/// How long a service may take to stop: the longest grace period of the schema and the kill after it.
const SERVICE_STOP_LIMIT: Duration = Duration::from_secs(3600 + 60);

/// SIGKILL: what is killed has nothing to save.
const SIGKILL: i32 = 9;

/// Why a step was not done.
#[derive(Debug, thiserror::Error)]
pub enum StepError {
    /// The disk.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// systemd.
    #[error(transparent)]
    Systemd(#[from] SystemdError),
    /// The proxy.
    #[error(transparent)]
    Proxy(#[from] ProxyError),
    /// Users.
    #[error(transparent)]
    Users(#[from] UsersError),
    /// Sealing.
    #[error(transparent)]
    Seal(#[from] SealError),
    /// Units that cannot be made of the spec.
    #[error(transparent)]
    Unit(#[from] UnitError),
    /// Ports.
    #[error(transparent)]
    Port(#[from] PortError),
    /// Mirrors.
    #[error(transparent)]
    Mirror(#[from] MirrorError),
    /// What is secret.
    #[error(transparent)]
    Secret(#[from] SecretError),
    /// What is secret has another form: the controller is of another version.
    #[error(transparent)]
    Data(#[from] MalformedData),
    /// The repository's credential.
    #[error("the sealed credential of the repository cannot be used: {0}")]
    Credential(#[from] GitCredentialError),
    /// A route's certificate.
    #[error("the sealed certificate of a route cannot be used: {0}")]
    Certificate(#[from] CertificateError),
    /// A program that is needed is not there.
    #[error("{program} is not on this node; searched: {searched}")]
    ToolMissing {
        /// The program.
        program: &'static str,
        /// Where it was looked for.
        searched: String,
    },
    /// A limit without which nothing is run.
    #[error(
        "systemd on this node does not enforce {limits}: nothing is built or run here before it does"
    )]
    LimitsUnenforced {
        /// Which.
        limits: String,
    },
    /// The plan does not fit the host any more; the next look will tell.
    #[error("{0}")]
    Outdated(&'static str),
}

impl StepError {
    /// What it means to the attempt.
    pub fn failure(&self) -> RecordedFailure {
        let reason = match self {
            Self::Store(_)
            | Self::Seal(SealError::Io { .. })
            | Self::Secret(SecretError::Store(_)) => Reason::DiskPressure,
            Self::Secret(
                SecretError::Absent { .. } | SecretError::Sealed { .. } | SecretError::Malformed(_),
            )
            | Self::Data(_)
            | Self::Credential(_)
            | Self::Certificate(_) => Reason::SealedForOtherKey,
            Self::Proxy(error) => error.reason(),
            Self::Systemd(SystemdError::BadUnit { .. }) => Reason::BadUnit,
            Self::Unit(_) => Reason::InvalidSpec,
            Self::Seal(SealError::DirectoryNotFound { .. }) => Reason::DirectoryNotFound,
            Self::Mirror(_) => Reason::SourceUnavailable,
            Self::ToolMissing { .. } => Reason::ToolMissing,
            Self::Systemd(_)
            | Self::Users(_)
            | Self::Port(_)
            | Self::Seal(_)
            | Self::LimitsUnenforced { .. }
            | Self::Outdated(_) => Reason::LimitsUnenforced,
        };
        RecordedFailure {
            reason,
            message: error_chain(self),
            log_tail: None,
        }
    }

    /// Whether the wish itself is at fault: trying again changes nothing.
    fn is_final(&self) -> bool {
        matches!(
            self.failure().reason.class(),
            Class::Revision | Class::Invalid
        )
    }
}

/// The environment of a process as it is on the disk.
struct Environment {
    variables: ProcessVariables,
    digest: EnvDigest,
    file: PathBuf,
}

/// What a step that was not done leads to.
#[derive(Debug)]
pub enum Halt {
    /// The attempt is recorded as failed: plan again.
    AttemptFailed,
    /// The surroundings; it is held up, and tried again later.
    HeldUp(StepError),
}

/// Does the steps up to the first that fails.
pub async fn apply(node: &Arc<Node>, observed: &Observed, steps: &[Step]) -> Result<(), Halt> {
    for step in steps {
        tracing::info!(app = %observed.app, step = step.name(), "step");
        if let Err(error) = (Apply { node, observed }).step(step).await {
            return Err(halt(node, observed, step, error));
        }
    }
    Ok(())
}

fn halt(node: &Node, observed: &Observed, step: &Step, error: StepError) -> Halt {
    let attempt = observed
        .attempt
        .as_ref()
        .filter(|attempt| attempt.outcome.is_none());
    if let Some(attempt) = attempt.filter(|_| error.is_final() && step.is_of_attempt()) {
        let failure = error.failure();
        let failed = AttemptRecord {
            outcome: Some(Outcome::Failed {
                at: observed.wall,
                failure,
                undone: false,
            }),
            ..attempt.clone()
        };
        match node.store.app(&observed.app).write_attempt(&failed) {
            Ok(()) => return Halt::AttemptFailed,
            Err(error) => return Halt::HeldUp(error.into()),
        }
    }
    let memory = node.memory(&observed.app);
    lock(&memory).hold_up(error.failure(), monotonic(), fastrand::f64());
    Halt::HeldUp(error)
}

struct Apply<'a> {
    node: &'a Arc<Node>,
    observed: &'a Observed,
}

impl Apply<'_> {
    async fn step(&self, step: &Step) -> Result<(), StepError> {
        let node = self.node;
        let app = &self.observed.app;
        let folder = node.store.app(app);
        let memory = node.memory(app);
        match step {
            Step::WriteAttempt(record) => {
                folder.create()?;
                folder.write_attempt(&self.with_log(record).await)?;
                if lock(&node.keys).has_older() {
                    // This may have been the last that was sealed to an old one.
                    node.collect.notify_one();
                }
                if is_over(record) {
                    node.release_hosts(app);
                }
                if record.outcome.is_some() {
                    node.withdraw(app);
                    lock(&memory).went_well();
                }
            }
            Step::WriteApplied(record) => {
                folder.create()?;
                let mut record = record.clone();
                if let Some(release) = &mut record.release {
                    release.sealed = node.keepable(app, Carried::from(&*release));
                }
                folder.write_applied(&record)?;
            }
            Step::WriteRelease(record) => {
                let mut record = record.clone();
                record.sealed = node.keepable(app, Carried::from(&*record));
                folder.write_release(&record)?;
            }
            Step::WantCommit => self.want_commit()?,
            Step::StartBuild => self.start_build(&folder).await?,
            Step::StopBuild { unit, kill: _ } => {
                // Killed in either case: what a build left running has nothing to save.
                let _ = node.systemd.kill_unit(unit, SIGKILL).await;
                node.systemd.stop_unit(unit, STEP_STOP_LIMIT).await?;
                node.trash.notify_one();
            }
            Step::Seal => {
                let attempt = self.attempt()?;
                let (key, build_try) = (attempt.build_key.clone(), attempt.build_try);
                blocking(move || seal::seal(&folder, &key, build_try)).await?;
                lock(&memory).went_well();
                node.trash.notify_one();
            }
            Step::HoldUp(failure) => {
                let failure = self.explained(failure);
                lock(&memory).hold_up(failure, monotonic(), fastrand::f64());
            }
            Step::SuspectMirror => node.mirrors.suspect(app),
            Step::ChooseProcesses { keep } => self.choose(&folder, keep).await?,
            Step::WriteUnits(records) => self.write_units(&folder, records).await?,
            Step::ReloadManager => node.systemd.daemon_reload().await?,
            Step::StartUnits(units) => {
                for unit in units {
                    node.systemd.start_unit(unit).await?;
                }
            }
            Step::StopUnits(units) => self.stop_units(units),
            Step::RemoveUnits(units) => {
                for unit in units {
                    node.units.remove(unit)?;
                    forget(node, unit).await?;
                }
            }
            Step::Publish(host) => self.publish(host).await?,
            Step::RemoveVirtualHost => {
                let old = node.proxy.remove(app).await?;
                self.note_traffic(None, old);
                node.release_hosts(app);
            }
            Step::BeginDrain => {
                // A proxy that does not run has nothing under way.
                let workers = node.proxy.retiring_workers().await.unwrap_or_default();
                lock(&memory).begin_drain(workers, monotonic() + DRAIN_LIMIT);
            }
            Step::WriteTarget { release_id, units } => {
                let target = unit::target_name(app);
                node.units
                    .write(&target, &target_text(app, *release_id, units))?;
                node.units.enable(&target)?;
            }
            Step::RemoveTarget => {
                let target = unit::target_name(app);
                node.units.disable(&target)?;
                node.units.remove(&target)?;
                node.systemd.stop_unit(&target, STEP_STOP_LIMIT).await?;
            }
            Step::RemoveFiles { keep_state } => {
                node.users.remove_app(&folder)?;
                node.mirrors.release(app).await?;
                if *keep_state && folder.has_state()? {
                    let applied = &self.observed.applied;
                    folder.write_kept(&KeptRecord {
                        version: RECORD_VERSION,
                        deployment_uid: applied.as_ref().and_then(|a| a.deployment_uid.clone()),
                        since: self.observed.wall,
                    })?;
                    folder.remove_all_but_state()?;
                } else {
                    folder.remove()?;
                }
                node.trash.notify_one();
                node.held.notify_one();
                node.withdraw(app);
                node.release_hosts(app);
                let mut memory = lock(&memory);
                let (wish, written) = (std::mem::take(&mut memory.wish), memory.written.take());
                *memory = super::memory::Memory {
                    wish,
                    written,
                    ..Default::default()
                };
            }
            Step::TakeState { keep } => {
                if !keep {
                    tracing::warn!(%app, "another Deployment of this name left state here: it is deleted");
                    folder.remove_state()?;
                    node.trash.notify_one();
                }
                folder.remove_kept()?;
                folder.create()?;
            }
        }
        Ok(())
    }

    fn attempt(&self) -> Result<&AttemptRecord, StepError> {
        self.observed
            .attempt
            .as_ref()
            .ok_or(StepError::Outdated("there is no attempt"))
    }

    // ---- Build ------------------------------------------------------------

    /// What the repository is read with, opened for its one use.
    fn git_credential(&self, want: &Want) -> Result<Option<Arc<GitCredential>>, StepError> {
        let attempt = self.attempt()?;
        let mut sealed = attempt.wish.sealed.iter();
        let Some(sealed) = sealed.find(|sealed| sealed.purpose == Purpose::Git) else {
            return Ok(None);
        };
        let app = &self.observed.app;
        let bytes =
            self.node
                .open_secret(app, Carried::from(attempt), Purpose::Git, &sealed.name)?;
        let credential = GitCredential::parse(want.source.as_str(), &from_bytes(&bytes)?)?;
        Ok(Some(Arc::new(credential)))
    }

    fn want_commit(&self) -> Result<(), StepError> {
        let applied = self.observed.applied.as_ref();
        self.require_tool("git")?;
        let Some(want) = source_want(self.attempt()?, applied) else {
            return Err(StepError::Outdated(
                "the url was valid when the wish was read",
            ));
        };
        let memory = self.node.memory(&self.observed.app);
        let credential = self.git_credential(&want)?;
        self.node
            .mirrors
            .want(&self.observed.app, want.clone(), credential);
        lock(&memory).want = Some(want);
        Ok(())
    }

    fn require_tool(&self, program: &'static str) -> Result<(), StepError> {
        let searched = &self.node.tool_path;
        let found = searched
            .split(':')
            .any(|folder| std::path::Path::new(folder).join(program).is_file());
        if found {
            Ok(())
        } else {
            Err(StepError::ToolMissing {
                program,
                searched: searched.clone(),
            })
        }
    }

    async fn start_build(&self, folder: &AppFolder) -> Result<(), StepError> {
        let node = self.node;
        let AttemptRecord {
            wish,
            build_key,
            build_try,
            ..
        } = self.attempt()?;
        let missing: Vec<&str> = node
            .limits
            .by_name()
            .into_iter()
            .filter(|(name, proven)| !proven && *name != IP_ADDRESS_DENY)
            .map(|(name, _)| name)
            .collect();
        if !missing.is_empty() {
            return Err(StepError::LimitsUnenforced {
                limits: missing.join(", "),
            });
        }
        let Some(MirrorState::Ready { mirror }) = node.mirrors.state(&self.observed.app) else {
            return Err(StepError::Outdated("the mirror has the commit no more"));
        };
        let build = wish.template.build.as_ref();
        let users = self.users(folder).await?;
        let directory = wish.template.source.directory.as_deref();
        let caches = self.open_caches(folder, users.build.uid).await?;
        let mut script = build.map(unit::build_script).transpose()?;
        // With submodules the directory may be in one of them, of which the commit alone does not tell.
        let needs_check = !caches.is_empty() && !wish.template.source.submodules;
        if let Some(script) = script.as_mut().filter(|_| needs_check) {
            let check = unit::directory_check(&wish.commit, directory, &node.tool_path)?;
            script.insert_str(0, &check);
        }
        let stage =
            folder.create_stage(build_key, *build_try, users.build.uid, script.as_deref())?;
        for (_, place) in &caches {
            stage.create_folder(place, users.build.uid)?;
        }
        let env_file = match build {
            Some(build) => Some(folder.write_env(&unit::build_environment(build)?)?.1),
            None => None,
        };
        let spec = BuildSpec {
            app: &self.observed.app,
            commit: &wish.commit,
            mirror: &mirror,
            stage: &stage,
            directory,
            submodules: wish.template.source.submodules,
            build,
            caches: &caches,
            env_file: env_file.as_deref(),
            user: &users.build.name,
            tool_path: &node.tool_path,
            log: &folder.log(&wish.release_id, BUILD_STEP),
        };
        let settings = unit::step_properties(&unit::build_step(&spec)?)?;
        let name = unit::build_unit_name(&self.observed.app, &wish.release_id, *build_try);
        node.systemd.start_transient(&name, &settings).await?;
        Ok(())
    }

    /// The caches of the attempt's build: where they are on the node and in the tree.
    async fn open_caches(
        &self,
        folder: &AppFolder,
        uid: u32,
    ) -> Result<Vec<(PathBuf, PathBuf)>, StepError> {
        let wish = &self.attempt()?.wish;
        let mut caches = vec![];
        let build = wish.template.build.iter();
        for directory in build.flat_map(|build| &build.cache_directories) {
            let (of, name) = (folder.clone(), directory.clone());
            let cache = blocking(move || of.open_cache(&name, uid)).await?;
            if let Some(why) = cache.emptied {
                let line = format!("the cache directory {directory} was emptied: {why}");
                tracing::info!(app = %self.observed.app, "{line}");
                folder.append_log(&wish.release_id, BUILD_STEP, &line)?;
                self.node.trash.notify_one();
            }
            let source_directory = wish.template.source.directory.as_deref();
            caches.push((cache.path, unit::cache_place(source_directory, directory)));
        }
        Ok(caches)
    }

    async fn users(&self, folder: &AppFolder) -> Result<AppUsers, StepError> {
        let (node, folder) = (Arc::clone(self.node), folder.clone());
        Ok(blocking(move || node.users.ensure_app(&folder)).await?)
    }

    /// A failure of a build with the end of its log, and a missing tool with where it was looked for.
    fn explained(&self, failure: &RecordedFailure) -> RecordedFailure {
        let mut failure = failure.clone();
        if failure.reason == Reason::ToolMissing {
            failure.message = format!("{}; searched: {}", failure.message, self.node.tool_path);
        }
        if let Some(attempt) = &self.observed.attempt
            && failure.log_tail.is_none()
        {
            let folder = self.node.store.app(&self.observed.app);
            // The tail is a help for people; the failure is told without it as well.
            failure.log_tail = folder
                .log_tail(&attempt.wish.release_id, BUILD_STEP)
                .ok()
                .flatten();
        }
        failure
    }

    /// The record, with the last words of what failed.
    async fn with_log(&self, record: &AttemptRecord) -> AttemptRecord {
        let mut record = record.clone();
        let of_build = record
            .build_result
            .as_ref()
            .is_some_and(|result| !result.is_success());
        let failing = self.failing_unit(&record);
        let applied = self.observed.applied.as_ref();
        let app = &self.observed.app;
        let masks = self.node.masks(app, Some(&record), applied);
        if let Some(Outcome::Failed {
            failure,
            undone: false,
            ..
        }) = &mut record.outcome
        {
            match failing {
                _ if of_build => *failure = self.explained(failure),
                Some(unit) => {
                    failure.log_tail = journal_tail(&unit, &masks).await;
                }
                None => {}
            }
        }
        record
    }

    /// The unit of the attempt that is at fault, if one is.
    fn failing_unit(&self, record: &AttemptRecord) -> Option<String> {
        let failed = |unit: &String| {
            let service = self.observed.host.services.get(unit);
            service.is_some_and(|service| matches!(service.health, Health::Failed(_)))
        };
        let mut units = record.processes.iter().map(|process| &process.unit);
        units.find(|unit| failed(unit)).cloned()
    }

    // ---- Processes --------------------------------------------------------

    /// Chooses units and ports. A port is free when it is chosen, and no other app of the node has it on
    /// record: hence one choice at a time, which ends with the record.
    async fn choose(&self, folder: &AppFolder, keep: &BTreeSet<String>) -> Result<(), StepError> {
        let node = self.node;
        let attempt = self.attempt()?;
        let tree = folder.build(&attempt.build_key);
        seal::resolve_beneath(&tree, attempt.wish.template.source.directory.as_deref())?;
        let users = self.users(folder).await?;
        let template = &attempt.wish.template;
        let app = &self.observed.app;
        let secrets = node.open_environment(app, template, Carried::from(attempt))?;
        let _choosing = node.choosing.lock().await;
        let mut held = self.held_ports()?;
        let mut processes = vec![];
        for process in &template.processes {
            let env = self.write_environment(folder, template, process, &secrets)?;
            processes
                .push(self.choose_process(folder, attempt, process, env, &users, &mut held, keep)?);
        }
        folder.write_attempt(&AttemptRecord {
            processes,
            ..attempt.clone()
        })?;
        Ok(())
    }

    /// Writes the environment file of a process, and returns its variables with the file's digest and path.
    fn write_environment(
        &self,
        folder: &AppFolder,
        template: &Template,
        process: &Process,
        secrets: &SecretEnvironment,
    ) -> Result<Environment, StepError> {
        let variables = ProcessVariables::of(&template.env, &template.secret_env, process);
        let digest = variables.digest(process)?;
        let file = folder.write_env_as(&digest, &variables.content(process, secrets)?)?;
        Ok(Environment {
            variables,
            digest,
            file,
        })
    }

    #[allow(clippy::too_many_arguments, reason = "what one process is chosen from")]
    fn choose_process(
        &self,
        folder: &AppFolder,
        attempt: &AttemptRecord,
        process: &Process,
        Environment {
            variables,
            digest: env_digest,
            file: env_file,
        }: Environment,
        users: &AppUsers,
        held: &mut BTreeSet<u16>,
        keep: &BTreeSet<String>,
    ) -> Result<ProcessRecord, StepError> {
        let state = match process.state_directory {
            true => Some(folder.create_state(&process.name, users.service.uid)?),
            false => None,
        };
        let tree = folder.build(&attempt.build_key);
        let render = |port: Option<u16>| -> Result<ServiceUnit, UnitError> {
            unit::service_unit(&ServiceSpec {
                app: &self.observed.app,
                process,
                variables: &variables.plain,
                env_file: &env_file,
                port,
                commit: &attempt.wish.commit,
                node: &self.node.name,
                tree: &tree,
                directory: attempt.wish.template.source.directory.as_deref(),
                state: state.as_deref(),
                user: &users.service.name,
                tool_path: &self.node.tool_path,
            })
        };
        let applied = plan::committed(self.observed).and_then(|release| {
            release
                .processes
                .iter()
                .find(|old| old.name == process.name && keep.contains(&old.name))
        });
        let wants_port = process.port.is_some();
        if let Some(applied) = applied.filter(|applied| applied.port.is_some() == wants_port)
            && render(applied.port)?.content == applied.content
        {
            return Ok(applied.clone());
        }
        let port = match wants_port {
            true => {
                let port = port::pick(&self.node.ports, held)?;
                held.insert(port);
                Some(port)
            }
            false => None,
        };
        let ServiceUnit {
            name: unit,
            text,
            content,
        } = render(port)?;
        Ok(ProcessRecord {
            name: process.name.clone(),
            unit,
            text,
            content,
            port,
            env_digest,
        })
    }

    /// The ports that any app of the node has on record. A record that cannot be read holds nobody else up:
    /// a port that its app listens on is not free all the same.
    fn held_ports(&self) -> Result<BTreeSet<u16>, StepError> {
        let mut held = BTreeSet::new();
        for app in self.node.store.apps()? {
            let folder = self.node.store.app(&app);
            let (applied, attempt) = match (folder.read_applied(), folder.read_attempt()) {
                (Ok(applied), Ok(attempt)) => (applied, attempt),
                (Err(error), _) | (_, Err(error)) => {
                    tracing::warn!(%app, %error, "the ports of an app are not known");
                    continue;
                }
            };
            let applied = applied.and_then(|applied| applied.release);
            held.extend(
                applied
                    .iter()
                    .flat_map(|release| &release.processes)
                    .filter_map(|process| process.port),
            );
            held.extend(
                attempt
                    .iter()
                    .flat_map(|attempt| &attempt.processes)
                    .filter_map(|process| process.port),
            );
        }
        Ok(held)
    }

    /// Writes units, and puts back what they need besides: users and environment files.
    async fn write_units(
        &self,
        folder: &AppFolder,
        records: &[ProcessRecord],
    ) -> Result<(), StepError> {
        self.users(folder).await?;
        let applied = plan::committed(self.observed);
        let applied = applied.map(|release| (&release.template, Carried::from(release)));
        let attempt = self.observed.attempt.as_ref();
        let tried = attempt.map(|attempt| (&attempt.wish.template, Carried::from(attempt)));
        for (template, carried) in tried.into_iter().chain(applied) {
            for process in &template.processes {
                let variables = ProcessVariables::of(&template.env, &template.secret_env, process);
                let digest = variables.digest(process)?;
                if !records
                    .iter()
                    .any(|record| record.name == process.name && record.env_digest == digest)
                {
                    continue;
                }
                let secrets = match variables.has_secrets() {
                    true => self
                        .node
                        .open_environment(&self.observed.app, template, carried),
                    false => Ok(SecretEnvironment::default()),
                };
                match secrets {
                    Ok(secrets) => {
                        let content = variables.content(process, &secrets)?;
                        folder.write_env_as(&digest, &content)?;
                    }
                    // What is there was opened when it could be.
                    Err(_) if folder.env_file(&digest).is_file() => {}
                    Err(error) => return Err(error.into()),
                }
            }
        }
        for record in records {
            self.node.units.write(&record.unit, &record.text)?;
        }
        Ok(())
    }

    /// Stops services, each for itself: one may take its whole grace period. The app is woken when it has
    /// stopped.
    fn stop_units(&self, units: &[String]) {
        let memory = self.node.memory(&self.observed.app);
        for unit in units {
            if !lock(&memory).stopping.insert(unit.clone()) {
                continue;
            }
            let (node, app, unit) = (
                Arc::clone(self.node),
                self.observed.app.clone(),
                unit.clone(),
            );
            let memory = Arc::clone(&memory);
            tokio::spawn(async move {
                if let Err(error) = node.systemd.stop_unit(&unit, SERVICE_STOP_LIMIT).await {
                    tracing::warn!(%app, unit, "cannot stop it: {}", error_chain(&error));
                }
                lock(&memory).stopping.remove(&unit);
                node.trigger.wake(app);
            });
        }
    }

    // ---- Traffic ----------------------------------------------------------

    async fn publish(&self, host: &VirtualHost) -> Result<(), StepError> {
        self.keep_certificates(host)?;
        let old = self.node.proxy.publish(host).await?;
        self.note_traffic(Some(host.clone()), old);
        Ok(())
    }

    /// Writes the certificates of a host that are not on the disk yet. Those that are need no key of the node's.
    fn keep_certificates(&self, host: &VirtualHost) -> Result<(), StepError> {
        let app = &self.observed.app;
        for id in host.certificates() {
            if self.node.proxy.has_certificate(app, id) {
                continue;
            }
            let attempt = self.observed.attempt.iter().map(Carried::from);
            let applied = plan::committed(self.observed)
                .into_iter()
                .map(Carried::from);
            let found = attempt.chain(applied).find_map(|carried| {
                let is_it = |s: &&SealedValue| s.purpose == Purpose::Tls && s.digest == id.as_str();
                Some((carried, carried.sealed.iter().find(is_it)?))
            });
            let Some((carried, sealed)) = found else {
                // Said by the proxy, which names the host.
                continue;
            };
            let bytes = self
                .node
                .open_secret(app, carried, Purpose::Tls, &sealed.name)?;
            let certificate = ServerCertificate::parse(&from_bytes(&bytes)?)?;
            self.node.proxy.keep_certificate(app, id, &certificate)?;
        }
        Ok(())
    }

    fn note_traffic(&self, host: Option<VirtualHost>, old: OldWorkers) {
        let now = monotonic();
        let memory = self.node.memory(&self.observed.app);
        let mut memory = lock(&memory);
        memory.in_force = host.map(|host| InForce {
            host,
            since: now,
            measured: now,
        });
        if !old.is_empty() {
            memory.begin_drain(old, now + DRAIN_LIMIT);
        }
        memory.went_well();
    }
}

/// The last lines that a service has written, where the node keeps a journal: a help for people, so
/// that none is no error.
async fn journal_tail(unit: &str, masks: &Masks) -> Option<String> {
    // What a service said right before its end may not be in the journal yet on a busy node.
    let _ = journalctl(&["--sync".to_owned()]).await;
    let arguments = ["--no-pager", "--quiet", "--output=cat", "--lines=20"];
    let mut arguments = arguments.map(str::to_owned).to_vec();
    arguments.push(format!("_SYSTEMD_UNIT={unit}"));
    let output = journalctl(&arguments).await?;
    let text = String::from_utf8_lossy(&output.stdout);
    let text: String = text
        .chars()
        .filter(|c| *c == '\n' || *c == '\t' || !c.is_control())
        .collect();
    // Before it is cut, or half a value would stay.
    let text = masks.mask(&text);
    let start = text.len().saturating_sub(LOG_TAIL_BYTES);
    let start = (start..text.len()).find(|at| text.is_char_boundary(*at))?;
    let tail = text[start..].trim_end().to_owned();
    (!tail.is_empty()).then_some(tail)
}

/// What `journalctl` says; nothing where it cannot be asked, or not in time.
async fn journalctl(arguments: &[String]) -> Option<std::process::Output> {
    let mut command = tokio::process::Command::new("journalctl");
    command
        .args(arguments)
        .stdin(std::process::Stdio::null())
        .kill_on_drop(true);
    let output = tokio::time::timeout(JOURNAL_LIMIT, command.output()).await;
    output.ok()?.ok()
}

/// How long the journal may take.
const JOURNAL_LIMIT: Duration = Duration::from_secs(5);

/// As [`super::host::limits::Limits::by_name`] calls it. It needs a kernel feature that some distributions leave
/// out, and what it guards (a cloud's metadata service) is not on every node: told in the Lease, not required.
const IP_ADDRESS_DENY: &str = "IPAddressDeny";

/// A unit whose file is gone is forgotten by systemd when nothing is said of it any more.
async fn forget(node: &Node, unit: &str) -> Result<(), SystemdError> {
    match node.systemd.reset_failed(unit).await {
        Ok(()) | Err(SystemdError::NoSuchUnit { .. }) => Ok(()),
        Err(error) => Err(error),
    }
}

/// Walks of trees and look-ups of users, on a thread for such.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(value) => value,
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}

impl Step {
    /// Its name, for logs.
    pub fn name(&self) -> &'static str {
        match self {
            Self::WriteAttempt(_) => "WriteAttempt",
            Self::WriteApplied(_) => "WriteApplied",
            Self::WriteRelease(_) => "WriteRelease",
            Self::WantCommit => "WantCommit",
            Self::StartBuild => "StartBuild",
            Self::StopBuild { .. } => "StopBuild",
            Self::Seal => "Seal",
            Self::HoldUp(_) => "HoldUp",
            Self::SuspectMirror => "SuspectMirror",
            Self::ChooseProcesses { .. } => "ChooseProcesses",
            Self::WriteUnits(_) => "WriteUnits",
            Self::ReloadManager => "ReloadManager",
            Self::StartUnits(_) => "StartUnits",
            Self::StopUnits(_) => "StopUnits",
            Self::RemoveUnits(_) => "RemoveUnits",
            Self::Publish(_) => "Publish",
            Self::RemoveVirtualHost => "RemoveVirtualHost",
            Self::BeginDrain => "BeginDrain",
            Self::WriteTarget { .. } => "WriteTarget",
            Self::RemoveTarget => "RemoveTarget",
            Self::RemoveFiles { .. } => "RemoveFiles",
            Self::TakeState { .. } => "TakeState",
        }
    }

    /// Whether a fault of the wish shows in it: the others put right or take away what is there.
    fn is_of_attempt(&self) -> bool {
        matches!(
            self,
            Self::WantCommit
                | Self::StartBuild
                | Self::Seal
                | Self::ChooseProcesses { .. }
                | Self::StartUnits(_)
        )
    }
}
