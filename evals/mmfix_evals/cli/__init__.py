"""The ``mmfix`` command. :func:`main` is the console script; nothing here imports torch before it is needed.

Exit codes: 0 done, 1 the work failed, 2 the command was not meant like this, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Sequence

import typer

from mmfix_evals.errors import EvalError, UsageError

FAILED, USAGE, STOPPED = 1, 2, 130
_CLICK_ERROR = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_PERMISSION = (errno.EACCES, errno.EPERM, errno.EROFS)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; every failure becomes one line on standard error and an exit code.

    Args:
        argv: arguments without the program's name; default: those of the process.
    """
    from mmfix_evals.cli.app import app

    given = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in given
    try:
        code = app(args=[word for word in given if word != "--debug"], prog_name="mmfix", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else FAILED
    except BrokenPipeError:
        # Whoever read the output has gone; writing what is left in the buffer at exit would only fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except (Exception, KeyboardInterrupt) as problem:
        if debug:
            traceback.print_exc()
        code, message = explain(problem)
        print(f"mmfix: {'stopped' if code == STOPPED else 'error'}: {message}", file=sys.stderr)
        return code


def explain(problem: BaseException) -> tuple[int, str]:
    """Exit code and one line for a person."""
    text = " ".join(str(problem).split())
    if isinstance(problem, (KeyboardInterrupt, typer.Abort)):
        return STOPPED, "by the user"
    if isinstance(problem, _CLICK_ERROR):
        return USAGE, _click_message(problem)
    if isinstance(problem, EvalError):
        return _eval_code(problem), text
    if isinstance(problem, _engine_error("MmfixError")):
        wrong_use = isinstance(problem, (_engine_error("MethodError"), _engine_error("UsageError")))
        return USAGE if wrong_use or isinstance(problem, _engine_error("ConflictError")) else FAILED, text
    if isinstance(problem, OSError):
        return FAILED, _os_message(problem)
    return FAILED, f"{type(problem).__name__}: {text or 'no message'}. Run again with --debug to see where"


def _eval_code(problem: EvalError) -> int:
    return USAGE if isinstance(problem, UsageError) else int(getattr(problem, "exit_code", FAILED))


def _engine_error(name: str) -> type[BaseException] | tuple[()]:
    """An error class of mmfix; nothing if mmfix, and with it torch, was never imported."""
    module = sys.modules.get("mmfix.errors")
    return getattr(module, name) if module is not None else ()


def _click_message(problem: BaseException) -> str:
    message = " ".join(problem.format_message().split())  # type: ignore[attr-defined]
    context = getattr(problem, "ctx", None)
    path = getattr(context, "command_path", "mmfix")
    return f"{message.rstrip('.')}. See `{path} --help`"


def _os_message(problem: OSError) -> str:
    if not problem.filename:
        return " ".join(str(problem).split()) or type(problem).__name__
    reason = problem.strerror or type(problem).__name__
    where = os.fspath(problem.filename) if not isinstance(problem.filename, int) else f"file {problem.filename}"
    if problem.errno in _NO_ROOM:
        advice = "" if "same command" in reason else "; make room and run the same command again"
    elif problem.errno in _NO_PERMISSION:
        advice = "; choose a folder that you may write, or correct its permissions"
    elif problem.errno in (errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
        advice = "; choose another path"
    else:
        advice = "; check the path"
    return f"{where!s}: {reason}{advice}"
