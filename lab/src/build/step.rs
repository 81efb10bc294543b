//! One step of a build: a command that says line by line what it does.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};

use super::{BuildError, io_error};
use crate::progress::Progress;

/// How much of a failed step's log is shown: its end, and the first lines before that which tell of
/// errors. make finishes much else after the compiler has found one.
const TAIL_LINES: usize = 20;
const ERROR_LINES: usize = 5;

/// A step: its title, how many lines its command prints, about, and the file that gets them.
#[derive(Debug)]
pub(crate) struct Step<'a> {
    title: &'a str,
    lines: usize,
    log: &'a Path,
}

impl<'a> Step<'a> {
    /// A step that is not begun.
    pub(crate) fn new(title: &'a str, lines: usize, log: &'a Path) -> Self {
        Self { title, lines, log }
    }

    /// Runs the command and shows how far it is. The log holds this step only.
    ///
    /// # Errors
    /// When the command cannot be started, or fails: with the end of what it said.
    pub(crate) fn run(self, command: &mut Command) -> Result<(), BuildError> {
        let Self { title, lines, log } = self;
        let mut progress = Progress::start(title);
        let mut file = File::create(log).map_err(io_error("write", log))?;
        let program = Path::new(command.get_program()).to_owned();
        let started = |source| io_error("start", &program)(source);
        // One pipe for both streams, so that errors stay where they were said.
        let (said, end) = io::pipe().map_err(started)?;
        command
            .stdout(end.try_clone().map_err(started)?)
            .stderr(end);
        let spawned = command.spawn();
        // The command would hold our ends of the pipe, and we would wait for ourselves.
        command.stdout(Stdio::null()).stderr(Stdio::null());
        let mut child = spawned.map_err(started)?;
        let mut said = BufReader::new(said);
        let (mut line, mut count) = (Vec::new(), 0_usize);
        while said
            .read_until(b'\n', &mut line)
            .map_err(io_error("read what is said by", &program))?
            > 0
        {
            file.write_all(&line).map_err(io_error("write", log))?;
            count = count.saturating_add(1);
            let percent = count.saturating_mul(100).checked_div(lines).unwrap_or(0);
            // The number of lines is a guess: it is done when it is done.
            let percent = u8::try_from(percent.min(99)).unwrap_or(99);
            progress.at(percent, String::from_utf8_lossy(&line).trim());
            line.clear();
        }
        let status = child.wait().map_err(io_error("wait for", &program))?;
        if status.success() {
            progress.done();
            return Ok(());
        }
        drop(progress);
        Err(BuildError::Step {
            step: title.to_owned(),
            how: status.to_string(),
            log: log.to_owned(),
            tail: excerpt_of(log),
        })
    }
}

fn excerpt_of(log: &Path) -> String {
    let text = match fs::read(log) {
        Ok(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
        Err(error) => format!("(unreadable: {error})"),
    };
    let lines: Vec<&str> = text.lines().collect();
    let (earlier, tail) = lines.split_at(lines.len().saturating_sub(TAIL_LINES));
    let tells = |line: &&str| line.contains("error: ") || line.contains(" Error ");
    let errors = earlier.iter().copied().filter(tells).take(ERROR_LINES);
    let shown: Vec<&str> = errors.chain(tail.iter().copied()).collect();
    format!("    {}", shown.join("\n    "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sh(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn a_failed_step_names_its_log_and_shows_its_errors_and_its_end() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("log");
        let step = || Step::new("trying", 3, &log);
        step().run(&mut sh("echo before")).unwrap();
        let script = "echo f.c:1: error: early; for i in $(seq 30); do echo line $i; done
             echo the reason >&2; echo end; exit 4";
        let error = step().run(&mut sh(script)).unwrap_err();
        let BuildError::Step { step, how, .. } = &error else {
            panic!("{error:?}");
        };
        assert_eq!((step.as_str(), how.as_str()), ("trying", "exit status: 4"));
        let shown = error.to_string();
        assert!(shown.contains(&log.display().to_string()), "{shown}");
        let ends = "line 30\n    the reason\n    end";
        assert!(shown.ends_with(ends), "{shown}");
        assert!(shown.contains("f.c:1: error: early\n"), "{shown}");
        assert!(!shown.contains("line 3\n"), "{shown}");
        let all = fs::read_to_string(&log).unwrap();
        assert!(all.contains("line 1\n") && !all.contains("before"), "{all}");
    }

    #[test]
    fn a_program_that_is_not_there_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("log");
        let error = Step::new("trying", 1, &log)
            .run(&mut Command::new("/no/such/program"))
            .unwrap_err();
        assert!(error.to_string().contains("/no/such/program"), "{error}");
    }
}
