"""completion."""

from __future__ import annotations

import click

from ckptvcs.cli import output


@click.command()
@click.argument("shell", metavar="SHELL", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print a completion script for a shell.

    With it, bash, zsh or fish completes verbs, options, branches and tags.

    \b
    eval "$(ckpt completion bash)"     # in ~/.bashrc
    eval "$(ckpt completion zsh)"      # in ~/.zshrc
    ckpt completion fish > ~/.config/fish/completions/ckpt.fish
    """
    from click.shell_completion import get_completion_class

    from ckptvcs.cli.main import NAME, ckpt

    kind = get_completion_class(shell)
    assert kind is not None  # click has all three
    output.line(kind(ckpt, {}, NAME, f"_{NAME.upper()}_COMPLETE").source())
