//! A node as a list of lines, so that two looks can be compared.

use super::{LIMIT, Space, until};

/// All of a node that an app might leave something in, a line for each thing; logs and the journal left out,
/// and the folders that the node only shares with the machine. Where it has a kubelet its Pods come and go: what is
/// of them is left out.
const SNAPSHOT: &str = r#"
{
find /etc /var /opt /srv /run /tmp /dev \( -path /run/systemd/journal -o -path /var/log -o -path /run/log -o -path /var/lib/apt -o -path /var/cache -o -path "/var/tmp/kari-*" -o -path /var/lib/kari-testbed \) -prune -o -printf '%p %y %m %U:%G %l\n' 2>/dev/null | grep -v '/var/lib/kari/proxy/.*\.log'
systemctl list-units --all --plain --no-legend | awk '{print $1, $2, $3, $4}'
getent passwd; getent group
ss -Hlntux | awk '{print $1, $5}'
awk '{print $5, $9}' /proc/self/mountinfo
find /sys/fs/cgroup -type d
} | grep -vE 'containerd|kube(let|pods|-proxy)|/cni'
"#;

/// What is on a node now.
pub async fn of(space: &Space, node: &str) -> Vec<String> {
    let text = space.on(node, &["sh", "-c", SNAPSHOT]).await;
    let mut lines: Vec<_> = text.lines().map(str::to_owned).collect();
    lines.sort();
    lines.dedup();
    lines
}

/// The same without the logs of builds: those of a release go when it is not the wanted one any more.
pub async fn without_logs(space: &Space, node: &str) -> Vec<String> {
    let mut lines = of(space, node).await;
    lines.retain(|line| !line.contains(".shop/logs/"));
    lines
}

/// What is on a node whose agent has made all that it makes at its start.
pub async fn at_rest(space: &Space, node: &str) -> Vec<String> {
    until("the agent has made what is its own", LIMIT, || async {
        let lines = of(space, node).await;
        let has = |path: &str| {
            lines
                .iter()
                .any(|line| line.starts_with(&format!("{path} ")))
        };
        if has("/run/kari/agent.sock") && has("/var/lib/kari/ballast") {
            Ok(lines)
        } else {
            Err("no socket or no ballast")
        }
    })
    .await
}

/// What is in one snapshot and not in the other; nothing where they are equal.
pub fn difference(before: &[String], after: &[String]) -> String {
    let gone = before
        .iter()
        .filter(|line| after.binary_search(line).is_err())
        .map(|line| format!("- {line}\n"));
    let new = after
        .iter()
        .filter(|line| before.binary_search(line).is_err())
        .map(|line| format!("+ {line}\n"));
    gone.chain(new).collect()
}
