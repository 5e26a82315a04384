//! From a request's path and query to what is asked for, as kubelet reads them.

use std::{collections::BTreeMap, num::NonZeroU64};

use hyper::{Method, StatusCode, Uri};
use time::{Duration, OffsetDateTime, format_description::well_known::Rfc3339};

use super::{Of, answer::Refusal};
use crate::logs::Wanted;

/// What is asked for.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Route {
    Healthz,
    Pods,
    Summary,
    Metrics,
    Logs {
        of: Of,
        wanted: Wanted,
        previous: bool,
    },
    Exec {
        of: Of,
        command: Vec<String>,
        channels: Channels,
    },
    Attach {
        of: Of,
        channels: Channels,
    },
    PortForward {
        namespace: String,
        pod: String,
        uid: Option<String>,
        ports: Vec<i32>,
    },
    Run {
        of: Of,
        command: Vec<String>,
    },
    /// Ours: all containers of a pod, or one of them, end and start again as its policy says.
    Restart {
        namespace: String,
        pod: String,
        container: Option<String>,
    },
}

/// What of a process a client is joined to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Channels {
    pub(super) stdin: bool,
    pub(super) stdout: bool,
    pub(super) stderr: bool,
    pub(super) tty: bool,
}

/// # Errors
/// There is no such path, or what is asked for makes no sense.
pub(super) fn of(method: &Method, uri: &Uri) -> Result<Route, Refusal> {
    let parts: Option<Vec<String>> = uri.path().split('/').skip(1).map(|part| decoded(part, false)).collect();
    let parts = parts.ok_or_else(|| Refusal::bad_request("the path is no text"))?;
    let query = Query::of(uri.query().unwrap_or_default())?;
    let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
    let route = match parts[..] {
        ["healthz"] => Route::Healthz,
        ["pods" | "pods/"] | ["pods", ""] => Route::Pods,
        ["stats", "summary"] => Route::Summary,
        ["metrics", "resource"] => Route::Metrics,
        ["containerLogs", namespace, pod, container] => Route::Logs {
            of: container_of(namespace, pod, None, container)?,
            wanted: query.wanted(crate::logs::now())?,
            previous: query.flag("previous"),
        },
        ["exec", namespace, pod, container] => exec(container_of(namespace, pod, None, container)?, &query)?,
        ["exec", namespace, pod, uid, container] => {
            exec(container_of(namespace, pod, Some(uid), container)?, &query)?
        }
        ["attach", namespace, pod, container] => {
            Route::Attach { of: container_of(namespace, pod, None, container)?, channels: query.channels()? }
        }
        ["attach", namespace, pod, uid, container] => Route::Attach {
            of: container_of(namespace, pod, Some(uid), container)?,
            channels: query.channels()?,
        },
        ["portForward", namespace, pod] => port_forward(namespace, pod, None, &query)?,
        ["portForward", namespace, pod, uid] => port_forward(namespace, pod, Some(uid), &query)?,
        ["run", namespace, pod, container] => run(container_of(namespace, pod, None, container)?, &query),
        ["run", namespace, pod, uid, container] => {
            run(container_of(namespace, pod, Some(uid), container)?, &query)
        }
        ["restart", namespace, pod] => restart(container_of(namespace, pod, None, "-")?, None),
        ["restart", namespace, pod, container] => {
            let of = container_of(namespace, pod, None, container)?;
            restart(of, Some(container))
        }
        _ => return Err(Refusal::new(StatusCode::NOT_FOUND, "404 page not found")),
    };
    let allowed = match route {
        Route::Exec { .. } | Route::Attach { .. } | Route::PortForward { .. } => {
            method == Method::GET || method == Method::POST
        }
        Route::Run { .. } | Route::Restart { .. } => method == Method::POST,
        _ => method == Method::GET || method == Method::HEAD,
    };
    if allowed { Ok(route) } else { Err(Refusal::new(StatusCode::METHOD_NOT_ALLOWED, "method not allowed")) }
}

fn container_of(namespace: &str, pod: &str, uid: Option<&str>, container: &str) -> Result<Of, Refusal> {
    for (what, value) in [("podNamespace", namespace), ("podID", pod), ("containerName", container)] {
        if value.is_empty() {
            return Err(Refusal::bad_request(format!("{{\"message\": \"Missing {what}.\"}}")));
        }
    }
    Ok(Of {
        namespace: namespace.to_owned(),
        pod: pod.to_owned(),
        uid: uid.filter(|uid| !uid.is_empty()).map(str::to_owned),
        container: container.to_owned(),
    })
}

