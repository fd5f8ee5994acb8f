//! A node as callers use it.

use std::{
    ffi::OsStr,
    net::{Ipv4Addr, SocketAddrV4},
    process::{Command, Output, Stdio},
    time::Duration,
};

use rustix::process::Signal;

use crate::{
    error::{Context, Error, Result},
    network, node,
    state::{NodeName, Part},
    testbed::Testbed,
};

/// How long a command in a node may take.
const EXEC_LIMIT: Duration = Duration::from_secs(300);

/// A node of a testbed.
#[derive(Clone, Copy)]
pub struct NodeHandle<'a> {
    pub(crate) testbed: &'a Testbed,
    pub(crate) name: NodeName,
}

impl NodeHandle<'_> {
    /// Its name.
    pub fn name(&self) -> NodeName {
        self.name
    }

    /// Its address as the other parts see it.
    pub fn ip(&self) -> Ipv4Addr {
        self.testbed.description.node_address(self.name)
    }

    /// Where its proxy is reached from the machine's own network.
    pub fn forwarded_http(&self) -> Result<SocketAddrV4> {
        let testbed = self.testbed;
        let address = testbed.description.node_http(self.name);
        network::forwarded(&testbed.directory, &testbed.description, address)
    }

    /// A program in all of its namespaces, not started yet.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Result<Command> {
        let init = node::init(&self.testbed.directory, self.name)?;
        Ok(node::enter(&self.testbed.description, init, program))
    }

    /// Runs a command in all of its namespaces to the end, for at most 300 s.
    ///
    /// # Errors
    /// When it cannot be run; its own failure is in the output's status.
    pub async fn exec<S: AsRef<OsStr>>(
        &self,
        words: impl IntoIterator<Item = S>,
    ) -> Result<Output> {
        let mut words = words.into_iter();
        let program = words
            .next()
            .ok_or_else(|| Error::State("no command was given".to_owned()))?;
        let mut command = self.command(program)?;
        command.args(words).stdin(Stdio::null());
        let running = tokio::process::Command::from(command)
            .kill_on_drop(true)
            .output();
        match tokio::time::timeout(EXEC_LIMIT, running).await {
            Ok(output) => output.context(|| format!("run a command in {}", self.name)),
            Err(_elapsed) => Err(Error::NotReady {
                what: format!("the command in {} did not end", self.name),
                limit: EXEC_LIMIT,
                seen: "it still ran".to_owned(),
                log: String::new(),
            }),
        }
    }

    /// Runs a command as [`NodeHandle::exec`] does, and returns what it printed.
    ///
    /// # Errors
    /// When it exits with another status than 0, with what it said.
    pub async fn output<S: AsRef<OsStr>>(
        &self,
        words: impl IntoIterator<Item = S>,
    ) -> Result<String> {
        let words: Vec<_> = words
            .into_iter()
            .map(|word| word.as_ref().to_owned())
            .collect();
        let output = self.exec(&words).await?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout)
                .trim_end()
                .to_owned());
        }
        let words: Vec<_> = words.iter().map(|word| word.to_string_lossy()).collect();
        Err(Error::Command {
            command: words.join(" "),
            status: output.status.to_string(),
            output: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
        })
    }

    /// The address of its system bus, as any process of the machine sees it.
    pub fn bus_address(&self) -> Result<String> {
        Ok(node::bus_address(node::init(
            &self.testbed.directory,
            self.name,
        )?))
    }

    /// Cuts its power: every process is killed, nothing more is written.
    pub async fn power_off(&self) -> Result<()> {
        self.testbed.kill(Part::Node(self.name), Signal::KILL).await
    }

    /// Boots it, without its agent.
    pub async fn power_on(&self) -> Result<()> {
        self.testbed.start(Part::Node(self.name)).await
    }

    /// Shuts it down in order and boots it again, without its agent.
    pub async fn reboot(&self) -> Result<()> {
        node::shut_down(
            &self.testbed.directory,
            &self.testbed.description,
            self.name,
        )
        .await?;
        self.power_on().await
    }
}
