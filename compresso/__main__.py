"""Run the command, and turn compresso's own errors into a message and an exit code."""

from __future__ import annotations

import signal
import sys
from types import FrameType

from compresso.cli import make_app
from compresso.errors import CompressoError
from compresso.runtime import quiet_libraries, say


def main() -> None:
    """The `compresso` command."""
    quiet_libraries()
    signal.signal(signal.SIGTERM, _stop)
    try:
        make_app()(prog_name="compresso")
    except CompressoError as error:
        say("error", str(error), style="bold red")
        if error.hint:
            say("\nhint", error.hint, style="cyan")
        sys.exit(error.exit_code)


def _stop(signum: int, frame: FrameType | None) -> None:
    """Handle a request to end as Ctrl-C is handled: what was finished stays."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
