"""A resumed run is the uninterrupted one, bit for bit in its own layout; and no bad checkpoint is ever loaded."""

from __future__ import annotations

import json
import pickle
import random
import resource
import shutil
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing

from megatron_rlvr import platform
from megatron_rlvr.checkpoint_folder import checkpoints, inventory, seal
from megatron_rlvr.distributed.groups import ParallelGroups
from megatron_rlvr.models import checkpoint_writer, sharded_state
from megatron_rlvr.models.checkpoint import is_layout_of, layout_of, load, newest_usable
from megatron_rlvr.models.checkpoint_writer import CheckpointWriter
from megatron_rlvr.models.critic import Critic
from megatron_rlvr.types import Microbatch
from megatron_rlvr.weights.megatron_folder import MegatronFolder
from tests.models.conftest import Case
from tests.models.layouts import Layout, make_batch, make_policy, megatron, run_update
from tests.models.layouts import weights as weights_of
from tests.ranks import run_ranks
from tests.tiny import make_config, make_folder

OPTIMIZER = {"lr": 1e-3, "warmup_steps": 4, "schedule": "cosine", "weight_decay": 0.1, "distributed": True}
STATE = {"step": 7, "prompt_position": 42, "exploration": {"lp_reg": {}}}


def _value_loss(micro: Microbatch, values: torch.Tensor) -> torch.Tensor:
    return ((values - micro.advantages[:, None]).square() * micro.loss_mask[:, None]).sum() / 100


def _models(
    folder: Path, layout: Layout, ranks: ParallelGroups, dtype: str, distributed: bool = True
) -> dict[str, Any]:
    """A policy and a critic whose head's weights are drawn from the folder's name."""
    optimizer = OPTIMIZER | {"distributed": distributed}
    sections = {
        "model": {"path": str(folder), "dtype": dtype},
        "optimizer": optimizer,
        "critic": {"num_heads": 3, "optimizer": optimizer},
        "trainer": {"num_steps": 10},
    }
    config = make_config(folder, {"parallel": vars(layout)} | sections)
    config.seed = len(folder.name)
    return {"policy": make_policy(folder, layout, ranks, **sections), "critic": Critic(config, ranks)}


def _update(models: dict[str, Any], batch: Any, *numbers: int) -> list[dict[str, float]]:
    of_critic = [models["critic"].update(batch, batch.updates[number], _value_loss).means() for number in numbers]
    return of_critic + [run_update(models["policy"], batch, number) for number in numbers]


