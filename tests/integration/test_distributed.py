"""Several processes: they learn what one does, and leave nothing running when one of them dies."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tests" / "integration" / "distributed.py"
TWO = {"strategy": "ddp", "devices": 2}


@pytest.fixture
def pictures(pictures: Path) -> Path:
    """Four images to train on, one batch, so that no sampler's order counts; an odd number to test on."""
    (pictures / "train" / "good" / "004.png").unlink()
    (pictures / "test" / "good" / "003.png").unlink()
    return pictures


def start(
    pictures: Path, name: str, arguments: dict, launcher: tuple[str, ...] = (), **environment: str
) -> subprocess.Popen:
    command = [sys.executable, *launcher, str(SCRIPT), str(pictures), name, json.dumps(arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(*processes: subprocess.Popen) -> None:
    for process in processes:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output[-3000:]


def found(pictures: Path, name: str) -> list[dict]:
    return [torch.load(path, weights_only=True) for path in sorted(pictures.parent.glob(f"{name}?.pt"))]


def assert_as_one(pictures: Path, several: str) -> None:
    (one,), ranks = found(pictures, "one"), found(pictures, several)
    assert len(ranks) == 2
    for rank in ranks:
        assert rank["losses"] == pytest.approx(one["losses"], rel=1e-4)
        for key, value in one["state"].items():
            torch.testing.assert_close(rank["state"][key], value, rtol=1e-3, atol=2e-3, msg=key, equal_nan=True)
            if "batches_tracked" not in key:
                assert torch.equal(rank["state"][key], ranks[0]["state"][key]), key
    assert not torch.equal(ranks[0]["noise"], ranks[1]["noise"])


def test_fit_in_two_processes_learns_what_one_does(pictures: Path) -> None:
    finish(start(pictures, "one", {}))
    finish(start(pictures, "two", TWO))
    assert_as_one(pictures, "two")
    assert len(list((pictures.parent / "two").rglob("*.ckpt"))) == 1

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    nodes = {"strategy": "ddp", "devices": 1, "num_nodes": 2}
    launcher = ("-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1", "--master_addr", "127.0.0.1")
    launcher = (*launcher, "--master_port", str(port), "--node_rank")
    finish(*[start(pictures, "nodes", nodes, (*launcher, rank)) for rank in "01"])
    assert_as_one(pictures, "nodes")


@pytest.mark.parametrize("rank", ["0", "1"])
def test_fit_ends_in_all_processes_when_one_dies(pictures: Path, rank: str) -> None:
    process = start(pictures, "dying", TWO, DIES=rank)
    output, _ = process.communicate(timeout=300)
    assert process.returncode != 0, output[-3000:]
    for _ in range(60):
        left = [other for other in psutil.process_iter(["cmdline"]) if str(pictures) in (other.info["cmdline"] or [])]
        if not left:
            break
        time.sleep(1)
    assert not left
