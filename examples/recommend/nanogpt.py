"""Runs of karpathy's nanoGPT itself: its train.py, on the README's change where the loss is harmonic."""

from __future__ import annotations

import os
import pickle
import re
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from .runs import BATCH, BLOCK, EVALUATION_BATCHES, EVALUATIONS, HEADS, Run, characters

REPOSITORY = Path(__file__).parents[2]
EVALUATED = re.compile(r"^step (\d+): train loss ([\d.]+), val loss ([\d.]+)$", re.MULTILINE)


def change() -> str:
    """The README's diff."""
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    return text.partition("```diff\n")[2].partition("```")[0]


def prepare(run: Run, root: Path, clone: Path) -> Path:
    """A copy of the clone with the data, the seed and the change of a run."""
    folder = root / f"nanogpt-{run.loss}"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(clone, folder, ignore=shutil.ignore_patterns(".git", "*.ipynb", "assets", "out*"))
    source = characters(root)
    data = folder / "data" / "characters"
    data.mkdir()
    for name in ("train.bin", "val.bin"):
        (data / name).symlink_to((source / name).resolve())
    decoded = dict(enumerate(map(chr, np.load(source / "codes.npy").tolist())))
    with open(data / "meta.pkl", "wb") as file:
        pickle.dump({"vocab_size": len(decoded), "itos": decoded, "stoi": {c: i for i, c in decoded.items()}}, file)
    if run.loss == "harmonic":
        subprocess.run(["git", "apply"], cwd=folder, input=change(), text=True, check=True)
    train = folder / "train.py"
    program = train.read_text()
    assert program.count("torch.manual_seed(1337") == 1  # the one setting that is no option
    train.write_text(program.replace("torch.manual_seed(1337", f"torch.manual_seed({run.seed}"))
    return folder


def train(run: Run, root: Path, clone: Path) -> dict[str, Any]:
    """The record of a run, from what train.py prints."""
    folder = prepare(run, root, clone)
    options = {
        **{"dataset": "characters", "device": "cpu", "compile": False, "dropout": 0.0, "always_save_checkpoint": True},
        **{"block_size": BLOCK, "batch_size": BATCH, "n_head": HEADS, "n_layer": run.layers, "n_embd": run.width},
        **{"max_iters": run.steps, "lr_decay_iters": run.steps, "warmup_iters": run.steps // 10},
        **{"learning_rate": run.lr, "min_lr": run.lr / 10, "log_interval": 100},
        **{"eval_interval": run.steps // EVALUATIONS, "eval_iters": EVALUATION_BATCHES},
    }
    command = [sys.executable, "train.py", "config/train_shakespeare_char.py"]
    command += [f"--{name}={value}" for name, value in options.items()]
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]))
    start = time.perf_counter()
    said = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": path}
    ).stdout
    rows = EVALUATED.findall(said)
    return {
        **asdict(run),
        "val": [[int(step), float(val)] for step, _, val in rows],
        "train": [float(loss) for _, loss, _ in rows],
        "seconds": round(time.perf_counter() - start, 1),
    }
