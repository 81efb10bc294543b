//! Running the tools of the system's package manager.

use std::io::{BufRead, BufReader, Read};
use std::process::{Command, Stdio};

use crate::package::PackageError;
use crate::progress::Progress;

/// Runs a tool to its end and gives its standard output. Apt's progress lines in it (see
/// `APT::Status-Fd`) go to `progress` instead.
pub(crate) fn run(
    command: &mut Command,
    mut progress: Option<&mut Progress>,
) -> Result<String, PackageError> {
    let tool = command.get_program().to_string_lossy().into_owned();
    let broken = |source| PackageError::Tool {
        tool: tool.clone(),
        source,
    };
    let mut child = command
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(broken)?;
    let complaints = child.stderr.take();
    let complaints = std::thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut stderr) = complaints {
            // What cannot be read is not shown; the exit status still counts.
            let _ = stderr.read_to_end(&mut bytes);
        }
        String::from_utf8_lossy(&bytes).into_owned()
    });
    let mut output = String::new();
    if let Some(stdout) = child.stdout.take() {
        let mut stdout = BufReader::new(stdout);
        let mut line = Vec::new();
        while stdout.read_until(b'\n', &mut line).map_err(broken)? > 0 {
            let text = String::from_utf8_lossy(&line);
            match (download_status(&text), &mut progress) {
                (Some((percent, note)), Some(progress)) => progress.at(percent, note),
                _ => output.push_str(&text),
            }
            line.clear();
        }
    }
    let status = child.wait().map_err(broken)?;
    let complaints = complaints.join().unwrap_or_default();
    if status.success() {
        return Ok(output);
    }
    let words: Vec<_> = std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(|word| word.to_string_lossy())
        .collect();
    let said = format!("{output}{complaints}");
    let lines: Vec<_> = said.lines().collect();
    let tail = &lines[lines.len().saturating_sub(20)..];
    Err(PackageError::Failed {
        command: words.join(" "),
        said: format!("    {}", tail.join("\n    ")),
    })
}

/// `dlstatus:5:7.2887:Retrieving file 5 of 85`, see apt's `progress-reporting` document.
fn download_status(line: &str) -> Option<(u8, &str)> {
    let (_, rest) = line.trim_end().strip_prefix("dlstatus:")?.split_once(':')?;
    let (percent, note) = rest.split_once(':')?;
    let whole = percent.split('.').next()?.parse().ok()?;
    Some((whole, note))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn download_status_lines_give_percent_and_note() {
        assert_eq!(
            download_status("dlstatus:5:7.2887:Retrieving file 5 of 85\n"),
            Some((7, "Retrieving file 5 of 85"))
        );
        assert_eq!(download_status("dlstatus:5"), None);
        assert_eq!(download_status("Get:1 http://mirror.invalid x"), None);
        assert_eq!(download_status("dlstatus:1:-1:x"), None);
    }

    #[test]
    fn a_failing_tool_says_what_it_said() {
        let error = run(
            Command::new("sh").args(["-c", "echo out; echo err >&2; exit 3"]),
            None,
        )
        .unwrap_err()
        .to_string();
        assert!(error.contains("out\n") && error.contains("err"), "{error}");
        assert!(matches!(
            run(&mut Command::new("/no/such/tool"), None),
            Err(PackageError::Tool { .. })
        ));
    }
}
