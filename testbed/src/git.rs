//! The git server: bare repositories over smart http.
//!
//! HTTP is spoken here, git by `git http-backend`. Everybody may read, by any
//! commit's id too; nobody may push: repositories change by [`commit`] and
//! [`mirror`] alone.

use std::{
    fs,
    net::SocketAddrV4,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use axum::{
    Router,
    body::Body,
    extract::{Request, State},
    http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header},
    response::{IntoResponse, Response},
};
use futures::{StreamExt, TryStreamExt};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio_util::io::{ReaderStream, StreamReader};

use crate::{
    error::{Context, Error, Result},
    network, process, program,
    state::{Description, Directory, Part, write_file},
    wait::{Seen, until},
};

/// How long the server may take to listen: it needs milliseconds.
const START_LIMIT: Duration = Duration::from_secs(10);

/// How long `git http-backend` may take to begin an answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(60);

/// The settings of every git process here, and no others.
const SETTINGS: &str = "[safe]
	directory = *
[uploadpack]
	allowAnySHA1InWant = true
	allowFilter = true
[http]
	receivepack = false
[gc]
	auto = 0
[user]
	name = Kari testbed
	email = testbed@kari.dev
";

/// A repository's name as it stands in its URL: a word, without `.git`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RepositoryName(String);

impl std::str::FromStr for RepositoryName {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let fits = !text.is_empty()
            && text.len() <= 100
            && !text.starts_with(['.', '-'])
            && text
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || "._-".contains(c));
        if fits {
            Ok(Self(text.trim_end_matches(".git").to_owned()))
        } else {
            Err(format!(
                "{text:?} cannot be a repository's name: use up to 100 letters, digits, dots, dashes and underscores"
            ))
        }
    }
}

/// A commit that the server offers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Repository {
    /// The URL of its repository.
    pub url: String,
    /// The commit to which HEAD leads, 40 hexadecimal digits.
    pub commit: String,
}

/// Makes the folder of repositories and starts the server.
pub async fn start(directory: &Directory, description: &Description) -> Result<()> {
    let root = directory.make_folder("git")?;
    write_file(&settings(directory), SETTINGS.as_bytes())?;
    let address = description.addresses.git;
    let namespace = network::namespace(directory, description)?;
    let mut command = network::command(namespace.as_deref(), &program::testbed()?);
    command
        .arg("__serve-git")
        .arg("--root")
        .arg(root)
        .arg("--listen")
        .arg(address.to_string());
    let server = process::start(&command, &description.id, &directory.log(Part::Git))?;
    directory.record_process(Part::Git, server)?;
    until(
        "the git server is not there",
        START_LIMIT,
        || directory.log_tail(Part::Git),
        async || match network::connect(namespace.clone(), address).await {
            Ok(_) => Seen::Ready(()),
            Err(_) if !server.is_alive() => Seen::Never("its process ended".to_owned()),
            Err(error) => Seen::NotYet(error.to_string()),
        },
    )
    .await
}

