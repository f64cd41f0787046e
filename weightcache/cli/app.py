"""Own the root command and the process's edge: where every error becomes one line and an exit code.

Never does a command's work.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import click

import weightcache
from weightcache import errors
from weightcache.cli.completion import completion
from weightcache.cli.config import config
from weightcache.cli.cost import cost
from weightcache.cli.daemon import daemon, ps, status, warm
from weightcache.cli.doctor import doctor
from weightcache.cli.hub import hub
from weightcache.cli.load import load, plan, prefetch, pull
from weightcache.cli.options import output_options
from weightcache.cli.output import Output
from weightcache.cli.registry import (
    audit,
    check,
    diff,
    gc,
    keygen,
    publish,
    replicate,
    revisions,
    rm,
    sign,
    tag,
    tags,
    trust,
)
from weightcache.cli.store import evict, ls, pin, unpin, verify
from weightcache.cli.vllm import vllm

log = logging.getLogger(__name__)

INTERNAL_EXIT_CODE = 1
INTERRUPTED_EXIT_CODE = 130  # 128 + SIGINT, as shells count it

EPILOG = """\
\b
Exit codes:
    0  ok                              7  origin or network
    1  internal error, broken machine  8  offline
    2  usage, configuration or URI     9  capacity
    3  not found                      10  device
    4  access denied                  11  cache or registry format
    5  format of the model            12  in use
    6  integrity                      13  residency
   14  signature                      15  conflict
   16  daemon                        130  interrupted

Settings come from the environment (WEIGHTCACHE_DIR, WEIGHTCACHE_OFFLINE, ...) and ~/.config/weightcache.toml.
"""


class Root(click.Group):
    """The root command; an unknown name is answered with the nearest one."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if not (name in self.commands or name.startswith("-") or ctx.resilient_parsing):
            ctx.fail(f"no such command {name!r}{errors.nearest(name, self.commands)}")
        return super().resolve_command(ctx, args)


@click.group(
    cls=Root,
    commands=[
        *(load, pull, prefetch, plan),
        *(publish, tags, revisions, tag, diff, rm, gc, check, replicate, keygen, sign, trust, audit),
        *(daemon, status, ps, warm, hub, vllm),
        *(ls, verify, evict, pin, unpin, cost, config, doctor, completion),
    ],
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog=EPILOG,
)
@click.version_option(weightcache.__version__, message="weightcache %(version)s")
@output_options
def root() -> None:
    """Bring model weights from object storage to tensors near the speed of the hardware, and keep them near.

    A model is named by a folder or prefix that holds safetensors (s3://bucket/model, gs://..., hf://org/name, ./folder),
    by one safetensors file, or in a registry by its tag or digest (s3://bucket/registry/model@tag, wc://store/model@tag).

    Example: weightcache load s3://bucket/llama-3-8b
    """


def run(arguments: Sequence[str]) -> int:
    """Run one command line. Returns the exit code; raises SystemExit(1) when the reader of the output is gone."""
    output = Output()
    try:
        code = root.main(arguments, prog_name="weightcache", standalone_mode=False, obj=output)
    except click.ClickException as exc:
        exc.show()
        return exc.exit_code
    except click.Abort:
        return INTERRUPTED_EXIT_CODE
    except weightcache.WeightcacheError as exc:
        log.debug("the traceback of what follows", exc_info=True)
        output.error(f"{exc} [{exc.code}]", code=exc.code, message=str(exc), facts=exc.facts)
        return exc.exit_code
    except Exception as exc:
        log.debug("the traceback of what follows", exc_info=True)
        message = f"internal error: {type(exc).__name__}: {exc}"
        output.error(f"{message}; run with -vv for the traceback", code="internal", message=message, facts={})
        return INTERNAL_EXIT_CODE
    return code or 0
