"""Write the data of the tasks, byte for byte the same from the same seed.

python -m tiny_tasks.make_tasks            # rewrite the jsonl files in the tasks' folders
python -m tiny_tasks.make_tasks --check    # change nothing; exit 1 if a file differs
"""

import sys
from pathlib import Path

import smepo
from tiny_tasks import toys

HERE = Path(__file__).resolve().parent


def files_of(task: str, seed: int) -> dict[Path, bytes]:
    toy = toys.find(task)
    files = {
        "train.jsonl": toys.draw_rows(toy, seed, toy.TRAIN, held_out=False),
        "test.jsonl": toys.draw_rows(toy, seed + 1, toy.TEST, held_out=True),
        **getattr(toy, "FILES", {}),
    }
    return {HERE / task / name: toys.to_jsonl(rows) for name, rows in files.items()}


def main() -> None:
    parser = toys.Parser("make_tasks", __doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare only; exit 1 on a difference")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    for task in toys.TASKS:
        for path, content in files_of(task, given.seed).items():
            if not given.check:
                with smepo.replacing(path) as new:
                    new.write_bytes(content)
            elif path.read_bytes() != content:
                sys.exit(f"{path} differs from what the seed makes")


if __name__ == "__main__":
    sys.exit(toys.command(main))
