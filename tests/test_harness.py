"""lm-evaluation-harness over the engine: its scores equal those of transformers on the same weights."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import moespac
from moespac.cli import app
from moespac.engine.build import DEMO

QUESTIONS = [
    {"question": "The sea was", "choices": [" calm", " a cold and stormy", " four"], "answer": 1},
    {"question": "Once upon a", "choices": [" time", " four", " it"], "answer": 0},
    {"question": "", "choices": ["The", "It was a dark night"], "answer": 1},
]
CHOICE = """
task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
ROLLING = """
task: local_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "It was a dark and stormy night, and the ship lay far from the shore. {{{{question}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: byte_perplexity}}]
"""
ANSWERS = """
task: local_answers
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
output_type: generate_until
doc_to_text: "It was {{{{question}}}}"
doc_to_target: answer
generation_kwargs: {{until: ["."], max_gen_toks: 12}}
metric_list: [{{metric: exact_match}}]
"""
TASKS = ("local_choice", "local_rolling", "local_answers")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (the extra `eval`)")
    directory = tmp_path_factory.mktemp("tasks")
    data = directory / "questions.json"
    data.write_text("\n".join(map(json.dumps, QUESTIONS)))
    for name, text in zip(TASKS, (CHOICE, ROLLING, ANSWERS), strict=True):
        (directory / f"{name}.yaml").write_text(text.format(data=data))
    return directory


def test_scores_and_answers_equal_those_of_transformers(tasks: Path) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from moespac.harness import EngineLM

    def requests(kind: str, arguments: list[tuple]) -> list[Instance]:
        return [Instance(kind, {}, each, i, ("t", i, 1)) for i, each in enumerate(arguments)]

    pairs = [(q["question"], choice) for q in QUESTIONS for choice in q["choices"]]
    texts = [("It was a dark and stormy night, and the ship lay far from the shore. " * 3,)]
    prompts = [
        ("It was a dark", {"until": ["."], "max_gen_toks": 24}),
        ("The sea", {"until": "the", "max_gen_toks": 8}),
    ]
    model = AutoModelForCausalLM.from_pretrained(DEMO / "target", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "target")
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, device="cpu")
    with moespac.load(host_memory="25%", profile=None) as engine:
        ours = EngineLM(engine)
        for kind, arguments in (("loglikelihood", pairs), ("loglikelihood_rolling", texts)):
            expected = getattr(theirs, kind)(requests(kind, arguments))
            found = getattr(ours, kind)(requests(kind, arguments))
            for a, b in zip(found, expected, strict=True):
                assert a == pytest.approx(b, abs=2e-4)
        assert ours.generate_until(requests("generate_until", prompts)) == theirs.generate_until(
            requests("generate_until", prompts)
        )


def test_the_command_runs_tasks_of_ones_own(tasks: Path, tmp_path: Path) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    file = tmp_path / "scores.json"
    result = CliRunner().invoke(
        app,
        [
            "eval",
            "--tasks",
            ",".join(TASKS),
            "--task-directory",
            str(tasks),
            "--host-memory",
            "25%",
            "--json",
            str(file),
        ],
    )
    assert result.exit_code == 0, result.output
    found = json.loads(file.read_text())
    model = AutoModelForCausalLM.from_pretrained(DEMO / "target", dtype=torch.float32)
    theirs = HFLM(
        pretrained=model, tokenizer=AutoTokenizer.from_pretrained(DEMO / "target"), batch_size=1, device="cpu"
    )
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    expected = simple_evaluate(theirs, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0)
    assert expected is not None
    compared = 0
    for task in TASKS:
        for metric, value in expected["results"][task].items():
            if isinstance(value, float):
                assert found[task][metric] == pytest.approx(value, rel=1e-4), (task, metric)
                compared += 1
    assert compared >= 5
    unknown = CliRunner().invoke(app, ["eval", "--tasks", "no_such_task"])
    assert unknown.exit_code == 2 and "there is no such task" in unknown.output


def test_without_the_harness_it_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "moespac.harness", raising=False)
    result = CliRunner().invoke(app, ["eval", "--tasks", "arc_easy"])
    assert result.exit_code == 2 and "pip install 'moespac[eval]'" in result.output
    for words in ([], ["--text", "a", "--tasks", "b"], ["--tasks", ","]):
        assert CliRunner().invoke(app, ["eval", *words]).exit_code == 2
