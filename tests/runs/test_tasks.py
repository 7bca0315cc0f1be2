"""Tasks: reading, labels, encoding, padding, metrics, bad inputs. Run: pytest tests/runs/test_tasks.py"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import datasets
import pytest

from moa.errors import ConfigError
from moa.runs.collate import Collator
from moa.runs.encode import IGNORED, encode_tasks
from moa.runs.tasks import Task
from tests.tiny_run import VOCAB, rows, tokenizer, write_jsonl


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "data.jsonl", rows(20, 0))


def encode(task: Task, max_length: int = 16, name: str = "film") -> Any:
    return encode_tasks({name: task}, tokenizer(), max_length)[0]


def words(ids: list[int]) -> str:
    return " ".join(VOCAB[i] for i in ids)


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_file_formats_give_the_same_rows(tmp_path: Path, file: Path, ending: str) -> None:
    data = datasets.Dataset.from_list(rows(20, 0))
    path = tmp_path / f"other.{ending}"
    if ending == "jsonl":
        data.to_json(path)
    else:
        getattr(data, f"to_{ending}")(path)
    first, other = encode(Task(train=str(file))), encode(Task(train=str(path)))
    assert first.train[:] == other.train[:]
    assert first.eval[:] == other.eval[:]
    assert words(first.train[0]["input_ids"]) in {row["text"] for row in rows(20, 0)}


def test_format_overrides_the_ending(tmp_path: Path) -> None:
    path = tmp_path / "data.txt"
    write_jsonl(path, rows(10, 0))
    assert len(encode(Task(train=str(path), format="jsonl")).train) == 8
    with pytest.raises(ConfigError, match=r"data.txt does not end in one of .*set format"):
        encode(Task(train=str(path)))


def test_several_files_are_one_task(file: Path) -> None:
    assert len(encode(Task(train=[str(file), str(file)])).train) == 32


def test_labels_are_inferred_sorted_and_numbers_in_their_order(tmp_path: Path, file: Path) -> None:
    assert encode(Task(train=str(file))).labels == ["negative", "positive"]
    values = [{"text": "it", "label": label} for label in (10, 2, 1) * 4]
    numbers = write_jsonl(tmp_path / "numbers.jsonl", values)
    encoded = encode(Task(train=str(numbers), eval=str(numbers)))
    assert encoded.labels == ["1", "2", "10"]
    assert encoded.train["labels"] == [2, 1, 0] * 4


def test_given_labels_keep_their_order(file: Path) -> None:
    encoded = encode(Task(train=str(file), eval=str(file), labels=["positive", "negative", "neutral"]))
    assert encoded.labels == ["positive", "negative", "neutral"]
    assert encoded.train["labels"] == [0, 1] * 10


def test_class_columns_keep_their_names(tmp_path: Path) -> None:
    names = datasets.ClassLabel(names=["no", "yes"])
    data = datasets.Dataset.from_dict(
        {"text": ["it", "was"] * 4, "label": [1, 0] * 4},
        features=datasets.Features({"text": datasets.Value("string"), "label": names}),
    )
    data.to_parquet(tmp_path / "classes.parquet")
    encoded = encode(Task(train=str(tmp_path / "classes.parquet"), eval=str(tmp_path / "classes.parquet")))
    assert encoded.labels == ["no", "yes"]
    assert encoded.train["labels"] == [1, 0] * 4


def test_pairs_are_encoded_together(tmp_path: Path) -> None:
    values = [{"a": "it was", "b": "so fine", "label": i % 2} for i in range(6)]
    path = write_jsonl(tmp_path / "pairs.jsonl", values)
    encoded = encode(Task(train=str(path), text="a", pair="b"))
    assert words(encoded.train[0]["input_ids"]) == "it was so fine"


def test_row_limits_draw_by_seed(file: Path) -> None:
    task = Task(train=str(file), eval=str(file), max_train_rows=5, max_eval_rows=3)
    one, same = encode(task), encode(task)
    other = encode_tasks({"film": task}, tokenizer(), 16, seed=1)[0]
    assert (len(one.train), len(one.eval)) == (5, 3)
    assert one.train[:] == same.train[:]
    assert one.train[:] != other.train[:]


def test_held_out_rows_are_not_trained_on(tmp_path: Path) -> None:
    values = [{"text": " ".join([WORD] * (i + 1)), "label": i % 2} for i, WORD in enumerate(["it"] * 10)]
    encoded = encode(Task(train=str(write_jsonl(tmp_path / "d.jsonl", values)), eval_fraction=0.3))
    assert len(encoded.eval) == 3
    lengths = [len(ids) for part in (encoded.train, encoded.eval) for ids in part["input_ids"]]
    assert sorted(lengths) == list(range(1, 11))


def test_task_ids_follow_the_order(file: Path) -> None:
    task = Task(train=str(file))
    encoded = encode_tasks({"b": task, "a": task}, tokenizer(), 16)
    assert [set(one.train["task_ids"]) for one in encoded] == [{0}, {1}]


def test_generation_masks_the_prompt_and_learns_the_end(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "g.jsonl", [{"q": "it was fine", "a": "positive"}] * 4)
    task = Task(kind="generation", train=str(path), prompt="q", answer="a", template="review {prompt} label:")
    row = encode(task).train[0]
    assert words(row["input_ids"]) == "review it was fine label: positive [EOS]"
    assert row["labels"] == [IGNORED] * 5 + row["input_ids"][5:]
    assert encode(task).prompts[0] == ("review it was fine label:", "positive")


def test_long_prompts_lose_their_beginning_and_answers_stay_whole(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "g.jsonl", [{"prompt": "it was so very fine", "answer": "positive"}] * 4)
    task = Task(kind="generation", train=str(path))
    assert words(encode(task, max_length=4).train[0]["input_ids"]) == "very fine positive [EOS]"
    with pytest.raises(
        ConfigError, match=r"answers of 3 of 3 rows.*max_length=2; the answer of row . of g.jsonl takes 2 tokens"
    ):
        encode(task, max_length=2)


def test_collator_pads_on_the_right() -> None:
    batch = Collator(tokenizer())(
        [
            {"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1], "labels": [IGNORED, 6, 7], "task_ids": 0},
            {"input_ids": [5], "attention_mask": [1], "labels": [5], "task_ids": 1},
        ]
    )
    assert batch["input_ids"].tolist() == [[5, 6, 7], [5, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7], [5, IGNORED, IGNORED]]
    assert batch["task_ids"].tolist() == [0, 1]


# -------------------------------------------------------------------- bad inputs


def test_missing_columns_are_named_with_those_that_exist(file: Path) -> None:
    with pytest.raises(ConfigError, match=r"'film', training rows: no column 'body'; there are 'text', 'label'"):
        encode(Task(train=str(file), text="body"))


@pytest.mark.parametrize("name", ["empty.jsonl", "header.csv"])
def test_no_rows(tmp_path: Path, file: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text("" if name.endswith("jsonl") else "text,label\n")
    with pytest.raises(ConfigError, match=r"no rows"):
        encode(Task(train=str(path), eval=str(file)))


def test_too_few_rows_to_hold_out(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "one.jsonl", rows(1, 0))
    with pytest.raises(ConfigError, match=r"too few to hold any out"):
        encode(Task(train=str(path)))


def test_labels_that_training_has_not_seen(tmp_path: Path, file: Path) -> None:
    other = write_jsonl(tmp_path / "other.jsonl", [{"text": "it", "label": "neutral"}])
    with pytest.raises(ConfigError, match=r"holds 'neutral', which training has not seen: .*negative, positive"):
        encode(Task(train=str(file), eval=str(other)))


def test_one_label_is_no_classification(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "same.jsonl", [{"text": "it", "label": "a"}] * 4)
    with pytest.raises(ConfigError, match=r"needs at least 2 labels, column .label. has"):
        encode(Task(train=str(path)))


def test_missing_values_are_named_by_row(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "gap.jsonl", [*rows(3, 0), {"text": None, "label": "positive"}])
    with pytest.raises(ConfigError, match=r"row 4 of gap.jsonl has no value in column 'text'"):
        encode(Task(train=str(path), eval=str(path)))


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no file .*nothing.jsonl"):
        encode(Task(train=str(tmp_path / "nothing.jsonl")))


def test_a_file_that_is_not_what_it_says(tmp_path: Path) -> None:
    path = tmp_path / "broken.jsonl"
    path.write_text('{"text": "it", "label": \n')
    with pytest.raises(ConfigError, match=r"broken.jsonl cannot be read as jsonl"):
        encode(Task(train=str(path)))


def test_unreachable_hub_data_set() -> None:
    with pytest.raises(ConfigError, match=r"the hub does not give 'someone/nothing'"):
        encode(Task(train="someone/nothing", format="hub"))
    with pytest.raises(ConfigError, match=r"the hub does not give 'someone/nothing'"):
        encode(Task(train="someone/nothing", subset="part"))
    with pytest.raises(ConfigError, match=r"one data set of the hub, got 2: a, b"):
        encode(Task(train=["a", "b"], format="hub"))


@pytest.mark.parametrize("name", ["rows", "data/rows", "data/more/rows", "./rows", "rows.txt"])
def test_a_file_that_is_not_there_is_not_looked_for_elsewhere(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub is asked where a task says that it means the hub."""
    import datasets

    def asked(*args: object, **kwargs: object) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(datasets, "load_dataset", asked)
    with pytest.raises(
        ConfigError, match=rf"no file {re.escape(name)} .looked from .*for a data set of the hub set form"
    ):
        encode(Task(train=name))


