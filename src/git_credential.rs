//! The credentials of a git repository: what a Secret must hold for a url, and what git is told of them.
//!
//! The controller looks references up with them and a node fetches with them: both parse here and give git the same.
//!
//! Invariants: a credential is for one host, and git is told so: neither a redirect nor a submodule takes it to another.
//! It reaches git by files alone, never by arguments or the environment. `Debug` shows none of it.

use std::fmt;
use std::path::Path;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;

use crate::api::names::hex_digest;
use crate::seal::SecretBytes;
use crate::seal::data::SecretData;

/// Key of an ssh key in a Secret, as in the type `kubernetes.io/ssh-auth`.
const SSH_KEY: &str = "ssh-privatekey";

/// Key of the host keys that are trusted with it.
const KNOWN_HOSTS: &str = "known_hosts";

/// Keys of a user's name and password, as in the type `kubernetes.io/basic-auth`.
const USERNAME: &str = "username";
const PASSWORD: &str = "password";

/// Key of a token that is sent as it is.
const BEARER_TOKEN: &str = "bearerToken";

/// Key of certificates of authorities.
const CA_FILE: &str = "caFile";

/// Every key that is looked at; nothing else of a Secret leaves the API server's answer.
pub const KEYS: [&str; 6] = [
    SSH_KEY,
    KNOWN_HOSTS,
    USERNAME,
    PASSWORD,
    BEARER_TOKEN,
    CA_FILE,
];

/// Bytes of one value: the largest is a file of host keys or certificates.
const VALUE_LIMIT: usize = 256 * 1024;

/// Bytes of a password or token: a header of a request has to hold it.
const WORD_LIMIT: usize = 8 * 1024;

/// What stands in place of a secret in a text.
pub const MASK: &str = "***";

/// Texts that are shorter than this are not masked: they would be found in any message.
const SHORTEST_MASKED: usize = 4;

/// What a Secret holds for a repository: exactly what the url's scheme takes.
#[derive(Clone, PartialEq, Eq)]
pub struct GitCredential {
    digest: String,
    access: Access,
}

#[derive(Clone, PartialEq, Eq)]
enum Access {
    Ssh {
        key: String,
        known_hosts: String,
    },
    Https {
        /// `https://host[:port]`, which alone gets it.
        origin: String,
        login: Option<Login>,
        authorities: Option<String>,
    },
}

#[derive(Clone, PartialEq, Eq)]
enum Login {
    Basic { username: String, password: String },
    Bearer { token: String },
}

impl fmt::Debug for GitCredential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match &self.access {
            Access::Ssh { .. } => "ssh",
            Access::Https { .. } => "https",
        };
        write!(f, "GitCredential({kind}, {MASK})")
    }
}

/// Why a Secret will not do for a url; names keys, never values.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GitCredentialError {
    /// A key is not there.
    #[error("it has no key {key}: {advice}")]
    Missing {
        /// The key.
        key: &'static str,
        /// What to put there.
        advice: &'static str,
    },
    /// A value is not what it should be.
    #[error("its key {key} {problem}")]
    Malformed {
        /// The key.
        key: &'static str,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// The keys that are there do not go together.
    #[error(
        "it has both {USERNAME}/{PASSWORD} and {BEARER_TOKEN}: keep the one that the server wants"
    )]
    Ambiguous,
    /// What is there is of no use for the url.
    #[error(
        "it has neither {USERNAME} and {PASSWORD} nor {BEARER_TOKEN} nor {CA_FILE}, of which https:// takes one"
    )]
    NothingForHttps,
    /// The url's scheme takes no credentials.
    #[error("{scheme} takes no credentials: use https:// or ssh://")]
    Insecure {
        /// `http://` or `git://`.
        scheme: &'static str,
    },
}

