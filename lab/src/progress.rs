//! What a long step is doing, on standard error: a bar on a terminal, plain lines elsewhere.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

/// Between two plain lines of one step.
const QUIET_TIME: Duration = Duration::from_secs(3);

/// One long step. Dropping it without [`Progress::done`] leaves no trace but what was printed.
#[derive(Debug)]
pub struct Progress {
    title: String,
    started: Instant,
    last_line: Instant,
    bar: Option<ProgressBar>,
}

impl Progress {
    /// Starts a step and shows its title.
    #[must_use]
    pub fn start(title: impl Into<String>) -> Self {
        let title = title.into();
        let now = Instant::now();
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new(100);
            if let Ok(style) =
                ProgressStyle::with_template("{spinner} {msg} [{bar:30}] {pos:>3}% {elapsed}")
            {
                bar.set_style(style.progress_chars("=> "));
            }
            bar.enable_steady_tick(Duration::from_millis(120));
            bar.set_message(title.clone());
            bar
        });
        if bar.is_none() {
            eprintln!("lab: {title}");
        }
        Self {
            title,
            started: now,
            last_line: now,
            bar,
        }
    }

    /// Shows how far the step is, in per cent, with a short note.
    pub fn at(&mut self, percent: u8, note: &str) {
        match &self.bar {
            Some(bar) => {
                bar.set_position(u64::from(percent));
                bar.set_message(format!("{}: {note}", self.title));
            }
            None if self.last_line.elapsed() >= QUIET_TIME => {
                self.last_line = Instant::now();
                eprintln!("lab: {}: {percent} %, {note}", self.title);
            }
            None => {}
        }
    }

    /// Ends the step and shows how long it took.
    pub fn done(self) {
        let seconds = self.started.elapsed().as_secs_f64();
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        eprintln!("lab: {}: done in {seconds:.1} s", self.title);
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
