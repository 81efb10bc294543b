//! PCI passthrough in which every device reaches every other.

mod demo;
mod described;
mod guest_driver;
mod host;
mod map_table;
mod p2p;
mod pattern;
mod ram;
mod run;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// PCI passthrough in which every device reaches every other.
#[derive(Debug, Parser)]
#[command(name = "throughway", version)]
struct CommandLine {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Demo(demo::DemoArgs),
    P2p(p2p::P2pArgs),
    Run(run::RunArgs),
}

fn main() -> ExitCode {
    let outcome = match CommandLine::parse().command {
        Command::Demo(args) => demo::run(&args).map(status),
        Command::P2p(args) => p2p::run(&args).map(status),
        Command::Run(args) => run::run(&args),
    };
    match outcome {
        Ok(status) => status,
        Err(error) => {
            eprintln!("throughway: {error:#}");
            ExitCode::from(2)
        }
    }
}

/// The status that tells whether all was as it should be.
fn status(ok: bool) -> ExitCode {
    if ok {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory;
        CommandLine::command().debug_assert();
    }
}
