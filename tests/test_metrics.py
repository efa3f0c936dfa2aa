"""Meters are exact, every step is one line of valid JSON, and no tracker can stop a run."""

from __future__ import annotations

import json
import logging
import math
import sys
from types import SimpleNamespace

import pytest
import torch

from megatron_rlvr.config import ConfigError, LoggingConfig
from megatron_rlvr.metrics import Meter, MetricsWriter, RolloutsWriter, rollout_row, row_is_right, spread
from megatron_rlvr.records import finite, newest_rows, read_rows, truncate_after
from megatron_rlvr.types import Prompt, Rollout, RolloutGroup, Verdict

OFF = LoggingConfig(tensorboard=False)


def group(number: int, samples: int = 4, text: str = "5*7+3", reward: float = 1.0) -> RolloutGroup:
    prompt = Prompt(f"train/{number}", "3,5,7=38>", (3, 11, 5), "countdown", {"target": 38})
    return RolloutGroup(
        prompt,
        [
            Rollout(i, [5, 13, 1], [-0.5, -0.25, -0.125], "stop", 7, text, Verdict(reward, "ok", text))
            for i in range(samples)
        ],
    )


def test_meter_means_are_exact_over_unequal_microbatches():
    values = torch.randn(103, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    meter = Meter()
    for part in values.split([1, 60, 42]):
        meter.add("loss", part.sum(), torch.tensor(part.numel()))
        meter.maximum("peak", part.max())
    meter.add("calls", 2.0)
    meter.add("calls", 4)
    means = meter.means()
    assert means["loss"] == pytest.approx(float(values.detach().mean()), rel=1e-12)
    assert means["peak"] == float(values.detach().max())
    assert means["calls"] == 3.0
    assert meter.sums["calls"] == (6.0, 2.0)
    assert all(type(number) is float for pair in meter.sums.values() for number in pair)
    assert type(meter.maxima["peak"]) is float


def test_meter_holds_no_graph():
    leaf = torch.ones(3, requires_grad=True)
    meter = Meter()
    meter.add("x", (leaf * 2).sum())
    assert not any(isinstance(item, torch.Tensor) and item.requires_grad for row in meter._pending for item in row)


def test_meter_merge_equals_one_meter():
    left, right, both = Meter(), Meter(), Meter()
    for meter, numbers in ((left, (1.0, 5.0)), (right, (2.0, 3.0))):
        for number in numbers:
            for target in (meter, both):
                target.add("a", number, 2)
                target.maximum("b", number)
    right.add("only", 1.0, 4)
    both.add("only", 1.0, 4)
    left.merge(right)
    assert left.means() == both.means()
    assert left.sums == both.sums
    assert right.sums["a"] == (5.0, 4.0)  # merging leaves the other as it was


def test_meter_leaves_out_empty_means_and_keeps_nan():
    meter = Meter()
    meter.add("empty", torch.tensor(0.0), torch.tensor(0))
    for value in (1.0, math.nan, 2.0):
        meter.maximum("gap", value)
    means = meter.means()
    assert "empty" not in means
    assert math.isnan(means["gap"])  # a NaN must not be hidden by a later, smaller finite value


def test_metrics_are_one_valid_line_per_step(tmp_path, caplog):
    with caplog.at_level(logging.WARNING), MetricsWriter(tmp_path, OFF) as writer:
        writer.write(1, {"reward/mean": torch.tensor(0.5), "sync/verified": True, "policy/loss": math.nan})
        assert len(read_rows(tmp_path / "metrics.jsonl")) == 1  # flushed before the next step
        writer.write(2, {"reward/mean": 0.25, "sync/verified": False, "policy/loss": -math.inf, "policy/kl": math.inf})
        writer.write(3, {"policy/kl": math.inf})
        writer.write(4, {"policy/loss": math.nan})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON")) for line in lines]
    assert rows[0] == {"step": 1, "reward/mean": 0.5, "sync/verified": True, "policy/loss": None}
    assert rows[1]["policy/loss"] is None
    assert rows[1]["sync/verified"] is False
    warned = [record.message for record in caplog.records]
    assert len(warned) == 2  # once per name
    assert "policy/loss" in warned[0]
    assert "step 1" in warned[0]


def test_the_newest_rows_are_the_whole_lines_at_the_end_wherever_the_cut_falls(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "text": "x" * step}) + "\n" for step in range(1, 6)]
    path.write_text("".join(lines))
    for most in range(1, sum(map(len, lines)) + 9):
        held = [step for step in range(1, 6) if sum(map(len, lines[step - 1 :])) <= most]
        assert [row["step"] for row in newest_rows(path, most)] == held, most