/// What git is told besides the url.
pub struct GitAccess {
    /// Files of one folder that is nobody else's: name and content.
    pub files: Vec<(&'static str, String)>,
    /// Settings, in the form of `GIT_CONFIG_KEY_n` and `GIT_CONFIG_VALUE_n`. They come after any that reset a helper.
    pub settings: Vec<(String, String)>,
    /// `GIT_SSH_COMMAND`, for ssh.
    pub ssh: Option<String>,
}

/// How ssh is started by git: no configuration of the machine's, no question, no host that is not known. The
/// rest of a command says which keys and hosts.
pub const SSH: &str = "ssh -F none -o BatchMode=yes -o StrictHostKeyChecking=yes -o IdentitiesOnly=yes -o IdentityAgent=none -o ConnectTimeout=15 -o ServerAliveInterval=15 -o ServerAliveCountMax=4";

/// A key without a passphrase in OpenSSH's own form begins so: its magic, and the cipher `none`.
const OPENSSH_WITHOUT_PASSPHRASE: &str = "b3BlbnNzaC1rZXktdjEAAAAABG5vbmU";

impl GitCredential {
    /// Reads the data of a Secret for a url. Line ends at the end of a value do not count, as many tools leave one.
    ///
    /// # Errors
    /// Which key is missing or malformed, and what to do.
    pub fn parse(url: &str, data: &SecretData) -> Result<Self, GitCredentialError> {
        let access = match scheme(url) {
            "http://" => return Err(GitCredentialError::Insecure { scheme: "http://" }),
            "git://" => return Err(GitCredentialError::Insecure { scheme: "git://" }),
            "https://" => https(url, data)?,
            _ => ssh(data)?,
        };
        Ok(Self {
            digest: digest(&access),
            access,
        })
    }

    /// What tells it from others within this process: hexadecimal digits, not for anybody's eyes, as a short
    /// password could be guessed from them.
    pub fn digest(&self) -> &str {
        &self.digest
    }

    /// What git is told, its files being in `folder`, a path without characters that a shell or ssh takes for more.
    pub fn access(&self, folder: &Path) -> GitAccess {
        let folder = folder.display();
        match &self.access {
            Access::Ssh { key, known_hosts } => GitAccess {
                files: vec![
                    ("identity", key.clone()),
                    ("known_hosts", known_hosts.clone()),
                ],
                settings: vec![],
                ssh: Some(format!(
                    "{SSH} -o UserKnownHostsFile={folder}/known_hosts -o GlobalKnownHostsFile=none -o PreferredAuthentications=publickey -o IdentityFile={folder}/identity"
                )),
            },
            Access::Https {
                origin,
                login,
                authorities,
            } => {
                let mut files = vec![];
                let mut settings = vec![];
                match login {
                    // Git asks for it by host, so that a redirect to another gets none. Of what the shell itself
                    // has: there is no `cat` in the controller's image.
                    Some(Login::Basic { username, password }) => {
                        files.push((
                            "login",
                            format!("username={username}\npassword={password}\n"),
                        ));
                        settings.push((
                            format!("credential.{origin}.helper"),
                            format!(
                                "!f() {{ test \"$1\" != get || while IFS= read -r line; do printf '%s\\n' \"$line\"; done <{folder}/login; }}; f"
                            ),
                        ));
                    }
                    // Git would send a header on to wherever the first answer leads, hence no redirects.
                    Some(Login::Bearer { token }) => {
                        let header = format!(
                            "[http \"{origin}/\"]\n\textraHeader = \"Authorization: Bearer {token}\"\n"
                        );
                        files.push(("header", header));
                        settings.push(("include.path".to_owned(), format!("{folder}/header")));
                        settings.push(("http.followRedirects".to_owned(), "false".to_owned()));
                    }
                    None => {}
                }
                if let Some(authorities) = authorities {
                    files.push(("authorities.pem", authorities.clone()));
                    settings.push((
                        format!("http.{origin}/.sslCAInfo"),
                        format!("{folder}/authorities.pem"),
                    ));
                }
                GitAccess {
                    files,
                    settings,
                    ssh: None,
                }
            }
        }
    }