fn restart(of: Of, container: Option<&str>) -> Route {
    Route::Restart { namespace: of.namespace, pod: of.pod, container: container.map(str::to_owned) }
}

fn exec(of: Of, query: &Query) -> Result<Route, Refusal> {
    let command = query.all("command").to_vec();
    Ok(Route::Exec { of, command, channels: query.channels()? })
}

fn run(of: Of, query: &Query) -> Route {
    let command = query.first("cmd").unwrap_or_default();
    Route::Run { of, command: command.split(' ').map(str::to_owned).collect() }
}

fn port_forward(namespace: &str, pod: &str, uid: Option<&str>, query: &Query) -> Result<Route, Refusal> {
    let of = container_of(namespace, pod, uid, "-")?;
    let mut ports = Vec::new();
    // Named by WebSocket clients alone; others name them within the connection.
    for list in query.all("port") {
        for port in list.split(',') {
            match port.parse::<u16>() {
                Ok(port) if port > 0 => ports.push(i32::from(port)),
                _ => return Err(Refusal::bad_request(format!("invalid port {port:?}"))),
            }
        }
    }
    Ok(Route::PortForward { namespace: of.namespace, pod: of.pod, uid: of.uid, ports })
}

/// Names and values as they came, each name with all its values.
#[derive(Debug, Default)]
struct Query(BTreeMap<String, Vec<String>>);

impl Query {
    fn of(text: &str) -> Result<Self, Refusal> {
        let mut query = Self::default();
        for pair in text.split('&').filter(|pair| !pair.is_empty()) {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            let (Some(name), Some(value)) = (decoded(name, true), decoded(value, true)) else {
                return Err(Refusal::bad_request("{\"message\": \"Unable to decode query.\"}"));
            };
            query.0.entry(name).or_default().push(value);
        }
        Ok(query)
    }

    fn all(&self, name: &str) -> &[String] {
        self.0.get(name).map_or(&[], Vec::as_slice)
    }

    fn first(&self, name: &str) -> Option<&str> {
        self.all(name).first().map(String::as_str)
    }

    fn flag(&self, name: &str) -> bool {
        // A name alone says yes, as `?follow` does.
        self.first(name).is_some_and(|value| !matches!(value, "0" | "f" | "F" | "false" | "False" | "FALSE"))
    }

    fn number(&self, name: &str) -> Result<Option<i64>, Refusal> {
        let Some(value) = self.first(name).filter(|value| !value.is_empty()) else { return Ok(None) };
        let bad = |_| Refusal::bad_request("{\"message\": \"Unable to decode query.\"}");
        value.parse().map(Some).map_err(bad)
    }

    fn channels(&self) -> Result<Channels, Refusal> {
        let tty = self.flag("tty");
        let channels = Channels {
            stdin: self.flag("input"),
            stdout: self.flag("output"),
            // A terminal has one output.
            stderr: self.flag("error") && !tty,
            tty,
        };
        if channels.stdin || channels.stdout || channels.stderr {
            return Ok(channels);
        }
        Err(Refusal::bad_request("you must specify at least 1 of stdin, stdout, stderr"))
    }

    fn wanted(&self, now: OffsetDateTime) -> Result<Wanted, Refusal> {
        let invalid =
            || Refusal::new(StatusCode::UNPROCESSABLE_ENTITY, "{\"message\": \"Invalid request.\"}");
        let tail = match self.number("tailLines")? {
            None => None,
            Some(lines) => Some(u64::try_from(lines).map_err(|_| invalid())?),
        };
        let limit = match self.number("limitBytes")? {
            None => None,
            Some(bytes) => {
                let bytes = u64::try_from(bytes).ok().and_then(NonZeroU64::new);
                Some(bytes.ok_or_else(invalid)?)
            }
        };
        let seconds = self.number("sinceSeconds")?;
        let time = self.first("sinceTime").filter(|time| !time.is_empty());
        let since = match (seconds, time) {
            (None, None) => None,
            (Some(seconds), None) if seconds > 0 => {
                let ago = now.checked_sub(Duration::seconds(seconds));
                Some(ago.unwrap_or(OffsetDateTime::UNIX_EPOCH))
            }
            (None, Some(time)) => Some(OffsetDateTime::parse(time, &Rfc3339).map_err(|_| invalid())?),
            _ => return Err(invalid()),
        };
        Ok(Wanted { follow: self.flag("follow"), tail, since, timestamps: self.flag("timestamps"), limit })
    }
}