def test_what_json_has_no_word_for_is_null_wherever_it_stands():
    assert finite({"a": [math.nan, (1.0, -math.inf)], "b": {"c": [{"d": math.inf}]}}) == {
        "a": [None, [1.0, None]],
        "b": {"c": [{"d": None}]},
    }


def test_resuming_writes_each_step_once(tmp_path):
    with MetricsWriter(tmp_path, OFF) as writer:
        for step in range(1, 6):
            writer.write(step, {"run": "first"})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "ru')  # cut by a kill
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 5
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write("数".encode()[:2])  # in the middle of a character
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 5
    with MetricsWriter(tmp_path, OFF, resume_step=3) as writer:
        for step in range(4, 7):
            writer.write(step, {"run": "second"})
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["run"] for row in rows] == ["first"] * 3 + ["second"] * 3


def test_resuming_rollouts_keeps_all_rows_of_earlier_steps(tmp_path):
    writer = RolloutsWriter(tmp_path, count=2)
    for step in (1, 2, 3):
        writer.write(step, [group(0), group(1)])
    writer.close()
    truncate_after(tmp_path / "rollouts.jsonl", 2)
    assert [row["step"] for row in read_rows(tmp_path / "rollouts.jsonl")] == [1, 1, 2, 2]
    truncate_after(tmp_path / "rollouts.jsonl", 9)
    assert len(read_rows(tmp_path / "rollouts.jsonl")) == 4
    truncate_after(tmp_path / "absent.jsonl", 2)
    assert not (tmp_path / "absent.jsonl").exists()


@pytest.mark.parametrize("line", ["{broken", "[1, 2]", '{"no": "step"}'])
def test_a_broken_line_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    for read in (read_rows, lambda path: truncate_after(path, 3)):
        with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2"):
            read(path)
    assert len(path.read_text().splitlines()) == 3  # nothing was cut


def test_tensorboard_holds_the_numbers(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricsWriter(tmp_path, LoggingConfig(tensorboard=True)) as writer:
        for step in (1, 2):
            writer.write(
                step, {"reward/mean": step / 4, "sync/verified": True, "policy/loss": math.nan, "note": "text"}
            )
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert sorted(events.Tags()["scalars"]) == ["reward/mean", "sync/verified"]
    assert [(event.step, event.value) for event in events.Scalars("reward/mean")] == [(1, 0.25), (2, 0.5)]
    with MetricsWriter(tmp_path, LoggingConfig(tensorboard=True)) as writer:  # begun again, for there is no checkpoint
        writer.write(1, {"reward/mean": 0.75})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("reward/mean")] == [(1, 0.75)]


class FakeWandb(SimpleNamespace):
    """W&B's interface as far as it is used."""

    def __init__(self) -> None:
        super().__init__(started=[], logged=[], finished=[], broken=False, id="abc123", __spec__="there")

    def init(self, **settings):
        self.started.append(settings)
        return self

    def define_metric(self, name, step_metric):
        self.axis = (name, step_metric)

    def log(self, values):
        if self.broken:
            raise ConnectionError("the network is gone")
        self.logged.append(values)

    def finish(self, exit_code):
        self.finished.append(exit_code)


