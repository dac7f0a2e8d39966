"""Puts the repository behind the installed packages on the path, for `bench` and for a build in place."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