def _weights(models: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {f"{kind} {name}": item for kind in models for name, item in weights_of(models[kind]).items()}


def _writer(run: Path, models: dict[str, Any], ranks: ParallelGroups, **trainer: Any) -> CheckpointWriter:
    return CheckpointWriter(run, make_config(run, {"trainer": trainer}), models, ranks)


def _resume(layout: Layout, case: Case, other: Path, dtype: str, run: Path) -> dict[str, bool]:
    """Three updates at once against one, a save that two more overtake, a load into other models, and two more."""
    with megatron(layout) as ranks:
        batch = make_batch(case.groups, case.samples, layout, ranks, 60, updates=3)
        first = _models(case.folder, layout, ranks, dtype)
        _update(first, batch, 0)
        writer, saved, drawn = _writer(run, first, ranks), _weights(first), torch.get_rng_state()
        writer.save(STATE)
        metrics, final = _update(first, batch, 1, 2), _weights(first)  # while it is being written
        problem = writer.wait()
        second = _models(other, layout, ranks, dtype)
        torch.manual_seed(99)
        path, problems = newest_usable(run, second, ranks)
        assert path is not None, (problem, problems)
        state = load(path, second, ranks)
        loaded = _weights(second)
        steps = [
            item["step"]
            for model in second.values()
            for inner in model.optimizer.chained_optimizers
            for item in inner.optimizer.state.values()
        ]
        counters = {float(step) for step in steps} == {1.0} and len({step.data_ptr() for step in steps}) == len(steps)
        resumed_metrics, resumed = _update(second, batch, 1, 2), _weights(second)
        return {
            "written": problem == "" and problems == [],
            "state": {key: state[key] for key in STATE} == STATE,
            "loaded": all(loaded[name].equal(saved[name]) for name in saved),
            "moved on": not all(final[name].equal(saved[name]) for name in saved),
            "step counters": counters,
            "random streams": torch.get_rng_state().equal(drawn),
            "metrics": metrics == resumed_metrics,
            "weights": all(resumed[name].equal(final[name]) for name in final),
        }


@pytest.mark.parametrize(
    "layout, dtype",
    [
        (Layout(dp=2), "float32"),
        (Layout(pp=2, vpp=2), "float32"),
        (Layout(tp=2, dp=2), "bfloat16"),
        (Layout(cp=2), "float32"),
    ],
    ids=str,
)
def test_resuming_is_bit_identical(layout: Layout, dtype: str, cases: dict[str, Case], tmp_path: Path) -> None:
    # same shape, other weights: what a load forgets stays visible
    other, case = make_folder(tmp_path / "other", "qwen3", tied=True, seed=1), cases["qwen3-tied"]
    for results in run_ranks(layout.ranks, _resume, layout, case, other, dtype, tmp_path / "run", timeout=60):
        assert results == dict.fromkeys(results, True)


def test_a_checkpoint_that_is_older_than_cp_is_of_a_layout_without_it() -> None:
    groups = ParallelGroups.single()
    assert is_layout_of(groups, [1, 1, 1]) and is_layout_of(groups, layout_of(groups))
    assert not is_layout_of(groups, [1, 1, 2]) and not is_layout_of(groups, [1, 1, 1, 2])


CHAIN = [  # (layout, distributed optimizer): the vocabulary is padded to 512 columns with tp=2, to 384 with tp=1
    (Layout(tp=2, pp=1, dp=2), True),
    (Layout(tp=1, pp=2, dp=2), True),
    (Layout(tp=2, pp=2), False),
    (Layout(tp=1, pp=1, dp=4), True),
    (Layout(dp=2, cp=2), True),
]


def _chain(folder: Path, case: Case, run: Path) -> tuple[list[float], list[float]]:
    """Gradient norms of three updates in each layout, loaded from the last one; and of all in the first layout."""

    def norms(layout: Layout, ranks: ParallelGroups, models: dict[str, Any]) -> list[float]:
        batch = make_batch(case.groups, case.samples, layout, ranks, 60, updates=3)
        rows = _update(models, batch, 0, 1, 2)
        return [row.get("policy/grad_norm", row.get("critic/grad_norm", 0.0)) for row in rows]

    moved, still = [], []
    for number, (layout, distributed) in enumerate(CHAIN):
        with megatron(layout) as ranks:
            models = _models(folder, layout, ranks, "float32", distributed)
            if number:
                load(run / "checkpoints" / f"step_{number}", models, ranks)
                writer = _writer(run / f"again_{number}", models, ranks)
                writer.save(STATE | {"step": number})  # what was loaded, written by the new layout
                assert writer.wait() == ""
            moved += norms(layout, ranks, models)
            writer = _writer(run, models, ranks, keep_last=9)
            writer.save(STATE | {"step": number + 1})
            assert writer.wait() == ""
    layout, distributed = CHAIN[0]
    with megatron(layout) as ranks:
        models = _models(folder, layout, ranks, "float32", distributed)
        for _ in CHAIN:
            still += norms(layout, ranks, models)
    return moved, still


def test_every_layout_goes_on_from_any_other(cases: dict[str, Case], tmp_path: Path) -> None:
    """tp 2 -> pp 2 -> tp 2 x pp 2 -> dp 4 -> dp 2 x cp 2: optimizer state equal bit for bit, gradient norms to 1e-5."""
    run, folder = tmp_path / "run", make_folder(tmp_path / "model", "qwen3", tied=True, vocab_size=300)
    for moved, still in run_ranks(4, _chain, folder, cases["qwen3-tied"], run, timeout=120):
        assert len(moved) == 6 * len(CHAIN) and min(moved) > 0
        assert moved == pytest.approx(still, rel=1e-5)
    for number in range(1, len(CHAIN)):
        before = run / "checkpoints" / f"step_{number}"
        after = run / f"again_{number}" / "checkpoints" / f"step_{number}"
        counts = [json.loads((path / "run.json").read_text())["models"] for path in (before, after)]
        done = {"updates": 3 * number, "scheduled": 3 * number}
        assert counts[0] == counts[1] == {"policy": done, "critic": done}
        for name in ("policy", "critic"):
            _assert_equal(before / name, after / name)


def _assert_equal(folder: Path, other: Path) -> None:
    """The same tensors, of which those over the vocabulary may be padded differently."""
    with MegatronFolder(folder) as one, MegatronFolder(other) as two:
        assert one.tensors.keys() == two.tensors.keys()
        assert sum(name.startswith("optimizer.state.exp_avg_sq.") for name in one.tensors) >= 10
        for name in one.tensors:
            a, b = one.tensor(name), two.tensor(name)
            assert a.shape == b.shape or "embedding" in name, name
            rows = 300 if "embedding" in name else len(a)
            assert a[:rows].equal(b[:rows]), name


def _upstream(case: Case, run: Path) -> bool:
    """Megatron's own loader fills a model of another layout from a checkpoint's folder."""
    with megatron(Layout(dp=2)) as ranks:
        models = {"policy": make_policy(case.folder, Layout(dp=2), ranks)}
        with torch.no_grad():
            for parameter in models["policy"].chunks[0].parameters():
                parameter.add_(0.5)
        saved, writer = weights_of(models["policy"]), _writer(run, models, ranks)
        writer.save(STATE)
        assert writer.wait() == ""
    layout = Layout(tp=2)
    with megatron(layout) as ranks:
        policy = make_policy(case.folder, layout, ranks)
        (chunk,) = policy.chunks
        with platform.megatron_calls():
            loaded, unasked, absent = dist_checkpointing.load(
                chunk.sharded_state_dict(), str(run / "checkpoints/step_7/policy"), strict="return_all"
            )
        # What Transformer Engine's fp8 would keep there is nothing, and a pickle.
        assert all("_extra_state" in name for name in absent)
        assert all(name.startswith("optimizer.") for name in unasked)
        chunk.load_state_dict(loaded, strict=False)
        whole = {name: tensor for name, tensor in weights_of(policy).items() if tensor.shape == saved[name].shape}
        return len(whole) > 10 and all(tensor.equal(saved[name]) for name, tensor in whole.items())


def test_megatron_reads_the_policy_folder(cases: dict[str, Case], tmp_path: Path) -> None:
    assert run_ranks(2, _upstream, cases["qwen3-tied"], tmp_path / "run", timeout=60) == [True, True]


def _tampered(folder: Path) -> dict[str, Any]:
    """What can happen to a checkpoint -> (how to do it, what the message must hold)."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    draw = random.Random(5)

    def truncate(file: Path, at: int) -> None:
        file.write_bytes(file.read_bytes()[:at])

    def flip(file: Path) -> None:
        content = bytearray(file.read_bytes())
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        file.write_bytes(content)

    cases = {}
    for number in range(20):
        file = draw.choice(files)
        cases[f"cut {number}"] = (partial(truncate, file, draw.randrange(file.stat().st_size)), file.name)
    for file in files:
        cases[f"flip {file.name}"] = (partial(flip, file), "" if file.name == "manifest.json" else file.name)
        cases[f"lose {file.name}"] = (file.unlink, file.name)

    def replace(file: Path, content: bytes) -> None:
        """As somebody would who knows how a checkpoint is made."""
        file.write_bytes(content)
        (folder / "manifest.json").unlink()
        entries = inventory(folder, [item for item in folder.rglob("*") if item.is_file()])
        half = folder.with_name(folder.name + ".partial")
        folder.rename(half)
        seal(half, entries)

    cases["poison"] = (partial(replace, folder / "policy/.metadata", pickle.dumps(print)), "builtins.print")
    return cases


def _refused(case: Case, other: Path, run: Path) -> dict[str, str]:
    """Checkpoints 1 and 2, the second one of which something happens to."""
    found = {}
    with megatron(Layout()) as ranks:
        models = {"policy": make_policy(case.folder, Layout(), ranks)}
        writer = _writer(run, models, ranks)
        for step in (1, 2):
            writer.save({"step": step})
        assert writer.wait() == ""
        victim = run / "checkpoints/step_2"
        shutil.copytree(victim, run / "copy")
        for name, (happen, word) in _tampered(victim).items():
            happen()
            path, problems = newest_usable(run, models, ranks)
            right = path == run / "checkpoints/step_1" and len(problems) == 1 and word in problems[0]
            found[name] = "" if right and str(victim) in problems[0] else f"{path} {problems}"
            shutil.rmtree(victim)
            shutil.copytree(run / "copy", victim)
        found["whole again"] = "" if newest_usable(run, models, ranks) == (victim, []) else "refused"
        shapes = {"policy": make_policy(other, Layout(), ranks)}
        path, problems = newest_usable(run, shapes, ranks)
        right = path is None and all("ffn_size 96, this run's has 128" in problem for problem in problems)
        found["another model"] = "" if right and len(problems) == 2 else f"{path} {problems}"
    return found


def test_a_bad_checkpoint_is_named_and_the_one_before_is_used(cases: dict[str, Case], tmp_path: Path) -> None:
    other = make_folder(tmp_path / "other", "qwen3", tied=True, intermediate_size=128)
    (found,) = run_ranks(1, _refused, cases["qwen3-tied"], other, tmp_path / "run", timeout=60)
    assert len(found) > 40 and {name: text for name, text in found.items() if text} == {}


def _room(case: Case, run: Path) -> list[Any]:
    """Saves with and without room on the disk: a limit on the size of files fails where a full disk would."""
    with megatron(Layout()) as ranks:
        models = {"policy": make_policy(case.folder, Layout(), ranks)}
        writer = _writer(run, models, ranks, keep_last=2, keep_best=1)
        run.mkdir()
        scores = {9: 0.5, 10: 0.9, 11: 0.7}  # by row: row 10 is of the policy after step 9
        lines = [json.dumps({"step": step, "eval/pass@1": score}) for step, score in scores.items()]
        (run / "metrics.jsonl").write_text("\n".join([*lines, json.dumps({"step": 12}), ""]))
        for step in (8, 9, 10, 11):
            writer.save({"step": step})
        writer.wait()
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        writer.save({"step": 12})
        problem = writer.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        without_room = sorted(path.name for path in (run / "checkpoints").iterdir())
        (run / "checkpoints/step_12.partial").mkdir()  # of a run that was killed meanwhile
        writer.save({"step": 12})
        found = [writer.wait(), [path.name for path in checkpoints(run)]]
        writer.save({"step": 5})  # of a run that went back, because later checkpoints are damaged
        writer.wait()
        return [problem, without_room, *found, [path.name for path in checkpoints(run)]]


def test_no_checkpoint_goes_before_the_next_is_there(cases: dict[str, Case], tmp_path: Path) -> None:
    run = tmp_path / "run"
    ((problem, without_room, again, found, gone_back),) = run_ranks(1, _room, cases["qwen3-tied"], run, timeout=60)
    assert "rank 0" in problem and "MiB are free" in problem
    assert without_room == ["step_10", "step_11", "step_9"]  # the newest two, and the best
    assert again == "" and found == ["step_9", "step_11", "step_12"]
    assert gone_back == ["step_5", *found]
    assert {path.name for path in (run / "checkpoints").iterdir()} == set(gone_back)  # nothing half written is left


def _save_without_the_model(folder: Path, run: Path) -> tuple[str, list[str]]:
    with megatron(Layout()) as ranks:
        models = {"policy": make_policy(folder, Layout(), ranks)}
        writer = _writer(run, models, ranks)
        shutil.rmtree(folder)
        writer.save({"step": 1})
        return writer.wait(), [json.loads(path.read_text())["model_type"] for path in run.glob("**/config.json")]


def test_a_model_folder_that_goes_away_takes_no_checkpoint_with_it(cases: dict[str, Case], tmp_path: Path) -> None:
    shutil.copytree(cases["qwen3-tied"].folder, tmp_path / "model")
    (found,) = run_ranks(1, _save_without_the_model, tmp_path / "model", tmp_path / "run", timeout=60)
    assert found == ("", ["qwen3"])


def test_a_rank_that_waits_for_its_writer_is_alive_for_as_long_as_that_may_take(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A large model on a slow disk takes longer than run.hang_timeout; a writer that hangs does not go on for ever."""
    beats: list[str] = []
    enough, written = threading.Event(), threading.Event()

    def beat(phase: str) -> None:
        beats.append(phase)
        if len(beats) == 5:
            enough.set()

    monkeypatch.setattr(checkpoint_writer.watchdog, "beat", beat)
    monkeypatch.setattr(checkpoint_writer, "BEAT", 0.01)
    writer = object.__new__(CheckpointWriter)
    writer._problem, writer._began = "", time.monotonic()
    writer._thread = threading.Thread(target=enough.wait, args=(30,))
    writer._thread.start()
    assert writer.wait() == "" and set(beats) == {"save"} and len(beats) >= 5

    beats.clear()
    writer._began -= checkpoint_writer.TIMEOUT
    writer._thread = threading.Thread(target=written.wait, args=(0.2,))
    writer._thread.start()
    assert writer.wait() == "" and not beats


def test_a_flat_range_is_cut_into_boxes() -> None:
    draw = random.Random(0)
    for _ in range(500):
        shape = [draw.randint(1, 5) for _ in range(draw.randint(1, 3))]
        whole = torch.arange(torch.Size(shape).numel()).view(shape)
        start, stop = sorted((draw.randint(0, whole.numel()), draw.randint(0, whole.numel())))
        found = []
        for offset, sizes in sharded_state.boxes(tuple(shape), start, stop):
            place = tuple(slice(first, first + size) for first, size in zip(offset, sizes, strict=True))
            found += whole[place].flatten().tolist()
        assert found == list(range(start, stop))
