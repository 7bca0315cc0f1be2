"""`moa init`: an example file to start from."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..runs.processes import say
from .shared_options import Command

HEAD = "# {title}\n# Every key: moa train --help. Every keyword of a recipe: moa recipes NAME. Try it: {command}\n"
TRAINING = """
training:                        # keywords of transformers.TrainingArguments
  num_train_epochs: 3
  per_device_train_batch_size: 8
  learning_rate: 1e-3
  eval_strategy: epoch           # evaluate while training, and keep the best model:
  save_strategy: epoch
  load_best_model_at_end: true

# score_before: false            # do not score the evaluation rows before training
# patience: 3                    # stop after so many evaluations without a lower loss
# compare: {}                    # train a LoRA of the same size beside it
"""
RECIPE = """
recipe:
  router: topk                   # moa recipes lists them
  n_experts: 8
  k: 2
  rank: 8
"""
CLASSIFICATION = (
    """base: sentence-transformers/all-MiniLM-L6-v2
output: runs/first
max_length: 128
long_rows: truncate              # or skip, refuse: how many rows that were is said

tasks:
  reviews:                       # a name of your own; its order among the tasks is its task id
    train: reviews.csv           # .jsonl, .json, .csv, .tsv, .parquet, a pattern, a list; or a hub id with format: hub
    text: text                   # the columns' names
    label: label
    # problem: regression        # numbers, not classes; labels with fractions are one by themselves
    eval_fraction: 0.2           # or eval: a file of its own
"""
    + RECIPE
    + TRAINING
)
GENERATION = (
    """base: HuggingFaceTB/SmolLM2-135M-Instruct
output: runs/first
max_length: 512

tasks:
  questions:
    kind: generation
    train: questions.jsonl
    prompt: question
    answer: answer
    template: "Question: {prompt}\\nAnswer:"
    answer_template: " {answer}"
"""
    + RECIPE
    + TRAINING
    + """
generate:
  rows: 2
  max_new_tokens: 32
"""
)
CHAT = (
    """base: HuggingFaceTB/SmolLM2-135M-Instruct
output: runs/first
max_length: 2048
# packing: true                  # several chats in one sequence, none of which sees another

tasks:
  chats:
    kind: chat                   # the tokenizer's own template; only the assistant's turns are learned
    train: chats.jsonl           # {"messages": [{"role": "user", "content": "…"}, …]}, or ShareGPT's from and value
    messages: messages
    system: You are a helpful assistant.
"""
    + RECIPE
    + TRAINING
    + """
generate:
  rows: 2
  max_new_tokens: 64
"""
)
MERGE = """adapters:
  - path: first/expert_0          # PEFT LoRA folders: moa export writes them
    weight: 0.5
  - path: second/expert_0
    weight: 0.5
method: ties                      # moa merge --help lists them
options:
  density: 0.5
rank: 16                          # of the merged adapter; or base: a folder, to write a whole checkpoint
out: merged
"""
EXAMPLES = {
    "classification": ("A classifier: one encoder, a head per task, a mixture of adapters.", CLASSIFICATION, "train"),
    "generation": ("Prompts and answers on a causal language model.", GENERATION, "train"),
    "chat": ("Chats on a causal language model with a chat template.", CHAT, "train"),
    "merge": ("Several adapters into one.", MERGE, "merge"),
}


def add(command: Command) -> None:
    """Add the command to a parser."""
    init = command("init", _init, "write an example configuration to start from")
    init.add_argument("kind", nargs="?", default="classification", help=f"{', '.join(EXAMPLES)} (classification)")
    init.add_argument("--out", help="file to write (KIND.yaml)")


def _init(arguments: argparse.Namespace) -> None:
    """Write an example configuration, every line of it said; an existing file is never replaced."""
    from ..errors import ConfigError, unknown_name

    if arguments.kind not in EXAMPLES:
        raise ConfigError(unknown_name("example", arguments.kind, EXAMPLES, "moa init"))
    title, text, verb = EXAMPLES[arguments.kind]
    file = Path(arguments.out or f"{arguments.kind}.yaml")
    command = f"moa {verb} {file} --dry-run"
    try:
        with open(file, "x", encoding="utf-8") as handle:
            handle.write(HEAD.format(title=title, command=command) + text)
    except FileExistsError:
        raise ConfigError(f"{file} exists already: choose another name with --out.") from None
    except OSError as error:
        raise ConfigError(f"{file} cannot be written: {error.strerror}.") from error
    say(f"{file}. Next: put in your base and files, then", f"  {command}")