    /// The text without what is secret of it: git repeats what a server says, and a server can say what it was sent.
    pub fn mask(&self, text: &str) -> String {
        let mut secrets: Vec<String> = match &self.access {
            Access::Ssh { key, .. } => key
                .lines()
                .filter(|line| !line.starts_with("-----"))
                .map(str::to_owned)
                .collect(),
            Access::Https { login, .. } => match login {
                Some(Login::Basic { username, password }) => vec![
                    password.clone(),
                    base64(format!("{username}:{password}").as_bytes()),
                    base64(password.as_bytes()),
                    percent_encoded(password),
                ],
                Some(Login::Bearer { token }) => {
                    vec![
                        token.clone(),
                        base64(token.as_bytes()),
                        percent_encoded(token),
                    ]
                }
                None => vec![],
            },
        };
        secrets.retain(|secret| secret.len() >= SHORTEST_MASKED);
        // One may hold another.
        secrets.sort_by_key(|secret| std::cmp::Reverse(secret.len()));
        secrets
            .iter()
            .fold(text.to_owned(), |text, secret| text.replace(secret, MASK))
    }
}

fn digest(access: &Access) -> String {
    let words: Vec<&str> = match access {
        Access::Ssh { key, known_hosts } => vec!["ssh", key, known_hosts],
        Access::Https {
            origin,
            login,
            authorities,
        } => {
            let login = match login {
                Some(Login::Basic { username, password }) => vec!["basic", username, password],
                Some(Login::Bearer { token }) => vec!["bearer", token],
                None => vec!["none"],
            };
            let authorities = authorities.as_deref().unwrap_or_default();
            [vec!["https", origin, authorities], login].concat()
        }
    };
    // No value has a NUL.
    hex_digest(words.join("\0").as_bytes())
}

/// The scheme of a url with its `://`; `user@host:path` is ssh's.
fn scheme(url: &str) -> &'static str {
    ["https://", "http://", "git://"]
        .into_iter()
        .find(|scheme| url.starts_with(scheme))
        .unwrap_or("ssh://")
}

fn ssh(data: &SecretData) -> Result<Access, GitCredentialError> {
    let key = text(data, SSH_KEY)?.ok_or(GitCredentialError::Missing {
        key: SSH_KEY,
        advice: "an ssh:// url takes an ssh key, as a Secret of type kubernetes.io/ssh-auth has it",
    })?;
    let known_hosts = text(data, KNOWN_HOSTS)?.ok_or(GitCredentialError::Missing {
        key: KNOWN_HOSTS,
        advice: "put the server's host keys there, as ssh-keyscan prints them, after comparing them with what the server's operator publishes",
    })?;
    let malformed = |key, problem| Err(GitCredentialError::Malformed { key, problem });
    let body: Vec<&str> = key.lines().map(str::trim).collect();
    let is_pem = body
        .first()
        .is_some_and(|line| line.starts_with("-----BEGIN ") && line.ends_with(" PRIVATE KEY-----"))
        && body
            .last()
            .is_some_and(|line| line.starts_with("-----END "));
    if !is_pem {
        return malformed(
            SSH_KEY,
            "is not an ssh private key: it must begin with -----BEGIN … PRIVATE KEY----- and end with the line of -----END",
        );
    }
    let is_locked = key.contains("ENCRYPTED")
        || (body[0].contains("OPENSSH")
            && !body
                .get(1)
                .is_some_and(|line| line.starts_with(OPENSSH_WITHOUT_PASSPHRASE)));
    if is_locked {
        return malformed(
            SSH_KEY,
            "has a passphrase, or is damaged: make a key without one (ssh-keygen -t ed25519 -N '')",
        );
    }
    let is_entry = |line: &str| {
        let fields = line.split_whitespace().count();
        !line.trim_start().starts_with('#') && fields >= if line.starts_with('@') { 4 } else { 3 }
    };
    if !known_hosts.lines().any(is_entry) {
        return malformed(
            KNOWN_HOSTS,
            "names no host key: a line is \"host type key\", as ssh-keyscan prints it",
        );
    }
    Ok(Access::Ssh {
        // OpenSSH refuses a key whose last line does not end.
        key: body.join("\n") + "\n",
        known_hosts: known_hosts + "\n",
    })
}