def test_unknown_kind_and_format() -> None:
    with pytest.raises(ConfigError, match=r"unknown kind 'classify'.*Did you mean 'classification'"):
        Task(train="a.csv", kind="classify")
    with pytest.raises(ConfigError, match=r"unknown format 'jsnl'.*Did you mean 'jsonl'"):
        Task(train="a.csv", format="jsnl")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eval_fraction": 1.0}, "eval_fraction"),
        ({"max_train_rows": 0}, "max_train_rows"),
        ({"template": "{prompt}!"}, "template is read by kind generation, and this task's kind is classification"),
        ({"kind": "chat", "labels": ("a", "b")}, "labels is read by kind classification"),
        ({"kind": "generation", "template": "no place"}, "no {prompt} in it"),
        ({"kind": "generation", "answer_template": "no place"}, "no {answer} in it"),
    ],
)
def test_values_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Task(train="a.csv", **options)


def test_no_tasks_and_mixed_kinds(file: Path) -> None:
    with pytest.raises(ConfigError, match="no tasks"):
        encode_tasks({}, tokenizer(), 16)
    tasks = {"a": Task(train=str(file)), "b": Task(train=str(file), kind="generation", prompt="text", answer="label")}
    with pytest.raises(ConfigError, match=r"share one model.*got a: classification, b: generation"):
        encode_tasks(tasks, tokenizer(), 16)
