"""The short form of jobs/chaos.py; figures of its long form are in segpipe/docs/measurements.md."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_chaos_loses_nothing():
    command = [sys.executable, "jobs/chaos.py", "--schedules", "4", "--seed", "3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert (figures["schedules"], figures["lost"], figures["twice"], figures["invalid"]) == (4, 0, 0, 0)
