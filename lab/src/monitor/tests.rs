//! The monitor against a server that says what a test tells it to.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixListener;
use std::thread::JoinHandle;

use super::*;

const GREETING: &str = r#"{"QMP": {"version": {"qemu": {"micro": 2, "minor": 0, "major": 10},
     "package": "Debian"}, "capabilities": ["oob"]}}"#;
const SOON: Duration = Duration::from_secs(20);

/// A server that greets, and then says one text after each command it gets. It gives the commands
/// back. It hangs up after the last text.
struct Server {
    _folder: tempfile::TempDir,
    socket: PathBuf,
    heard: JoinHandle<Vec<Value>>,
}

impl Server {
    fn start(greeting: &str, answers: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("monitor");
        let listener = UnixListener::bind(&socket).unwrap();
        // One line, however it is written down here.
        let one_line = |text: &str| text.replace('\n', "") + "\r\n";
        let greeting = one_line(greeting);
        let answers: Vec<String> = answers.iter().map(ToString::to_string).collect();
        let heard = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            stream.write_all(greeting.as_bytes()).unwrap();
            let mut commands = Vec::new();
            let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
            for answer in answers {
                let Some(Ok(line)) = lines.next() else { break };
                commands.push(serde_json::from_str(&line).unwrap());
                // In pieces: a line may arrive in several reads.
                for piece in answer.as_bytes().chunks(7) {
                    stream.write_all(piece).unwrap();
                    stream.flush().unwrap();
                }
            }
            commands
        });
        Self {
            _folder: folder,
            socket,
            heard,
        }
    }

    /// A monitor whose greeting and `qmp_capabilities` went well.
    fn ready(answers: &[&str]) -> (Self, Monitor) {
        let server = Self::start(
            GREETING,
            &[&["{\"return\": {}, \"id\": 1}\n"], answers].concat(),
        );
        let monitor = Monitor::connect(&server.socket).unwrap();
        (server, monitor)
    }
}

#[test]
fn capabilities_are_negotiated_and_the_version_is_told() {
    let (server, monitor) = Server::ready(&[]);
    let version = monitor.version();
    assert_eq!((version.major, version.minor, version.micro), (10, 0, 2));
    drop(monitor);
    let expected = json!({ "execute": "qmp_capabilities", "id": 1 });
    assert_eq!(server.heard.join().unwrap(), [expected]);
}

#[test]
fn what_does_not_greet_is_no_monitor() {
    for greeting in ["{}", "SSH-2.0-OpenSSH", r#"{"QMP": {"version": "10"}}"#] {
        let server = Server::start(greeting, &[]);
        let error = Monitor::connect(&server.socket).unwrap_err();
        assert!(matches!(error, MonitorError::Protocol { .. }), "{error}");
    }
    let nowhere = Path::new("/no/such/socket");
    let error = Monitor::connect(nowhere).unwrap_err();
    assert!(error.to_string().contains("/no/such/socket"), "{error}");
}

#[test]
fn devices_are_described_in_json_and_refusals_tell_what_was_asked() {
    let (server, mut monitor) = Server::ready(&[
        "{\"return\": {}, \"id\": 2}\n",
        "{\"error\": {\"class\": \"GenericError\", \"desc\": \"Bus 'rp9' not found\"}, \"id\": 3}\n",
        "{\"return\": {\"running\": true, \"status\": \"running\"}, \"id\": 4}\n",
    ]);
    let properties = [("bus", json!("rp0")), ("cmb_size_mb", json!(16))];
    monitor.device_add("nvme", "disk", &properties).unwrap();
    let error = monitor.device_add("edu", "x", &[("bus", json!("rp9"))]);
    let error = error.unwrap_err().to_string();
    for part in [
        "device_add",
        "\"rp9\"",
        "GenericError",
        "Bus 'rp9' not found",
    ] {
        assert!(error.contains(part), "{part} is not in {error}");
    }
    // A refusal ends the command, not the monitor.
    assert!(monitor.query_status().unwrap().running);
    let heard = server.heard.join().unwrap();
    assert_eq!(
        heard[1],
        json!({ "execute": "device_add", "id": 2, "arguments":
            { "driver": "nvme", "id": "disk", "bus": "rp0", "cmb_size_mb": 16 } })
    );
    assert_eq!(heard[3], json!({ "execute": "query-status", "id": 4 }));
}

#[test]
fn an_event_before_the_answer_is_kept_and_each_is_taken_once() {
    let deleted = r#"{"event": "DEVICE_DELETED", "data": {"device": "d", "path": "/d"}}"#;
    let other = r#"{"event": "DEVICE_DELETED", "data": {"device": "e"}}"#;
    let answers = format!("{other}\n{deleted}\n{{\"return\": {{}}, \"id\": 2}}\n");
    let (_server, mut monitor) = Server::ready(&[&answers]);
    monitor.device_del("d").unwrap();
    monitor.wait_until_deleted("d", SOON).unwrap();
    let left = monitor.wait_for_event("looking", SOON, |_| true).unwrap();
    assert_eq!(left.text("device"), Some("e"));
    let none = monitor.wait_for_event("looking", SOON, |_| true);
    assert!(matches!(none, Err(MonitorError::Closed { .. })), "{none:?}");
}

#[test]
fn a_guest_that_keeps_a_device_is_told_from_one_that_says_nothing() {
    let refused = r#"{"event": "DEVICE_UNPLUG_GUEST_ERROR", "data": {"device": "d"}}"#;
    let answers = format!("{{\"return\": {{}}, \"id\": 2}}\n{refused}\n");
    // The third answer is never asked for: the server stays and says nothing.
    let (_server, mut monitor) = Server::ready(&[&answers, ""]);
    monitor.device_del("d").unwrap();
    let error = monitor.wait_until_deleted("d", SOON).unwrap_err();
    assert!(
        matches!(error, MonitorError::UnplugRefused { .. }),
        "{error}"
    );
    let error = monitor.wait_until_deleted("d", Duration::from_millis(50));
    let error = error.unwrap_err();
    assert!(matches!(error, MonitorError::TimeLimit { .. }), "{error}");
    assert!(
        error.to_string().contains("waiting for the end of d"),
        "{error}"
    );
}

#[test]
fn an_answer_to_another_command_is_no_answer() {
    let (_server, mut monitor) = Server::ready(&["{\"return\": {}, \"id\": 7}\n"]);
    let error = monitor.query_status().unwrap_err();
    assert!(matches!(error, MonitorError::Protocol { .. }), "{error}");
}

#[test]
fn quitting_may_close_the_socket_before_it_is_answered() {
    let (_server, mut monitor) = Server::ready(&["{\"event\": \"SHUTDOWN\"}\n"]);
    monitor.quit().unwrap();
    assert!(matches!(
        monitor.query_status(),
        Err(MonitorError::Closed { .. })
    ));
}
