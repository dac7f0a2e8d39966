from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import llmcore
from llmcore.checkpoints import (
    CheckpointError,
    copy_tensors,
    find_latest,
    list_checkpoints,
    load_checkpoint,
    model_tensors,
    resolve,
    save_checkpoint,
    store,
)

IMPORTED_FROM = Path(llmcore.__file__).parent.parent  # where a subprocess finds the llmcore under test


def save(root: Path, step: int, **changes) -> Path:
    torch.manual_seed(step)
    values = {
        "model": {"a.weight": torch.randn(5, 3), "b.weight": torch.randn(7).bfloat16()},
        "config": {"layers": 2},
        "optimizer": {"exp_avg.a.weight": torch.randn(5, 3)},
        "state": {"tokens": 12, "data": {"cursor": [1, 2]}},
        "keep_last": 3,
    }
    return save_checkpoint(root, step, **{**values, **changes})


def names(root: Path) -> list[str]:
    return [p.name for p in list_checkpoints(root)]


def test_round_trip_is_exact(tmp_path):
    path = save(tmp_path, 7)
    back = load_checkpoint(path)
    torch.manual_seed(7)
    assert torch.equal(back.model["a.weight"], torch.randn(5, 3))
    assert back.model["b.weight"].dtype == torch.bfloat16
    assert torch.equal(back.model["b.weight"], torch.randn(7).bfloat16())
    assert torch.equal(back.optimizer["exp_avg.a.weight"], torch.randn(5, 3))
    assert (back.step, back.config, back.state["data"]) == (7, {"layers": 2}, {"cursor": [1, 2]})
    assert (tmp_path / "latest").read_text() == "step-000007\n"
    assert load_checkpoint(path, optimizer=False).optimizer == {}
    assert resolve(tmp_path) == resolve(path) == path


def test_only_the_newest_are_kept(tmp_path):
    for step in (1, 2, 3, 10, 20):
        save(tmp_path, step, keep_last=2)
    assert names(tmp_path) == ["step-000020", "step-000010"]
    assert find_latest(tmp_path).name == "step-000020"


def test_the_newest_whole_one_survives_even_behind_a_damaged_newer_one(tmp_path):
    save(tmp_path, 50)
    (tmp_path / "step-000050" / "model.safetensors").write_bytes(b"")
    save(tmp_path, 40, keep_last=1)
    with pytest.warns(UserWarning, match="passed over"):
        assert find_latest(tmp_path).name == "step-000040"


def test_same_step_is_replaced(tmp_path):
    save(tmp_path, 5)
    save(tmp_path, 5, config={"layers": 9})
    assert load_checkpoint(tmp_path / "step-000005").config == {"layers": 9}
    assert names(tmp_path) == ["step-000005"]


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


FILES = ["config.json", "model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"]
DAMAGE = {
    "nested too deep": lambda p: p.write_text("[" * 100_000),
    "truncated": lambda p: p.write_bytes(p.read_bytes()[:-9]),
    "emptied": lambda p: p.write_bytes(b""),
    "deleted": Path.unlink,
    "bit-flipped": flip_bit,
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_found_and_passed_over(tmp_path, name, damage):
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    DAMAGE[damage](path / name)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path)
    # a bit flipped in the manifest may change what it says of another file
    assert name in str(caught.value) or name == "manifest.json"
    with pytest.warns(UserWarning, match="checkpoint passed over"):
        assert find_latest(tmp_path).name == "step-000001"


def test_a_bit_of_every_byte_of_the_manifest_fails_cleanly(tmp_path):
    """A flipped bit in the manifest gives CheckpointError or, where it says nothing, the same tensors."""
    path = save(tmp_path, 1)
    manifest = path / "manifest.json"
    good = manifest.read_bytes()
    found = 0
    for position in range(len(good)):
        manifest.write_bytes(good[:position] + bytes([good[position] ^ 4]) + good[position + 1 :])
        try:
            load_checkpoint(path)
        except CheckpointError:
            found += 1
    assert found > len(good) // 2


def test_a_tampered_manifest_cannot_reach_outside(tmp_path):
    path = save(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["../../secret"] = {"size": 1, "sha256": ""}
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="plain file name"):
        load_checkpoint(path)


def test_half_written_folders_are_never_seen(tmp_path):
    save(tmp_path, 3)
    half = tmp_path / ".building-step-000004"
    half.mkdir()
    save_file({"a": torch.zeros(2)}, half / "model.safetensors")
    bare = tmp_path / "step-000005"
    bare.mkdir()
    with pytest.warns(UserWarning, match=r"manifest\.json: missing"):
        assert find_latest(tmp_path).name == "step-000003"
    save(tmp_path, 6)
    assert not half.exists()


def test_killed_while_replacing_leaves_the_old_one(tmp_path):
    path = save(tmp_path, 3)
    path.rename(tmp_path / ".replaced-step-000003")
    assert load_checkpoint(find_latest(tmp_path)).step == 3
    save(tmp_path, 4, keep_last=1)
    assert names(tmp_path) == ["step-000004"]


