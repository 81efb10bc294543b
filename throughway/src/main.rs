//! PCI passthrough in which every device reaches every other.

mod demo;
mod guest_driver;
mod map_table;
mod p2p;
mod pattern;
mod ram;

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
}

fn main() -> ExitCode {
    let outcome = match CommandLine::parse().command {
        Command::Demo(args) => demo::run(&args),
        Command::P2p(args) => p2p::run(&args),
    };
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("throughway: {error:#}");
            ExitCode::from(2)
        }
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