/// Commits a folder's files to `main` of a repository, which is made if new.
/// Where they are the same as before, there is no new commit.
pub fn commit(
    directory: &Directory,
    description: &Description,
    name: &RepositoryName,
    folder: &Path,
    message: &str,
) -> Result<Repository> {
    if !folder.is_dir() {
        return Err(Error::State(format!("{} is no folder", folder.display())));
    }
    // git reads a relative work tree from within the folder itself.
    let folder = &fs::canonicalize(folder).context(|| format!("find {}", folder.display()))?;
    let repository = path(directory, name);
    let git = || {
        let mut command = git(directory);
        command
            .env("GIT_DIR", &repository)
            .env("GIT_WORK_TREE", folder)
            .env("GIT_INDEX_FILE", repository.join("testbed.index"))
            .current_dir(folder);
        command
    };
    if !repository.exists() {
        let mut command = self::git(directory);
        command.args(["init", "--quiet", "--bare", "--initial-branch=main"]);
        process::run(command.arg(&repository))?;
    }
    process::run(git().args(["add", "--all", "."]))?;
    let tree = process::run(git().arg("write-tree"))?;
    let parent = process::run(git().args([
        "rev-parse",
        "--quiet",
        "--verify",
        "refs/heads/main^{commit}",
    ]))
    .ok();
    let mut arguments = vec!["commit-tree", &tree, "-m", message];
    if let Some(parent) = &parent {
        let before = process::run(git().args(["rev-parse", &format!("{parent}^{{tree}}")]))?;
        if before == tree {
            return repository_at(description, name, parent.clone());
        }
        arguments.extend(["-p", parent]);
    }
    let commit = process::run(git().args(arguments))?;
    process::run(git().args([
        "update-ref",
        "refs/heads/main",
        &commit,
        parent.as_deref().unwrap_or(&"0".repeat(commit.len())),
    ]))?;
    repository_at(description, name, commit)
}

/// Tags the head of `main` of a repository.
pub fn tag(directory: &Directory, name: &RepositoryName, tag: &str) -> Result<()> {
    let mut command = git(directory);
    command.env("GIT_DIR", path(directory, name));
    process::run(command.args([
        "tag",
        "--annotate",
        "--message",
        tag,
        tag,
        "refs/heads/main",
    ]))?;
    Ok(())
}

/// Serves a copy of an existing bare repository, with all its references, in
/// place of what had this name.
pub fn mirror(
    directory: &Directory,
    description: &Description,
    name: &RepositoryName,
    bare: &Path,
) -> Result<Repository> {
    let bare = bare
        .canonicalize()
        .context(|| format!("find {}", bare.display()))?;
    let target = path(directory, name);
    let staged = target.with_extension("new");
    let remove = |folder: &Path| match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).context(|| format!("remove {}", folder.display()))
        }
        _ => Ok(()),
    };
    remove(&staged)?;
    let mut clone = git(directory);
    clone.args(["clone", "--quiet", "--mirror", "--no-hardlinks", "--"]);
    process::run(clone.arg(&bare).arg(&staged))?;
    remove(&target)?;
    fs::rename(&staged, &target).context(|| format!("rename {}", staged.display()))?;
    let mut head = git(directory);
    head.env("GIT_DIR", &target);
    let commit = process::run(head.args(["rev-parse", "--verify", "HEAD^{commit}"])).map_err(|_| {
        Error::State(format!(
            "HEAD of {} leads to no commit: `git symbolic-ref HEAD refs/heads/BRANCH` in it sets it",
            bare.display()
        ))
    })?;
    repository_at(description, name, commit)
}

/// The server's life: answers until it is killed.
pub async fn serve(root: PathBuf, listen: SocketAddrV4) -> Result<()> {
    let listener = tokio::net::TcpListener::bind(listen)
        .await
        .context(|| format!("listen on {listen}"))?;
    let router = Router::new().fallback(answer).with_state(root);
    axum::serve(listener, router)
        .await
        .context(|| "serve git".to_owned())
}

