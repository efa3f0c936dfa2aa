"""An evaluation's flow with an engine that answers from the request alone; the real one is in integration/."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from megatron_rlvr import benchmarks, evaluate, evaluation_sampling
from megatron_rlvr.benchmarks import Benchmark
from megatron_rlvr.config import ConfigError
from megatron_rlvr.evaluation_models import differences, find_model
from megatron_rlvr.evaluation_settings import Settings
from megatron_rlvr.rollout.engine import Request, Sample
from megatron_rlvr.run_folder import hold
from megatron_rlvr.seeds import stable_seed
from megatron_rlvr.verifiers import VerifierError
from megatron_rlvr.weights.convert_import import import_hf
from tests.integration.test_real_data import save_byte_tokenizer
from tests.models import reference
from tests.tiny import make_critic, make_folder

ANSWERS = ["1", "22", "3", "4"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = make_folder(tmp_path_factory.mktemp("model"), vocab_size=257, num_hidden_layers=1, eos_token_id=256)
    save_byte_tokenizer(folder)
    return folder


class FakeSampler:
    """Right or wrong by the request's seed; ``calls`` counts requests, and ``fail_after`` of them it dies."""

    calls: ClassVar[list[Request]] = []
    fail_after = 10**9

    def __init__(self, path: Path, max_length: int, **_) -> None:
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(path)

    def generate(self, requests: list[Request], ended=lambda count: None) -> list[Sample]:
        samples = []
        for request in requests:
            ended(1)
            if len(self.calls) >= self.fail_after:
                raise KeyboardInterrupt
            self.calls.append(request)
            draw = random.Random(request.seed)
            text = rf"so \boxed{{{draw.choice(ANSWERS)}}}" + "!" * draw.randrange(3)
            ids = self.tokenizer(text)["input_ids"]
            finish = draw.choice(["stop", "length"])
            ids = [*ids, 256] if finish == "stop" else ids
            samples.append(Sample(ids, [-draw.random() for _ in ids], finish))
        return samples

    def close(self) -> None:
        pass


# In this process: three workers that import sympy would take longer than all the rest.
VERIFIER = """
from megatron_rlvr.verdict import Verdict

ISOLATED = False


def read_answer(value):
    return str(value)


def verify(response, answer):
    given = response.partition("{")[2].partition("}")[0]
    return Verdict(float(given == answer), "ok", extracted=given)
"""