def test_wandb_gets_the_metrics_and_a_resumed_run_goes_on(tmp_path, monkeypatch):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    settings = LoggingConfig(tensorboard=False, wandb_project="rlvr")
    with MetricsWriter(tmp_path, settings, "demo", {"seed": 1}) as writer:
        writer.write(1, {"reward/mean": 0.5, "policy/loss": math.nan})
    with MetricsWriter(tmp_path, settings, "demo", {"seed": 1}, resume_step=1):
        pass
    assert wandb.logged == [{"step": 1, "reward/mean": 0.5}]
    assert wandb.axis == ("*", "step")
    assert wandb.finished == [0, 0]
    with pytest.raises(RuntimeError), MetricsWriter(tmp_path, settings, "demo", {"seed": 1}, resume_step=1):
        raise RuntimeError("a step failed")
    assert wandb.finished == [0, 0, 1]
    first, second, _ = wandb.started
    assert (first["project"], first["name"], first["config"], first["id"]) == ("rlvr", "demo", {"seed": 1}, None)
    assert (second["id"], second["resume"]) == ("abc123", "allow")


class FakeMlflow(SimpleNamespace):
    """MLflow's client as far as it is used."""

    def __init__(self) -> None:
        super().__init__(experiments={}, logged=[], runs=0, states=[], addresses=[], configs=[], params=[])

    def __call__(self, address):
        self.addresses.append(address)
        return self

    def get_experiment_by_name(self, name):
        return self.experiments.get(name)

    def create_experiment(self, name, files):
        self.experiments[name] = SimpleNamespace(experiment_id="7", files=files)
        return "7"

    def create_run(self, experiment, run_name):
        self.runs += 1
        return SimpleNamespace(info=SimpleNamespace(run_id=f"{run_name}-{self.runs} in {experiment}"))

    def log_dict(self, run, values, file):
        self.configs.append((run, values, file))

    def log_batch(self, run, metrics=(), params=()):
        assert len(params) <= 100
        self.params += [(run, param.key, param.value) for param in params]
        self.logged += [(run, metric.key, metric.value, metric.step) for metric in metrics]

    def update_run(self, run, status):
        self.states.append((run, status))

    def set_terminated(self, run, status):
        self.states.append((run, status))


def test_mlflow_gets_the_metrics_and_a_resumed_run_goes_on(tmp_path, monkeypatch):
    client = FakeMlflow()
    metric = lambda key, value, timestamp, step: SimpleNamespace(key=key, value=value, step=step)  # noqa: E731
    param = lambda key, value: SimpleNamespace(key=key, value=value)  # noqa: E731
    monkeypatch.setitem(sys.modules, "mlflow", SimpleNamespace(MlflowClient=client, __spec__="there"))
    monkeypatch.setitem(sys.modules, "mlflow.entities", SimpleNamespace(Metric=metric, Param=param))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    settings = LoggingConfig(tensorboard=False, mlflow_experiment="rlvr")
    many = {str(number): number for number in range(150)}
    config = {"seed": 1, "exploration": {"lp_reg": {"rho": 0.01}}, "many": many}
    with MetricsWriter(tmp_path, settings, "demo", config) as writer:
        writer.write(1, {"eval/pass@1": 0.5, "policy/loss": math.nan})
        writer.mirror(2, {"eval/a+b(c)/pass@1": 0.25})
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://here")
    with MetricsWriter(tmp_path, settings, "demo", config, resume_step=1) as writer:
        writer.write(2, {"reward/mean": 1.0})
    run = "demo-1 in 7"
    held_out = [(run, "eval/pass_at_1", 0.5, 1), (run, "eval/a_b_c_/pass_at_1", 0.25, 2)]
    assert client.logged == [*held_out, (run, "reward/mean", 1.0, 2)]
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2]
    assert client.experiments["rlvr"].files == f"{tmp_path}/mlflow_files"
    assert client.addresses == [f"sqlite:///{tmp_path}/mlflow.db", "http://here"]
    assert client.params[:2] == [(run, "seed", "1"), (run, "exploration.lp_reg.rho", "0.01")]
    assert client.params[2:] == [(run, f"many.{number}", str(number)) for number in range(150)]
    assert client.configs == [(run, config, "config.yaml")]
    with pytest.raises(RuntimeError), MetricsWriter(tmp_path, settings, "demo", config, resume_step=2):
        raise RuntimeError("a step failed")
    ends = ["FINISHED", "RUNNING", "FINISHED", "RUNNING", "FAILED"]
    assert client.states == [(run, state) for state in ends]


