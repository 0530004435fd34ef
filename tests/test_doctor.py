"""The doctor: good news where all is well, and the fix where it is not."""

import subprocess
import sys
from pathlib import Path

import pytest

from segpipe import doctor
from segpipe.doctor import examine
from segpipe.errors import StoreError

ROOT = Path(__file__).parents[1]


def by_name(findings):
    return {finding.name: finding for finding in findings}


def test_a_healthy_machine_is_good_and_leaves_no_trace(tmp_path):
    found = by_name(examine(str(tmp_path / "lake")))
    assert list(found) == [
        "versions", "devices", "memory", "shared memory", "temp disk", "output disk", "output", "clock",
    ]  # fmt: skip
    assert found["output"].is_good
    assert "torch 2" in found["versions"].text
    assert found["versions"].is_good
    assert abs(float(found["clock"].text.split(" s")[0])) < 30
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_what_is_short_is_named_with_the_fix(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: (1000, 990, 10))
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: type("usage", (), {"total": 10, "free": 10})())
    found = by_name(examine(str(tmp_path)))
    assert not found["output disk"].is_good
    assert found["output disk"].fix == "make room there"
    assert "--shm-size=2g" in found["shared memory"].fix


def test_another_version_of_a_package_is_named(monkeypatch):
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda _: ["torch<1", "no-such-package>=1", "numpy>=1"])
    finding = doctor._packages()
    assert not finding.is_good
    assert finding.fix.endswith("torch<1, no-such-package>=1")


def test_an_output_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    assert not by_name(examine("s3://"))["output"].is_good
    assert "names no bucket" in by_name(examine("s3://"))["output"].text

    def refuse(place, content):
        raise StoreError(f"{place.uri}: permission denied")

    monkeypatch.setattr(doctor, "write_bytes", refuse)
    found = by_name(examine(str(tmp_path)))
    assert "permission denied" in found["output"].text
    assert "credentials" in found["output"].fix


def test_a_clock_that_is_wrong_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor.time, "time", lambda: 1_000_000.0)
    finding = by_name(examine(str(tmp_path)))["clock"]
    assert not finding.is_good
    assert "NTP" in finding.fix


def test_credentials_are_told_by_identity_and_never_by_secret(monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAEXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "verysecret")
    finding = doctor._identity()
    assert "AKIAEXAMPLE, from env" in finding.text
    assert "verysecret" not in repr(finding)


@pytest.mark.slow
def test_the_command_prints_a_line_for_each_and_a_cluster_that_is_not_there_is_bad(tmp_path):
    command = [sys.executable, "-m", "segpipe", "doctor", "--output", str(tmp_path), "--ray-address", "127.0.0.1:1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 1
    assert "BAD   ray            127.0.0.1:1: " in done.stdout
    assert "good  output" in done.stdout


@pytest.mark.slow
def test_licences_are_listed_and_none_is_unknown():
    done = subprocess.run([sys.executable, "jobs/licences.py"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "pycocotools" in done.stdout
    assert len(done.stdout.splitlines()) > 40
