"""What has to be set before Python starts: the script starts itself again with it."""

import os
import sys


def restart(**environment: str) -> None:
    """Start this script again with these variables, unless they are set already."""
    if any(os.environ.get(name) != value for name, value in environment.items()):
        os.environ |= environment
        os.execv(sys.executable, [sys.executable, *sys.argv])