async fn answer(State(root): State<PathBuf>, request: Request) -> Response {
    let line = format!("{} {}", request.method(), request.uri());
    let response = match backend(&root, request).await {
        Ok(response) => response,
        Err(error) => {
            eprintln!("{line}: {error}");
            (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response()
        }
    };
    eprintln!("{line} {}", response.status().as_u16());
    response
}

/// Runs one request through `git http-backend`, a CGI program (RFC 3875).
async fn backend(root: &Path, request: Request) -> std::io::Result<Response> {
    let (parts, body) = request.into_parts();
    if !matches!(parts.method, Method::GET | Method::HEAD | Method::POST) {
        return Ok(StatusCode::METHOD_NOT_ALLOWED.into_response());
    }
    let header = |name: HeaderName| {
        parts
            .headers
            .get(name)
            .and_then(|value| value.to_str().ok())
            .unwrap_or_default()
    };
    let mut child = tokio::process::Command::new("git")
        .arg("http-backend")
        .env_clear()
        .env("PATH", crate::node::PATH)
        .env("GIT_CONFIG_GLOBAL", root.join("settings"))
        .env("GIT_CONFIG_NOSYSTEM", "1")
        .env("GIT_PROJECT_ROOT", root)
        .env("GIT_HTTP_EXPORT_ALL", "1")
        .env("REQUEST_METHOD", parts.method.as_str())
        .env("PATH_INFO", parts.uri.path())
        .env("QUERY_STRING", parts.uri.query().unwrap_or_default())
        .env("CONTENT_TYPE", header(header::CONTENT_TYPE))
        .env("HTTP_CONTENT_ENCODING", header(header::CONTENT_ENCODING))
        .env(
            "GIT_PROTOCOL",
            header(HeaderName::from_static("git-protocol")),
        )
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()?;
    let (Some(mut stdin), Some(stdout)) = (child.stdin.take(), child.stdout.take()) else {
        return Err(std::io::Error::other("git http-backend has no pipes"));
    };
    tokio::spawn(async move {
        let body = body.into_data_stream().map_err(std::io::Error::other);
        let mut body = std::pin::pin!(StreamReader::new(body));
        // A backend that has read enough closes its end: its answer says why.
        let _ = tokio::io::copy(&mut body, &mut stdin).await;
        let _ = stdin.shutdown().await;
    });
    let mut stdout = BufReader::new(stdout);
    let (status, headers) = tokio::time::timeout(ANSWER_LIMIT, read_head(&mut stdout))
        .await
        .map_err(|_elapsed| std::io::Error::other("git http-backend does not answer"))??;
    // The child lives as long as its answer is read, and ends with it.
    let stream = ReaderStream::new(stdout).map(move |chunk| {
        let _running = &child;
        chunk
    });
    let mut response = Response::new(Body::from_stream(stream));
    *response.status_mut() = status;
    *response.headers_mut() = headers;
    Ok(response)
}

async fn read_head(
    stdout: &mut (impl tokio::io::AsyncBufRead + Unpin),
) -> std::io::Result<(StatusCode, HeaderMap)> {
    let mut status = StatusCode::OK;
    let mut headers = HeaderMap::new();
    loop {
        let mut line = String::new();
        if stdout.read_line(&mut line).await? == 0 {
            return Err(std::io::Error::other(
                "git http-backend ended before its answer",
            ));
        }
        let line = line.trim_end();
        if line.is_empty() {
            return Ok((status, headers));
        }
        let Some((name, value)) = line.split_once(':') else {
            return Err(std::io::Error::other(format!(
                "git http-backend wrote {line:?}"
            )));
        };
        if name.eq_ignore_ascii_case("status") {
            let code = value.split_whitespace().next().unwrap_or_default();
            status = code.parse().map_err(std::io::Error::other)?;
        } else {
            headers.insert(
                name.parse::<HeaderName>().map_err(std::io::Error::other)?,
                value
                    .trim()
                    .parse::<HeaderValue>()
                    .map_err(std::io::Error::other)?,
            );
        }
    }
}

fn git(directory: &Directory) -> Command {
    let mut command = Command::new("git");
    command
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap_or_default())
        .env("GIT_CONFIG_GLOBAL", settings(directory))
        .env("GIT_CONFIG_NOSYSTEM", "1");
    command
}

fn settings(directory: &Directory) -> PathBuf {
    directory.join("git/settings")
}

fn path(directory: &Directory, name: &RepositoryName) -> PathBuf {
    directory.join("git").join(format!("{}.git", name.0))
}

fn repository_at(
    description: &Description,
    name: &RepositoryName,
    commit: String,
) -> Result<Repository> {
    Ok(Repository {
        url: format!("http://{}/{}.git", description.addresses.git, name.0),
        commit,
    })
}