/// Without its escapes; none if they are wrong or give no text. In a query a plus is a blank.
fn decoded(text: &str, query: bool) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'%' => {
                let (high, low) = (char::from(rest.next()?), char::from(rest.next()?));
                u8::try_from(high.to_digit(16)? << 4 | low.to_digit(16)?).ok()?
            }
            b'+' if query => b' ',
            byte => byte,
        });
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn get(uri: &str) -> Result<Route, Refusal> {
        of(&Method::GET, &uri.parse().expect("a URI"))
    }

    fn main_of(uid: Option<&str>) -> Of {
        Of {
            namespace: "ns".to_owned(),
            pod: "web".to_owned(),
            uid: uid.map(str::to_owned),
            container: "main".to_owned(),
        }
    }

    #[test]
    fn a_command_keeps_its_words() {
        let route =
            get("/exec/ns/web/main?command=sh&command=-c&command=echo+%22a%20b%22%2Bc&output=1&error=1");
        let command = ["sh", "-c", "echo \"a b\"+c"].map(str::to_owned).to_vec();
        let channels = Channels { stdin: false, stdout: true, stderr: true, tty: false };
        assert_eq!(route, Ok(Route::Exec { of: main_of(None), command, channels }));
    }

    #[test]
    fn a_terminal_has_no_stderr_and_a_uid_may_stand_before_the_container() {
        let route = get("/attach/ns/web/u-1/main?input=1&output=1&error=1&tty=1");
        let channels = Channels { stdin: true, stdout: true, stderr: false, tty: true };
        assert_eq!(route, Ok(Route::Attach { of: main_of(Some("u-1")), channels }));
        let none = get("/exec/ns/web/main?command=ls&tty=1&error=1").expect_err("no channel");
        assert_eq!(none.why, "you must specify at least 1 of stdin, stdout, stderr");
    }

    #[test]
    fn what_of_a_log_is_wanted() {
        let route = get(
            "/containerLogs/ns/web/main?follow=true&tailLines=0&timestamps=1&limitBytes=7&previous=false",
        );
        let wanted =
            Wanted { follow: true, tail: Some(0), timestamps: true, limit: NonZeroU64::new(7), since: None };
        assert_eq!(route, Ok(Route::Logs { of: main_of(None), wanted, previous: false }));
        for (query, status) in [
            ("tailLines=x", 400),
            ("tailLines=-1", 422),
            ("limitBytes=0", 422),
            ("sinceSeconds=0", 422),
            ("sinceTime=today", 422),
            ("sinceSeconds=1&sinceTime=2026-01-02T03:04:05Z", 422),
            ("a=%zz", 400),
        ] {
            let refusal = get(&format!("/containerLogs/ns/web/main?{query}")).expect_err(query);
            assert_eq!(refusal.status.as_u16(), status, "{query}");
        }
    }

    #[test]
    fn ports_are_numbers_of_ports() {
        let route = get("/portForward/ns/web?port=80&port=443,8080");
        let ports = vec![80, 443, 8080];
        let expected = Route::PortForward { namespace: "ns".into(), pod: "web".into(), uid: None, ports };
        assert_eq!(route, Ok(expected));
        assert!(get("/portForward/ns/web?port=0").is_err());
        assert!(get("/portForward/ns/web?port=70000").is_err());
    }

    #[test]
    fn nothing_else_is_served() {
        for path in ["/", "/exec", "/exec/a/b", "/logs/", "/containerLogs/a/b", "/debug/pprof"] {
            assert!(get(path).is_err(), "{path}");
        }
        assert_eq!(get("/containerLogs//web/main").expect_err("no namespace").status, 400);
        let put = of(&Method::PUT, &"/healthz".parse().expect("a URI"));
        assert_eq!(put.expect_err("not allowed").status, 405);
    }
}
