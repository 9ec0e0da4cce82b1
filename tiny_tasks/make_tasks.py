"""Write the toy datasets, byte for byte the same from the same seed.

    python tiny_tasks/make_tasks.py            # rewrite the jsonl files beside this script
    python tiny_tasks/make_tasks.py --check    # change nothing; exit 1 if a file differs
"""

import argparse
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from tiny_tasks import arithmetic, coding, searching, toys  # noqa: E402

TOYS = {"arithmetic": arithmetic, "code": coding, "search": searching}

def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare only; exit 1 on a difference")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    files = {}
    for name, toy in TOYS.items():
        train = toys.draw_rows(toy, arguments.seed, toy.TRAIN, held_out=False)
        test = toys.draw_rows(toy, arguments.seed + 1, toy.TEST, held_out=True)
        files |= {f"{name}_train.jsonl": train, f"{name}_test.jsonl": test}
        files |= getattr(toy, "FILES", {})
    stale = []
    for name, rows in files.items():
        path = HERE / name
        text = toys.to_jsonl(rows)
        if path.exists() and path.read_bytes() == text:
            continue
        stale.append(name)
        if not arguments.check:
            path.with_suffix(".tmp").write_bytes(text)
            os.replace(path.with_suffix(".tmp"), path)
    if arguments.check:
        print(f"differ: {', '.join(stale)}" if stale else "all files are as the seed makes them")
        return 1 if stale else 0
    print(f"wrote {', '.join(stale)}" if stale else "nothing to change")
    return 0


if __name__ == "__main__":
    sys.exit(main())
