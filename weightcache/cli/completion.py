"""Own the command that prints completion scripts for shells; click makes them."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from weightcache.cli.options import output_options
from weightcache.cli.output import Output


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@output_options
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the completion script of a shell.

    \b
    Example: weightcache completion bash > ~/.local/share/bash-completion/completions/weightcache
             weightcache completion fish > ~/.config/fish/completions/weightcache.fish
    For zsh, write it as _weightcache into a folder of $fpath.
    """
    maker = get_completion_class(shell)
    assert maker is not None
    script = maker(ctx.find_root().command, {}, "weightcache", "_WEIGHTCACHE_COMPLETE").source()
    output: Output = ctx.obj
    output.result({"shell": shell, "script": script}, lambda: print(script))
