"""Train on a file of your own from Python: the same run as ``rl-exit train task.name=local task.path=...``.

Run:     python examples/own_data.py tickets.csv           (columns: text, label; more settings: key=value words)
Expect:  progress, then the table of what early exit saves, and runs/<file name>/model to load.
"""

import sys
from pathlib import Path

from rich.console import Console

from rl_exit import load_config
from rl_exit.progress import Terminal
from rl_exit.tables import print_table, results_table
from rl_exit.trainers.alternation import train


def main(path: str, *words: str) -> None:
    """Train on one file; a tenth of it is kept for choosing."""
    config = load_config(None, [f"name={Path(path).stem}", "task.name=local", f"task.path={path}", *words])
    results = train(config, Terminal(), resume=True)
    print_table(Console(), results_table(results))
    print(f"model: {config.run_dir / 'model'}")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python examples/own_data.py FILE [key=value]...")
    main(*sys.argv[1:])