fn https(url: &str, data: &SecretData) -> Result<Access, GitCredentialError> {
    let username = word(data, USERNAME)?;
    let password = word(data, PASSWORD)?;
    let token = word(data, BEARER_TOKEN)?;
    let login = match (username, password, token) {
        (None, None, None) => None,
        (None, None, Some(token)) => {
            if !token
                .bytes()
                .all(|b| b.is_ascii_graphic() && !b"\"\\".contains(&b))
            {
                return Err(GitCredentialError::Malformed {
                    key: BEARER_TOKEN,
                    problem: "has spaces or characters that no token has (RFC 6750)",
                });
            }
            Some(Login::Bearer { token })
        }
        (Some(_), _, Some(_)) | (_, Some(_), Some(_)) => return Err(GitCredentialError::Ambiguous),
        (Some(username), Some(password), None) => {
            if username.contains(':') {
                return Err(GitCredentialError::Malformed {
                    key: USERNAME,
                    problem: "has a colon, which no user name has here (RFC 7617)",
                });
            }
            Some(Login::Basic { username, password })
        }
        (Some(_), None, None) => {
            return Err(GitCredentialError::Missing {
                key: PASSWORD,
                advice: "put the password or token of the user there",
            });
        }
        (None, Some(_), None) => {
            return Err(GitCredentialError::Missing {
                key: USERNAME,
                advice: "put the name of the user there; with a token most servers take any, such as git",
            });
        }
    };
    let authorities = text(data, CA_FILE)?;
    if let Some(authorities) = &authorities {
        let mut certificates = CertificateDer::pem_slice_iter(authorities.as_bytes()).peekable();
        if certificates.peek().is_none() || certificates.any(|certificate| certificate.is_err()) {
            return Err(GitCredentialError::Malformed {
                key: CA_FILE,
                problem: "is not certificates in PEM: -----BEGIN CERTIFICATE----- and so on",
            });
        }
    }
    if login.is_none() && authorities.is_none() {
        return Err(match data.contains_key(SSH_KEY) {
            true => GitCredentialError::Missing {
                key: PASSWORD,
                advice: "an https:// url takes no ssh key; put username and password, or bearerToken, or use the ssh:// url",
            },
            false => GitCredentialError::NothingForHttps,
        });
    }
    let authority = url
        .strip_prefix("https://")
        .and_then(|rest| rest.split('/').next())
        .unwrap_or_default();
    Ok(Access::Https {
        origin: format!("https://{authority}"),
        login,
        authorities: authorities.map(|text| text + "\n"),
    })
}

/// A value of several lines, without those line ends that it ends with.
fn text(data: &SecretData, key: &'static str) -> Result<Option<String>, GitCredentialError> {
    let Some(value) = data.get(key).map(SecretBytes::expose) else {
        return Ok(None);
    };
    let malformed = |problem| Err(GitCredentialError::Malformed { key, problem });
    if value.len() > VALUE_LIMIT {
        return malformed("is larger than 256 KiB");
    }
    let Ok(value) = std::str::from_utf8(value) else {
        return malformed("is not text");
    };
    let value = value.replace("\r\n", "\n");
    let value = value.trim_end_matches('\n').trim_start_matches('\n');
    if value.is_empty() {
        return malformed("is empty");
    }
    if value.contains(|c: char| c.is_control() && c != '\n' && c != '\t') {
        return malformed("has control characters");
    }
    Ok(Some(value.to_owned()))
}

/// A value of one line.
fn word(data: &SecretData, key: &'static str) -> Result<Option<String>, GitCredentialError> {
    let Some(value) = text(data, key)? else {
        return Ok(None);
    };
    let malformed = |problem| Err(GitCredentialError::Malformed { key, problem });
    if value.len() > WORD_LIMIT {
        return malformed("is larger than 8 KiB");
    }
    if value.contains(char::is_control) {
        return malformed("has more than one line, or control characters");
    }
    Ok(Some(value))
}

/// As a header of basic authentication has it.
fn base64(content: &[u8]) -> String {
    BASE64.encode(content)
}

