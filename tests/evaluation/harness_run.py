"""Runs lm-evaluation-harness with its HF backend on local questions; a program of its own, for its memory.

``python harness_run.py CHECKPOINT TEST VALIDATION LIMIT SHOTS OUT``: the questions have the hub's shape, as
JSON lines. Its own ``arc_challenge`` task is used, with the data replaced and the examples fixed. OUT gets
``{id: [log-likelihood of each choice]}``.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

TASK = """\
include: {base}
task: arc_local
dataset_path: json
dataset_name: null
training_split: null
fewshot_split: validation
fewshot_config:
  sampler: first_n
dataset_kwargs:
  data_files:
    test: {test}
    validation: {validation}
"""


def main(checkpoint: str, test: str, validation: str, limit: str, shots: str, out: str) -> None:
    import lm_eval
    from lm_eval.tasks import TaskManager

    base = Path(lm_eval.__file__).parent / "tasks" / "arc" / "arc_challenge.yaml"
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "arc_local.yaml").write_text(TASK.format(base=base, test=test, validation=validation))
        results = lm_eval.simple_evaluate(
            model="hf",
            model_args=f"pretrained={checkpoint},dtype=float32",
            tasks=["arc_local"],
            task_manager=TaskManager(include_path=folder),
            limit=int(limit),
            num_fewshot=int(shots),
            batch_size=8,
            device="cpu",
            log_samples=True,
            bootstrap_iters=0,
        )
    samples = results["samples"]["arc_local"]
    scores = {s["doc"]["id"]: [pair[0] for pair in s["filtered_resps"]] for s in samples}
    metrics = {name: results["results"]["arc_local"][f"{name},none"] for name in ("acc", "acc_norm")}
    Path(out).write_text(json.dumps({"scores": scores, "metrics": metrics}))


if __name__ == "__main__":
    main(*sys.argv[1:])