@pytest.fixture
def ready(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Two benchmarks of three problems each, the second of which must not be shown."""
    for name in ("one", "two"):
        rows = [{"problem": f"{name} {answer}?", "answer": answer} for answer in ANSWERS[:3]]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "equal.py").write_text(VERIFIER)
    table = {
        name: Benchmark(name, name, f"{name}.jsonl", "", verifier=str(tmp_path / "equal.py"), shown=name != "two")
        for name in ("one", "two", "repeated")
    }
    monkeypatch.setattr(benchmarks, "BENCHMARKS", table)
    monkeypatch.setattr(evaluation_sampling, "Sampler", FakeSampler)
    monkeypatch.setattr(FakeSampler, "calls", [])
    monkeypatch.setattr(FakeSampler, "fail_after", 10**9)
    return Settings(
        str(model), str(tmp_path / "out"), ["one", "two"], str(tmp_path), samples=4, template="raw", max_tokens=50
    )


def test_a_terminal_shows_a_bar(ready: Settings) -> None:
    shown = io.StringIO()
    evaluate.evaluate(ready, Console(file=shown, force_terminal=True, width=120))
    assert "24/24" in shown.getvalue() and "% right" in shown.getvalue() and "24 of 24" not in shown.getvalue()


def samples(settings: Settings) -> dict[str, list[str]]:
    return {path.name: sorted(path.read_text().splitlines()) for path in Path(settings.output, "samples").iterdir()}


def test_results_samples_and_what_is_not_shown(ready: Settings, capsys: pytest.CaptureFixture) -> None:
    results = evaluate.evaluate(ready, Console(width=200))
    written = json.loads(Path(ready.output, "results.json").read_text())
    assert written == json.loads(json.dumps(results))
    rows = {name: list(map(json.loads, lines)) for name, lines in samples(ready).items()}
    assert {name: len(of) for name, of in rows.items()} == {"one.jsonl": 12, "two.jsonl": 12}
    for name in ("one", "two"):
        by_problem: dict[str, list[float]] = {}
        for row in rows[f"{name}.jsonl"]:
            by_problem.setdefault(row["id"], []).append(row["reward"])
        average = sum(sum(of) / 4 for of in by_problem.values()) / 3
        assert 0 < average < 1  # else the test shows nothing
        figure = written["benchmarks"][name]["avg@4"]
        assert figure["value"] == pytest.approx(average) and figure["low"] < average < figure["high"]
        assert written["benchmarks"][name]["problems"] == 3
        truncated = sum(row["finish_reason"] == "length" for row in rows[f"{name}.jsonl"]) / 12
        assert written["benchmarks"][name]["truncated"] == pytest.approx(truncated)
    assert all("boxed" in row["text"] and not row["text"].endswith("<end>") for row in rows["one.jsonl"])
    for row in rows["one.jsonl"]:  # a token is a byte; the end token alone is no part of the text
        assert len(row["text"]) == row["tokens"] - (row["finish_reason"] == "stop")
    hidden = Path(ready.output, "samples/two.jsonl").read_text()
    assert "boxed" not in hidden and "two 1?" not in hidden
    shown = capsys.readouterr().out
    assert "24 of 24 responses" in shown and "avg@4" in shown and "maj@4" in shown and "pass@4" in shown


@pytest.mark.parametrize("batch", [1, 5, 1000])
def test_a_killed_evaluation_goes_on_and_ends_the_same_whatever_the_batch(ready: Settings, batch: int) -> None:
    whole = evaluate.evaluate(ready, Console(quiet=True))
    expected, results = samples(ready), Path(ready.output, "results.json").read_bytes()
    ready.output += "-again"
    ready.batch, FakeSampler.fail_after = batch, len(FakeSampler.calls) + 13
    with pytest.raises(KeyboardInterrupt):
        evaluate.evaluate(ready, Console(quiet=True))
    done = sum(map(len, samples(ready).values())) if Path(ready.output, "samples").exists() else 0
    assert done == 13 // batch * batch
    FakeSampler.fail_after, before = 10**9, len(FakeSampler.calls)
    assert evaluate.evaluate(ready, Console(quiet=True)) == whole
    assert len(FakeSampler.calls) - before == 24 - done
    assert samples(ready) == expected and Path(ready.output, "results.json").read_bytes() == results


def test_more_samples_are_added_to_those_there_and_fewer_read(ready: Settings) -> None:
    four = evaluate.evaluate(ready, Console(quiet=True))["benchmarks"]
    before = len(FakeSampler.calls)
    ready.samples = 6
    six = evaluate.evaluate(ready, Console(quiet=True))["benchmarks"]
    assert len(FakeSampler.calls) - before == 2 * 3 * 2 and "avg@6" in six["one"]
    ready.samples = 4
    assert evaluate.evaluate(ready, Console(quiet=True))["benchmarks"] == four


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("temperature", 1.0), ("top_p", 0.5), ("max_tokens", 49), ("template", "r1_zero"), ("seed", 1)),
        *(("dtype", "float32"), ("verifier", "choice")),
    ],
)
def test_samples_drawn_otherwise_are_not_added(ready: Settings, name: str, value: object) -> None:
    evaluate.evaluate(ready, Console(quiet=True))
    earlier, before = getattr(ready, name), len(FakeSampler.calls)
    setattr(ready, name, value)
    with pytest.raises(ConfigError, match=f"holds samples with {name}={earlier!r}, not {value!r}"):
        evaluate.evaluate(ready, Console(quiet=True))
    assert len(FakeSampler.calls) == before


def test_a_question_may_be_of_any_length(ready: Settings, tmp_path: Path) -> None:
    (tmp_path / "one.jsonl").write_text(json.dumps({"problem": "long " * 10_000, "answer": "1"}) + "\n")
    ready.benchmarks = ["one"]
    assert evaluate.evaluate(ready, Console(quiet=True))["benchmarks"]["one"]["problems"] == 1


def test_a_file_that_repeats_its_problems_is_not_multiplied_again(ready: Settings, tmp_path: Path) -> None:
    rows = [{"problem": f"{answer}?", "answer": answer} for answer in ANSWERS[:3]] * 32
    (tmp_path / "repeated.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ready.benchmarks, ready.samples = ["repeated"], 32
    found = evaluate.evaluate(ready, Console(quiet=True))["benchmarks"]["repeated"]
    assert found["problems"] == 3 and "avg@32" in found and len(FakeSampler.calls) == 96
    assert len({request.seed for request in FakeSampler.calls}) == 96


def test_an_export_that_a_killed_evaluation_left_is_not_taken_for_another_models(
    ready: Settings, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing had been sampled, so that the folder takes any model: the weights must be the new one's."""
    other = make_folder(tmp_path / "other", seed=1, vocab_size=257, num_hidden_layers=1, eos_token_id=256)
    save_byte_tokenizer(other)
    sampled_from: list[Path] = []

    class Killed(FakeSampler):
        def __init__(self, path: Path, max_length: int, **rest) -> None:
            sampled_from.append(path)
            raise KeyboardInterrupt

    monkeypatch.setattr(evaluation_sampling, "Sampler", Killed)
    for number, folder in enumerate((model, other, other)):
        if number < 2:
            import_hf(folder, tmp_path / f"step_{number}/policy", 1, 1)
        ready.model = str(tmp_path / f"step_{min(number, 1)}")
        with pytest.raises(KeyboardInterrupt):
            evaluate.evaluate(ready, Console(quiet=True))
        held = load_file(sampled_from[-1] / "model.safetensors")
        assert all(torch.equal(held[name], tensor) for name, tensor in load_file(folder / "model.safetensors").items())
    assert sampled_from[0] != sampled_from[1] == sampled_from[2]


def test_a_critics_heads_on_each_benchmark(ready: Settings, model: Path, tmp_path: Path) -> None:
    """Against transformers' hidden states and the head by hand; from a Hugging Face folder, and a Megatron one."""
    critic = make_critic(model, tmp_path / "critic")
    import_hf(critic, tmp_path / "step_7/critic", 1, 1)
    import_hf(model, tmp_path / "step_7/policy", 1, 1)
    ready.critic = str(critic)
    results = evaluate.evaluate(ready, Console(quiet=True))["benchmarks"]
    calls, expected = list(FakeSampler.calls), {}
    for request, sample in zip(calls, FakeSampler(model, 0).generate(calls), strict=True):
        expected[request.seed] = spread_by_hand(critic, request.prompt_token_ids, sample.response_ids)
    for name in ("one", "two"):
        rows = [json.loads(line) for line in samples(ready)[f"{name}.jsonl"]]
        for row in rows:
            spreads = expected[stable_seed(ready.seed, "evaluation", row["id"], row["sample"])]
            assert row["head_std"] == pytest.approx(spreads.mean().item(), rel=1e-4)
        tokens = torch.cat([expected[stable_seed(ready.seed, "evaluation", row["id"], row["sample"])] for row in rows])
        assert results[name]["head_std"] == pytest.approx(tokens.mean().item(), rel=1e-4)
    assert results["one"]["head_std"] != results["two"]["head_std"]

    ready.model = ready.critic = str(tmp_path / "step_7")
    with pytest.raises(ConfigError, match="holds samples with"):
        evaluate.evaluate(ready, Console(quiet=True))
    ready.output += "-megatron"
    again = evaluate.evaluate(ready, Console(quiet=True))["benchmarks"]
    assert again == results and len(list(Path(ready.output).glob("model-*/config.json"))) == 1
    make_critic(make_folder(tmp_path / "other", vocab_size=97), tmp_path / "others_critic")
    ready.critic = str(tmp_path / "others_critic")
    with pytest.raises(ConfigError, match="has 97 tokens, the model 257"):
        evaluate.evaluate(ready, Console(quiet=True))
    ready.critic = str(model)
    with pytest.raises(ConfigError, match="is no critic: name a checkpoint of a PPO run"):
        evaluate.evaluate(ready, Console(quiet=True))
    ready.model, ready.critic = str(tmp_path / "critic"), ""
    with pytest.raises(ConfigError, match="critic holds a critic, which says nothing: name its run's policy"):
        evaluate.evaluate(ready, Console(quiet=True))


@pytest.mark.parametrize("megatron", [False, True])
def test_weights_that_were_replaced_under_the_same_name_are_another_model(
    ready: Settings, tmp_path: Path, megatron: bool
) -> None:
    copy = Path(shutil.copytree(ready.model, tmp_path / "copy"))
    if megatron:
        import_hf(copy, tmp_path / "step_7/policy", 1, 1)
        copy = tmp_path / "step_7/policy"
    ready.model = str(copy)
    evaluate.evaluate(ready, Console(quiet=True))
    weights = next(copy.glob("*.distcp" if megatron else "*.safetensors"))
    os.utime(weights, (0, 0))  # written at another time, if of the same size
    with pytest.raises(ConfigError, match="holds samples with model="):
        evaluate.evaluate(ready, Console(quiet=True))


def test_end_tokens_and_token_ids_are_the_models(ready: Settings, tmp_path: Path) -> None:
    ready.model = str(shutil.copytree(ready.model, tmp_path / "copy"))
    evaluate.evaluate(ready, Console(quiet=True))
    (tmp_path / "copy/generation_config.json").write_text('{"eos_token_id": 3}')
    with pytest.raises(ConfigError, match="holds samples with end_tokens="):
        evaluate.evaluate(ready, Console(quiet=True))
    config = json.loads((tmp_path / "copy/config.json").read_text())
    (tmp_path / "copy/config.json").write_text(json.dumps(config | {"vocab_size": 5}))
    with pytest.raises(ConfigError, match="prompt one/1 holds token .*, but the model has 5"):
        evaluate.evaluate(ready, Console(quiet=True))


def test_what_a_run_trained_with_and_its_evaluation_does_not_is_said(ready: Settings, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(ready.model, run / "hf")
    (run / "metrics.jsonl").write_text("")
    (run / "config.yaml").write_text("data: {template: r1_zero}\nrollout: {max_response_length: 50}\nexploration: {}\n")
    said = "note: the run trained with data.template=r1_zero, and this evaluation takes --template raw"
    for place in (run, run / "hf", run / "checkpoints/step_3/policy"):
        assert differences(replace(ready, model=str(place))) == [said]
    assert differences(ready) == []
    for others in ("", "[1]", "data: {path: x}\n"):  # no config of a run
        (run.parent / "config.yaml").write_text(others)
        (run.parent / "metrics.jsonl").write_text("")
        assert differences(replace(ready, model=str(run.parent / "other/hf"))) == []
    shown, ready.model = io.StringIO(), str(run)
    evaluate.evaluate(ready, Console(file=shown, width=200))
    assert said in shown.getvalue()


def spread_by_hand(critic: Path, prompt_ids: list[int], response_ids: list[int]) -> torch.Tensor:
    """[Lr] standard deviation over the heads at each token of the response, in fp64."""
    head = load_file(critic / "value_head.safetensors")
    tokens = torch.tensor([[*prompt_ids, *response_ids]])
    with torch.no_grad():
        hidden = reference.load(critic).model(tokens).last_hidden_state[0, len(prompt_ids) - 1 : -1]
    values = hidden @ head["weight"].double().T + head["bias"].double()
    return ((values - values.mean(1, keepdim=True)) ** 2).mean(1).sqrt()


def test_which_folder_stands_for_a_model(model: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    with pytest.raises(ConfigError, match="is a run without hf/.*name one of its checkpoints"):
        find_model(str(run))
    (run / "hf").symlink_to(model)
    assert find_model(str(run)) == run / "hf" and find_model(str(model)) == model
    with pytest.raises(ConfigError, match="is no Hugging Face folder"):
        find_model(str(tmp_path))


def test_a_run_that_went_on_after_its_end_is_asked_which_model_is_meant(model: Path, tmp_path: Path) -> None:
    for step in (90, 100):
        (tmp_path / f"checkpoints/step_{step}").mkdir(parents=True)
    (tmp_path / "summary.json").write_text('{"steps": 100, "eval/pass@1": 0.5}')
    (tmp_path / "hf").symlink_to(model)
    assert find_model(str(tmp_path)) == tmp_path / "hf"
    (tmp_path / "checkpoints/step_150").mkdir()
    with pytest.raises(ConfigError, match="hf is the model of step 100, .*name .*/hf .*or .*checkpoints/step_150"):
        find_model(str(tmp_path))
    assert find_model(str(tmp_path / "hf")) == tmp_path / "hf"


def test_a_file_of_ones_own_is_judged_by_the_verifier_that_is_named(ready: Settings, tmp_path: Path) -> None:
    ready.benchmarks, ready.verifier = [str(tmp_path / "one.jsonl")], str(tmp_path / "equal.py")
    own = evaluate.evaluate(ready, Console(quiet=True))["benchmarks"]["one"]
    ready.benchmarks, ready.output = ["one"], ready.output + "-named"
    assert evaluate.evaluate(ready, Console(quiet=True))["benchmarks"]["one"] | {"title": "one.jsonl"} == own


def test_a_title_is_shown_as_it_is(ready: Settings, tmp_path: Path) -> None:
    """A file's name is no markup: [bold] in it neither vanishes nor sets the rest in bold."""
    named = tmp_path / "one[bold].jsonl"
    named.write_bytes((tmp_path / "one.jsonl").read_bytes())
    ready.benchmarks, ready.verifier = [str(named)], str(tmp_path / "equal.py")
    shown = io.StringIO()
    evaluate.evaluate(ready, Console(file=shown, width=300))
    assert " one[bold].jsonl " in shown.getvalue()


def test_a_sum_is_as_right_as_its_first_verifier(ready: Settings, tmp_path: Path) -> None:
    """Every response is well formed: the sum rewards each with 1 or 2."""
    (tmp_path / "formed.py").write_text(VERIFIER.replace("float(given == answer)", "1.0"))
    ready.benchmarks, ready.verifier = [str(tmp_path / "one.jsonl")], str(tmp_path / "equal.py")
    alone = evaluate.evaluate(ready, Console(quiet=True))["benchmarks"]["one"]
    ready.verifier, ready.output = f"1.0*{ready.verifier} + 1.0*{tmp_path / 'formed.py'}", ready.output + "-sum"
    assert 0 < alone["avg@4"]["value"] < 1
    assert evaluate.evaluate(ready, Console(quiet=True))["benchmarks"]["one"] == alone
    rows = [json.loads(line) for line in samples(ready)["one.jsonl"]]
    assert all(row["right"] is (row["reward"] == 2.0) for row in rows) and {row["reward"] for row in rows} == {1.0, 2.0}


REFUSAL = """
    if given != answer:
        raise RuntimeError("cannot read " + given)
    return"""
FAILING = VERIFIER.replace("\n    return Verdict", f"{REFUSAL} Verdict")


def test_a_verifier_that_fails_on_wrong_answers_does_not_flatter(
    ready: Settings, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "failing.py").write_text(FAILING)
    ready.benchmarks, ready.verifier = [str(tmp_path / "one.jsonl")], str(tmp_path / "failing.py")
    ready.batch = 4
    says = r"of 4 responses .*--max-error-share=0.1.*RuntimeError: cannot read \d.*room with --deadline"
    for _ in range(2):  # the responses are asked again, so that a mended verifier judges them
        with pytest.raises(VerifierError, match=says):
            evaluate.evaluate(ready, Console(quiet=True))
        assert not Path(ready.output, "samples/one.jsonl").exists()
        (tmp_path / "failing.py").write_text(FAILING + "# not mended yet\n")
    ready.max_error_share = 1.0
    capsys.readouterr()
    found = evaluate.evaluate(ready, Console(width=200))["benchmarks"]["one"]
    shown = capsys.readouterr().out
    assert 0.5 < found["unjudged"] < 1 and f"{found['unjudged']:.3g}" in shown and "unjudged" in shown
    assert "nan" not in shown and "NaN" not in Path(ready.output, "results.json").read_text()
    assert "unjudged" not in tell(ready, tmp_path / "equal.py", capsys)


def test_an_answer_that_is_no_text_is_told_at_once(ready: Settings, tmp_path: Path) -> None:
    """And not by the figures, when everything has been sampled."""
    (tmp_path / "number.py").write_text(VERIFIER.replace("extracted=given", "extracted=5"))
    ready.benchmarks, ready.verifier = [str(tmp_path / "one.jsonl")], str(tmp_path / "number.py")
    with pytest.raises(VerifierError, match="verify returned extracted=5, which must be text or None"):
        evaluate.evaluate(ready, Console(quiet=True))


def tell(settings: Settings, verifier: Path, capsys: pytest.CaptureFixture) -> str:
    """What an evaluation with another verifier prints."""
    settings.verifier, settings.output = str(verifier), settings.output + "-other"
    evaluate.evaluate(settings, Console(width=200))
    return capsys.readouterr().out


def test_a_benchmark_of_which_nothing_was_judged_has_no_figures(
    ready: Settings, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "failing.py").write_text(FAILING.replace("given != answer", "True"))
    ready.benchmarks, ready.verifier, ready.max_error_share = ["one", str(tmp_path / "own.jsonl")], "", 1.0
    (tmp_path / "one.jsonl").rename(tmp_path / "own.jsonl")
    (tmp_path / "one.jsonl").write_text((tmp_path / "own.jsonl").read_text())
    shown = tell(ready, tmp_path / "failing.py", capsys)
    own = json.loads(Path(ready.output, "results.json").read_text())["benchmarks"]["own"]
    assert own["avg@4"] == {"value": None, "low": None, "high": None} and own["unjudged"] == 1
    assert "nan" not in shown and next(line for line in shown.splitlines() if "mean" in line).count(" - ") == 3


def test_the_share_of_failures_is_that_of_all_so_far(ready: Settings, tmp_path: Path) -> None:
    """A single response that no verifier can judge, alone in its batch, is no reason to stop."""
    fails = tmp_path / "fails"
    (tmp_path / "equal.py").write_text(
        FAILING.replace("given != answer", f"__import__('pathlib').Path({str(fails)!r}).exists()")
    )
    evaluate.evaluate(ready, Console(quiet=True))
    fails.touch()
    ready.batch, path = 1, Path(ready.output, "samples/one.jsonl")
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    found = evaluate.evaluate(ready, Console(quiet=True))["benchmarks"]["one"]
    assert found["unjudged"] == pytest.approx(1 / 12)


def test_a_file_of_ones_own_has_fields_of_its_own(ready: Settings, tmp_path: Path) -> None:
    lines = (tmp_path / "one.jsonl").read_text().replace('"problem"', '"task"').replace('"answer"', '"gold"')
    (tmp_path / "own.jsonl").write_text(lines)
    ready.benchmarks, ready.verifier = ["two", str(tmp_path / "own.jsonl")], str(tmp_path / "equal.py")
    with pytest.raises(ConfigError, match="own.jsonl has no field .*: set --prompt-field"):
        evaluate.evaluate(ready, Console(quiet=True))
    ready.prompt_field, ready.answer_field = "task", "gold"
    assert evaluate.evaluate(ready, Console(quiet=True))["benchmarks"]["own"]["problems"] == 3


def test_one_evaluation_at_a_time_writes_into_a_folder(ready: Settings) -> None:
    with hold(Path(ready.output)):
        with pytest.raises(
            ConfigError, match="another evaluation is going on in .*: wait for its end, or set another --output"
        ):
            evaluate.evaluate(ready, Console(quiet=True))
        assert not FakeSampler.calls and not Path(ready.output, "settings.json").exists()
    evaluate.evaluate(ready, Console(quiet=True))
    hold(Path(ready.output)).close()  # the lock is gone with the evaluation


def test_a_file_that_has_changed_is_not_taken_for_the_one_that_was_sampled(ready: Settings, tmp_path: Path) -> None:
    evaluate.evaluate(ready, Console(quiet=True))
    file = tmp_path / "one.jsonl"
    file.write_text(file.read_text().replace(json.dumps(ANSWERS[0]), json.dumps("another"), 1))
    with pytest.raises(ConfigError, match="other problems by the name of one, whose file, answers or verifier"):
        evaluate.evaluate(ready, Console(quiet=True))
    ready.output += "-again"
    evaluate.evaluate(ready, Console(quiet=True))


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"samples": 0}, "--samples must be at least 1, not 0"),
        ({"temperature": 3.0}, r"--temperature must be in \[0, 2\], not 3.0"),
        ({"top_p": 0.0}, r"--top-p must be in \(0, 1\]"),
        ({"template": "qwen"}, "template must be one of 'chat', 'boxed'"),
        ({"dtype": "fp8"}, "--dtype must be auto, float32 or bfloat16"),
        ({"deadline": 0.0}, "--deadline must be above 0"),
        ({"max_error_share": 1.5}, r"--max-error-share must be in \[0, 1\], not 1.5"),
        ({"gpu_memory": 0.0}, r"--gpu-memory must be in \(0, 1\]"),
        ({"critic": "nowhere"}, "critic='nowhere' is no critic"),
        ({"benchmarks": ["three"]}, "unknown benchmark 'three'"),
        ({"benchmarks": ["one", "two", "one"]}, "two benchmarks are called one"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_written(ready: Settings, changed: dict, says: str) -> None:
    for name, value in changed.items():
        setattr(ready, name, value)
    with pytest.raises(ConfigError, match=says):
        evaluate.evaluate(ready, Console(quiet=True))
    assert not Path(ready.output).exists() and not FakeSampler.calls
