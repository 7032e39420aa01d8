"""How commands behave at a terminal: one line for an error, the exit codes, a guess at a misspelt command. Loads no torch."""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from functools import wraps
from typing import Any

import click

from distily.errors import DistilyError, nearest


class Group(click.Group):
    """A group that guesses a misspelt command and reports wrong usage in one line."""

    def main(self, *arguments: Any, standalone_mode: bool = True, **keywords: Any) -> Any:
        """Click's own, with its usage errors as one line and exit code 2."""
        run: Callable[..., Any] = super().main
        if not standalone_mode:
            return run(*arguments, standalone_mode=False, **keywords)
        try:
            result = run(*arguments, standalone_mode=False, **keywords)
        except click.exceptions.NoArgsIsHelpError as error:
            error.show()
            sys.exit(error.exit_code)
        except click.ClickException as error:
            click.echo(f"distily: {' '.join(error.format_message().split())}", err=True)
            sys.exit(error.exit_code)
        except click.Abort:
            click.echo("distily: interrupted.", err=True)
            sys.exit(130)
        sys.exit(result if isinstance(result, int) else 0)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        known = self.list_commands(ctx)
        if args and args[0] not in known and not args[0].startswith("-"):
            close = nearest(args[0], known)
            guess = f"; did you mean {close!r}?" if close else "."
            raise click.UsageError(f"command {args[0]!r} is unknown{guess} Allowed: {', '.join(known)}.")
        return super().resolve_command(ctx, args)


def reported(command: Callable[..., Any]) -> Callable[..., Any]:
    """Errors as the exit codes promise: the user's input 2, ours or the machine's 1, an interrupt 130; one line each."""

    @wraps(command)
    @click.pass_context
    def run(context: click.Context, *arguments: Any, **keywords: Any) -> Any:
        debug = context.find_root().params.get("debug", False)
        try:
            return command(*arguments, **keywords)
        except DistilyError as error:
            if debug:
                raise
            for line in str(error).splitlines():
                click.echo(f"distily: {line}", err=True)
            sys.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo("distily: interrupted.", err=True)
            sys.exit(130)
        except click.ClickException:
            raise
        except Exception as error:
            if debug:
                raise
            reason = " ".join(str(error).split())[:300] or "no message"
            click.echo(f"distily: {type(error).__name__}: {reason} (traceback: {_write_traceback()})", err=True)
            sys.exit(1)

    return run


def _write_traceback() -> str:
    """Where the traceback of the current exception was put."""
    try:
        descriptor, name = tempfile.mkstemp(prefix="distily-", suffix=".log")
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            traceback.print_exc(file=stream)
        return name
    except OSError:
        return "not written, run again with --debug"
