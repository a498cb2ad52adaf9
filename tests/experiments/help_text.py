"""``--help`` of a script, in a process of its own."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def help_without(script: str, heavy: tuple[str, ...]) -> str:
    """What ``--help`` prints; fails where it imports any of the ``heavy`` modules."""
    code = f"import sys, runpy; sys.argv = ['x', '--help']\ntry: runpy.run_path({script!r}, run_name='__main__')\n"
    code += f"except SystemExit: pass\nsys.exit(any(name in sys.modules for name in {heavy}))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout
