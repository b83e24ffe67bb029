"""Converts one model on many machines, with Dask: every task makes one shard, on its own.

What the tasks share is a folder: the checkpoint, the output and ``GGUF_SPLITQUANT_CACHE``, where calibration
is kept. The plan is made once, here; a task that is lost with its worker is given to another one, which goes
on after the last tensor that is complete. The shards are those that one machine makes, to the byte.

On this machine::

    python scripts/convert_cluster.py MODEL OUT.gguf --shards 8 --workers 4 -- --target-bpw 4.5

On a cluster (https://docs.dask.org/en/stable/deploying.html), with the package installed on all of it::

    python scripts/convert_cluster.py MODEL OUT.gguf --shards 64 --scheduler tcp://HOST:8786

What stands behind ``--`` goes to ``gguf-splitquant convert``. The same command with ``--resume`` goes on
after an interruption. Needs ``pip install 'gguf-splitquant[cluster]'``.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import shlex
import sys
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from pathlib import Path
from uuid import uuid4

from distributed import Client, LocalCluster, as_completed

from gguf_splitquant.cli import main as gguf_splitquant
from gguf_splitquant.cli.convert_options import add_arguments, recipe_from
from gguf_splitquant.errors import OutputError, SplitQuantError
from gguf_splitquant.gguf_io.sharding import shard_of
from gguf_splitquant.planning.refined import read_plan_recipe

_FIX = "delete it, or pass --resume if it is of this conversion"


def run(command: Sequence[str]) -> str:
    """One command of gguf-splitquant in this process, so that it dies with it. Returns what it said."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = gguf_splitquant(command)
    if code:
        raise RuntimeError(f"{shlex.join(command)} ended with {code}: {said.getvalue()}")
    return said.getvalue().strip()


def convert_shard(command: list[str], number: int, count: int) -> str:
    """One task. Its file may be complete: then only its worker's answer was lost."""
    return run([*command, "--shard", f"{number}/{count}", "--resume"])


def plan_once(command: list[str], plan: Path, *, resume: bool) -> list[str]:
    """Calibrate and choose types on this machine; the command with which all workers do the same."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    args = parser.parse_args(command[1:])
    recipe = recipe_from(args)
    if not recipe.refined or recipe.qtype or args.use_plan:
        return command
    if not plan.exists():
        run([*command, "--dry-run", "--plan", str(plan)])
    elif not resume:
        raise OutputError(plan, "exists", _FIX)
    elif read_plan_recipe(plan) != recipe:
        raise OutputError(plan, "is the plan of another recipe", "give the options of the interrupted run")
    return [*command, "--use-plan", str(plan)]


def convert_on_cluster(
    client: Client, model: str, out: Path, shards: int, options: list[str], *, resume: bool = False
) -> list[Path]:
    """All shards of ``out``, as tasks of a cluster.

    Args:
        client: of the cluster.
        model: checkpoint, at the same path on all machines.
        out: the output, likewise.
        shards: how many.
        options: for ``gguf-splitquant convert``.
        resume: go on with the plan and the shards that are there, if they are of this conversion.

    Raises:
        OutputError: a shard or the plan is there, without ``resume`` or of another conversion.
        RuntimeError: a shard cannot be made.
    """
    out = out.absolute()
    paths = [shard_of(out, number, shards) for number in range(shards)]
    there = [path for path in paths if path.exists()]
    if there and not resume:
        raise OutputError(there[0], "exists", _FIX)
    command = plan_once(["convert", model, str(out), *options], out.with_suffix(".plan.json"), resume=resume)

    # a scheduler remembers tasks by name, and those of other runs may be among them
    this_run = uuid4().hex

    def make(some: Collection[Path], retries: int) -> None:
        tasks = [
            client.submit(
                convert_shard,
                command,
                number,
                shards,
                key=f"{path.name}-{this_run}",
                pure=False,
                retries=retries,
            )
            for number, path in enumerate(paths, 1)
            if path in some
        ]
        for task in as_completed(tasks):
            print(task.result())

    try:
        # first, so that nothing is added to shards of another conversion
        make(there, retries=0)
    except RuntimeError as error:
        fix = "give the options of the interrupted run, or delete it"
        raise OutputError(out, f"a shard that is there cannot be kept: {error}", fix) from error
    # more attempts: a lock on a network drive may outlive a lost worker for a while
    make([path for path in paths if path not in there], retries=3)
    return paths


def main() -> int:
    own, options = sys.argv[1:], []
    if "--" in own:
        cut = own.index("--")
        own, options = own[:cut], own[cut + 1 :]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("out", type=Path, metavar="OUT.gguf")
    parser.add_argument("--shards", type=int, required=True)
    parser.add_argument("--resume", action="store_true", help="go on after an interruption")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--scheduler", metavar="ADDRESS", help="of a running cluster")
    where.add_argument("--workers", type=int, default=2, help="processes on this machine (default: 2)")
    args = parser.parse_args(own)
    with ExitStack() as stack:
        if args.scheduler is None:
            cluster = LocalCluster(n_workers=args.workers, threads_per_worker=1, dashboard_address=None)
            client = stack.enter_context(Client(stack.enter_context(cluster)))
        else:
            client = stack.enter_context(Client(args.scheduler))
        try:
            convert_on_cluster(client, args.model, args.out, args.shards, options, resume=args.resume)
        except (SplitQuantError, RuntimeError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