def test_copy_tensors_refuses_before_it_touches_anything():
    target = {"a": torch.zeros(2), "b": torch.zeros(3, 2)}
    for tensors, message in (
        ({"a": torch.ones(2)}, r"model: tensor 'b' is missing"),
        ({"a": torch.ones(2), "b": torch.ones(3, 2), "c": torch.ones(1)}, r"tensor 'c' has no place"),
        ({"a": torch.ones(2), "b": torch.ones(2, 3)}, r"'b' has shape \(2, 3\); this model has \(3, 2\)"),
        ({"a": torch.ones(2), "b": torch.ones(3, 2).half()}, r"'b' is torch.float16; this model holds it as"),
    ):
        with pytest.raises(CheckpointError, match=message):
            copy_tensors(target, tensors, "model")
        assert not target["a"].any()


def test_tied_weights_are_stored_once(tmp_path):
    model = torch.nn.Sequential(torch.nn.Embedding(8, 4), torch.nn.Linear(4, 8, bias=False))
    model[1].weight = model[0].weight
    tensors = model_tensors(model)
    assert list(tensors) == ["0.weight"]
    path = save(tmp_path, 1, model=tensors)
    want = model[0].weight.detach().clone()
    torch.nn.init.zeros_(model[0].weight)
    copy_tensors(model_tensors(model), load_checkpoint(path).model, path)
    assert torch.equal(model[1].weight, want)


def test_missing_and_empty_folders(tmp_path):
    assert find_latest(tmp_path / "none") is None
    with pytest.raises(CheckpointError, match="no such folder"):
        resolve(tmp_path / "none")
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        resolve(tmp_path)
    with pytest.raises(ValueError, match="keep_last is 0"):
        save(tmp_path, 1, keep_last=0)


class Killed(BaseException):
    """Ends a save where SIGKILL would: no handler of ordinary errors sees it."""


def test_killed_at_every_step_of_a_save_leaves_a_whole_checkpoint(tmp_path, monkeypatch):
    """Every call that changes the folder is in turn the last one made, while a checkpoint of a new step is written and
    while one of the same step is replaced."""
    left = None

    def killing(function):
        def call(*args, **kwargs):
            nonlocal left
            if left == 0:
                raise Killed
            left = None if left is None else left - 1
            return function(*args, **kwargs)

        return call

    for name in ("mkdir", "rename", "replace", "unlink", "rmdir", "fsync"):
        monkeypatch.setattr(os, name, killing(getattr(os, name)))
    monkeypatch.setattr(store, "save_file", killing(store.save_file))
    monkeypatch.setattr(Path, "write_text", killing(Path.write_text))
    kills = 0
    for start in range(1000):
        root = tmp_path / str(start)
        left = None
        for step in (1, 2):
            save(root, step, config={"save": step})
        left, last = start, 2
        try:
            for number, step in ((3, 2), (4, 3), (5, 4)):  # the first replaces
                save(root, step, config={"save": number}, keep_last=2)
                last = number
            break
        except Killed:
            kills += 1
        left = None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            checkpoint = load_checkpoint(find_latest(root))
        assert checkpoint.config["save"] in (last, last + 1)
        save(root, 9, keep_last=1)
        assert sorted(p.name for p in root.iterdir()) == ["latest", "step-000009"]
        assert load_checkpoint(find_latest(root)).step == 9
    assert kills > 50


WRITER = """
import sys, torch
from llmcore.checkpoints import save_checkpoint
tensors = {f"t{i}": torch.full((20000,), 0.0) for i in range(8)}
for step in range(1, 10**6):
    for t in tensors.values():
        t.fill_(step)
    save_checkpoint(sys.argv[1], step, model=tensors, config={}, state={"tokens": step}, keep_last=1 + step % 2)
    print(step, flush=True)
"""


def test_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path):
    import random
    import time

    random.seed(0)
    last = 0
    for _ in range(2):
        command = [sys.executable, "-c", WRITER, str(tmp_path)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=IMPORTED_FROM)
        last = int(process.stdout.readline())  # it has begun to write
        time.sleep(random.uniform(0.0, 0.3))
        process.kill()
        last = max([last, *map(int, process.stdout.read().split())])
        process.wait()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            checkpoint = load_checkpoint(find_latest(tmp_path))
        assert checkpoint.step >= last
        assert all((t == checkpoint.step).all() for t in checkpoint.model.values())
        for path in tmp_path.glob("step-*"):  # each run counts from 1 again
            for file in path.iterdir():
                file.unlink()
            path.rmdir()


def test_a_full_disk_is_an_error_and_costs_no_checkpoint(tmp_path):
    resource = pytest.importorskip("resource")
    save(tmp_path, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))  # what is longer can't be written
    try:
        with pytest.raises(OSError, match=r"optimizer\.safetensors: not written"):
            save(tmp_path, 2, optimizer={"exp_avg.a.weight": torch.randn(50, 30)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert find_latest(tmp_path).name == "step-000001"
    save(tmp_path, 2)
    assert {p.name for p in tmp_path.iterdir()} == {"step-000001", "step-000002", "latest"}