/// As a url has it (RFC 3986).
fn percent_encoded(text: &str) -> String {
    text.bytes()
        .map(|byte| match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
                char::from(byte).to_string()
            }
            _ => format!("%{byte:02X}"),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1rZXktdjEAAAAABG5vbmUAAAAEbm9uZQ\nAAAABm9uZUxpbmVPZk1hbnk\n-----END OPENSSH PRIVATE KEY-----";
    const HOSTS: &str = "git.example.com ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAA";
    const SSH_URL: &str = "ssh://git@git.example.com/shop.git";
    const HTTPS_URL: &str = "https://git.example.com:8443/shop.git";

    fn secret(pairs: &[(&str, &str)]) -> SecretData {
        pairs
            .iter()
            .map(|(key, value)| {
                (
                    (*key).to_owned(),
                    SecretBytes::new(value.as_bytes().to_vec()),
                )
            })
            .collect()
    }

    fn parsed(url: &str, pairs: &[(&str, &str)]) -> GitCredential {
        GitCredential::parse(url, &secret(pairs)).unwrap_or_else(|e| panic!("{e}"))
    }

    #[test]
    fn a_secret_that_will_not_do_is_told_by_its_keys_and_never_by_its_values() {
        let locked = KEY.replace("BG5vbmU", "BmFlczI1");
        let old = "-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\nx\n-----END RSA PRIVATE KEY-----";
        let none: &[(&str, &str)] = &[];
        for (case, url, pairs, says) in [
            ("nothing for ssh", SSH_URL, none, "no key ssh-privatekey"),
            ("scp-like", "git@h:shop.git", none, "no key ssh-privatekey"),
            (
                "no host keys",
                SSH_URL,
                &[("ssh-privatekey", KEY)],
                "no key known_hosts",
            ),
            (
                "a password for ssh",
                SSH_URL,
                &[("username", "u"), ("password", "hush")],
                "no key ssh-privatekey",
            ),
            (
                "no key at all",
                SSH_URL,
                &[("ssh-privatekey", "hush"), ("known_hosts", HOSTS)],
                "not an ssh private key",
            ),
            (
                "a passphrase",
                SSH_URL,
                &[("ssh-privatekey", &locked), ("known_hosts", HOSTS)],
                "passphrase",
            ),
            (
                "an old passphrase",
                SSH_URL,
                &[("ssh-privatekey", old), ("known_hosts", HOSTS)],
                "passphrase",
            ),
            (
                "no entries",
                SSH_URL,
                &[("ssh-privatekey", KEY), ("known_hosts", "# hush\n")],
                "names no host key",
            ),
            (
                "empty",
                SSH_URL,
                &[("ssh-privatekey", "\n")],
                "ssh-privatekey is empty",
            ),
            (
                "nothing for https",
                HTTPS_URL,
                none,
                "neither username and password nor bearerToken",
            ),
            (
                "a key for https",
                HTTPS_URL,
                &[("ssh-privatekey", KEY)],
                "takes no ssh key",
            ),
            (
                "no password",
                HTTPS_URL,
                &[("username", "u")],
                "no key password",
            ),
            (
                "no name",
                HTTPS_URL,
                &[("password", "hush")],
                "no key username",
            ),
            (
                "both",
                HTTPS_URL,
                &[
                    ("bearerToken", "hush"),
                    ("username", "u"),
                    ("password", "hush"),
                ],
                "both",
            ),
            (
                "a token with a space",
                HTTPS_URL,
                &[("bearerToken", "hu sh")],
                "bearerToken has spaces",
            ),
            (
                "two lines",
                HTTPS_URL,
                &[("username", "u"), ("password", "hush\nhush")],
                "password has more than one line",
            ),
            (
                "a colon",
                HTTPS_URL,
                &[("username", "u:v"), ("password", "hush")],
                "username has a colon",
            ),
            (
                "no certificates",
                HTTPS_URL,
                &[("caFile", "hush")],
                "caFile is not certificates",
            ),
            (
                "plain http",
                "http://h/r",
                &[("username", "u"), ("password", "hush")],
                "http:// takes no credentials",
            ),
            ("git", "git://h/r", none, "git:// takes no credentials"),
        ] {
            let error = GitCredential::parse(url, &secret(pairs)).err();
            let error = error.unwrap_or_else(|| panic!("{case}: taken")).to_string();
            assert!(error.contains(says), "{case}: {error}");
            assert!(
                !error.contains("hush") && !error.contains("AAAAB"),
                "{case}: {error}"
            );
        }
    }

    #[test]
    fn what_tools_leave_at_the_ends_of_values_does_not_matter() {
        let plain = parsed(SSH_URL, &[("ssh-privatekey", KEY), ("known_hosts", HOSTS)]);
        let key = format!("{}\r\n\r\n", KEY.replace('\n', "\r\n"));
        let hosts = format!("{HOSTS}\n");
        let other = parsed(
            SSH_URL,
            &[("ssh-privatekey", &key), ("known_hosts", &hosts)],
        );
        assert!(plain == other);
        let word = |password| parsed(HTTPS_URL, &[("username", "u"), ("password", password)]);
        assert!(word("p") == word("p\n"));
    }

    #[test]
    fn a_credential_is_in_files_alone_and_for_its_host_alone() {
        let folder = Path::new("/run/x");
        for (url, pairs, scope) in [
            (
                HTTPS_URL,
                &[("username", "u"), ("password", "hush")][..],
                "credential.https://git.example.com:8443.helper",
            ),
            (HTTPS_URL, &[("bearerToken", "hush")], "include.path"),
            (
                SSH_URL,
                &[("ssh-privatekey", KEY), ("known_hosts", HOSTS)],
                "",
            ),
        ] {
            let GitAccess {
                files,
                settings,
                ssh,
            } = parsed(url, pairs).access(folder);
            let told = format!("{settings:?}{ssh:?}");
            assert!(!told.contains("hush") && !told.contains("AAAAB"), "{told}");
            assert!(settings.iter().any(|(key, _)| key == scope) != scope.is_empty());
            let held: String = files.iter().map(|(_, content)| content.as_str()).collect();
            assert!(held.contains("hush") || held.contains(KEY));
            let shown = format!("{:?}", parsed(url, pairs));
            assert!(!shown.contains("hush"), "{shown}");
        }
    }

    #[test]
    fn git_gets_a_password_where_there_is_no_program_but_the_shell() {
        let folder = tempfile::tempdir().unwrap();
        let pairs = [("username", "kari"), ("password", r"h\\u%s h $x")];
        let GitAccess {
            files, settings, ..
        } = parsed(HTTPS_URL, &pairs).access(folder.path());
        let (name, login) = &files[0];
        std::fs::write(folder.path().join(name), login).unwrap();
        // As git runs it.
        let helper = settings[0].1.strip_prefix('!').unwrap();
        let said = std::process::Command::new("/bin/sh")
            .args(["-c", &format!("{helper} get")])
            .env("PATH", "/nowhere")
            .output()
            .unwrap();
        assert_eq!(String::from_utf8_lossy(&said.stdout), *login, "{said:?}");
    }

    #[test]
    fn whatever_form_a_server_says_a_secret_in_it_is_masked() {
        let basic = parsed(HTTPS_URL, &[("username", "u"), ("password", "hush hush/")]);
        let said = "remote: u:hush hush/ dTpodXNoIGh1c2gv hush%20hush%2F u";
        assert_eq!(basic.mask(said), "remote: u:*** *** *** u");
        let bearer = parsed(HTTPS_URL, &[("bearerToken", "tok-123")]);
        assert_eq!(bearer.mask("Bearer tok-123!"), "Bearer ***!");
        let key = parsed(SSH_URL, &[("ssh-privatekey", KEY), ("known_hosts", HOSTS)]);
        assert_eq!(key.mask("AAAABm9uZUxpbmVPZk1hbnk"), MASK);
        let short = parsed(HTTPS_URL, &[("username", "u"), ("password", "e")]);
        assert_eq!(short.mask("remote: e"), "remote: e");
    }
}
