use clap::Args;
/// x
#[derive(Debug, Args)]
pub struct P2pArgs {}
pub fn run(_: &P2pArgs) -> anyhow::Result<bool> {
    Ok(false)
}
