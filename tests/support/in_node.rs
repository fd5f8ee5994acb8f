//! Tests that are about a node's systemd, nginx and git run there: each runs twice, outside, where it copies
//! its program into a node and starts itself there, and in the node, where it is what its name says.

use std::fs::File;

use testbed::{Options, Testbed};
use tokio::sync::{Mutex, OnceCell};

/// Set where a test runs in the node.
const IN_NODE: &str = "KARI_TEST_IN_NODE";
/// The test's program in the node.
const PROGRAM: &str = "/root/test";

/// One node for all tests of a program; taken down when it ends.
static TESTBED: OnceCell<Testbed> = OnceCell::const_new();
/// One test at a time: a node has one proxy and one store.
static TURN: Mutex<()> = Mutex::const_new(());

/// Outside: runs the test of this path in the node, and is true. In the node: false.
pub async fn outside(path: &str) -> bool {
    if std::env::var_os(IN_NODE).is_some() {
        return false;
    }
    let _turn = TURN.lock().await;
    let testbed = TESTBED.get_or_init(node_with_this_program).await;
    let test = path
        .split("::")
        .nth(1)
        .expect("the path of a test function");
    let variable = format!("{IN_NODE}=1");
    let mut words = vec!["env".to_owned(), variable];
    words.extend(std::env::var("SWITCHES").map(|switches| format!("SWITCHES={switches}")));
    words.extend([PROGRAM, "--exact", test, "--nocapture"].map(str::to_owned));
    let node = testbed.node("n1").expect("the node");
    let output = node.exec(words).await.expect("a command in the node");
    let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(
        output.status.success() && text.contains("1 passed"),
        "{text}"
    );
    print!("{text}");
    true
}

async fn node_with_this_program() -> Testbed {
    let options = Options {
        kari: false,
        ..Options::default()
    };
    let testbed = Testbed::up(options).await.expect("a testbed");
    let node = testbed.node("n1").expect("the node");
    let mut copy = node.command("sh").expect("a command for the node");
    copy.args(["-c", &format!("cat >{PROGRAM} && chmod 755 {PROGRAM}")]);
    copy.stdin(File::open(std::env::current_exe().expect("this program")).expect("this program"));
    assert!(copy.status().expect("a copy").success());
    testbed
}
