"""Calling the command in this process: what it says, and its exit code, for a fifth of the time."""

import os
import signal
import subprocess
import sys
from contextlib import chdir, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from unittest.mock import patch

from llmscale.cli import main


def llmscale(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs ``llmscale`` as its entry point does; ranks come from the tests' own fork server."""
    words = ["llmscale", *map(str, arguments)]
    output, errors = StringIO(), StringIO()
    code: object = 0
    terminate = signal.getsignal(signal.SIGTERM)
    with (
        chdir(cwd or Path.cwd()),
        patch.object(sys, "argv", words),
        patch.dict(os.environ),
        redirect_stdout(output),
        redirect_stderr(errors),
    ):
        try:
            main()
        except SystemExit as end:
            code = end.code
        finally:
            signal.signal(signal.SIGTERM, terminate)
    assert isinstance(code, int)
    return subprocess.CompletedProcess(words, code, output.getvalue(), errors.getvalue())