def test_a_tracker_that_fails_never_stops_the_run(tmp_path, monkeypatch, caplog):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with MetricsWriter(tmp_path, LoggingConfig(tensorboard=False, wandb_project="rlvr")) as writer:
        wandb.broken = True
        for step in (1, 2, 3):
            writer.write(step, {"reward/mean": 0.5})
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    warnings = [record.message for record in caplog.records]
    assert len(warnings) == 1
    assert "W&B" in warnings[0]
    assert "the network is gone" in warnings[0]


@pytest.mark.parametrize(
    ("module", "settings"),
    [
        ("wandb", LoggingConfig(tensorboard=False, wandb_project="rlvr")),
        ("mlflow", LoggingConfig(tensorboard=False, mlflow_experiment="rlvr")),
        ("tensorboard", LoggingConfig(tensorboard=True)),
    ],
)
def test_a_tracker_that_is_not_installed_is_a_config_error(tmp_path, monkeypatch, module, settings):
    monkeypatch.setitem(sys.modules, module, None)  # what Python itself uses for "cannot be imported"
    with pytest.raises(ConfigError, match=r"logging\..*pip install"):
        MetricsWriter(tmp_path, settings)


def test_wandb_that_does_not_start_is_a_config_error(tmp_path, monkeypatch):
    def refuse(**settings):
        raise RuntimeError("no API key")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=refuse, __spec__="there"))
    with pytest.raises(ConfigError, match=r"no API key.*WANDB_MODE=offline"):
        MetricsWriter(tmp_path, LoggingConfig(tensorboard=False, wandb_project="rlvr"))


def test_rollout_rows_say_everything(tmp_path):
    assert rollout_row(3, *_first(group(5))) == {
        "step": 3,
        "prompt_id": "train/5",
        "prompt": "3,5,7=38>",
        "sample": 0,
        "response": "5*7+3",
        "tokens": 3,
        "reward": 1.0,
        "right": True,
        "status": "ok",
        "extracted": "5*7+3",
        "answer": {"target": 38},
        "finish_reason": "stop",
        "policy_version": 7,
        "log_prob": -0.875,
    }
    awkward = '数学 \u2028 \ud800 \x00 "</script>"\nline'
    writer = RolloutsWriter(tmp_path, count=1)
    writer.write(1, [group(0, text=awkward, reward=math.nan)])
    writer.close()
    (row,) = read_rows(tmp_path / "rollouts.jsonl")
    assert row["response"] == awkward
    assert row["reward"] is None
    assert "数学" in (tmp_path / "rollouts.jsonl").read_text(encoding="utf-8")


def test_a_row_knows_what_was_right():
    said = {"reward": 1.0, "right": False, "status": "ok"}
    assert row_is_right(said) is False and row_is_right(said | {"reward": 0.5, "right": True}) is True
    earlier = {"reward": 1.0, "status": "ok"}
    assert row_is_right(earlier) is True and row_is_right(earlier | {"reward": 0.5}) is False
    for unjudged in ({"reward": None, "status": None}, {"reward": 0.0, "right": None, "status": "timeout"}):
        assert row_is_right(unjudged) is None


def test_spread_covers_the_groups():
    assert spread([4] * 8, 3) == [(0, 0), (2, 0), (5, 0)]
    assert spread([2, 2], 3) == [(0, 0), (1, 0), (0, 1)]
    assert spread([1, 3], 9) == [(0, 0), (1, 0), (1, 1), (1, 2)]
    assert spread([4] * 8, 0) == []
    assert spread([], 5) == []
    for count in range(1, 40):
        chosen = spread([4] * 8, count)
        assert len(set(chosen)) == len(chosen) == min(count, 32)
        assert len({place for place, _ in chosen}) == min(count, 8)


def _first(one: RolloutGroup) -> tuple[Prompt, Rollout]:
    return one.prompt, one.rollouts[0]
