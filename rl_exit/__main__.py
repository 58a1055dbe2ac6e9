"""``python -m rl_exit``: the command line where its script is not on the path, as in a job on a cluster."""

from rl_exit.cli import main

if __name__ == "__main__":
    main()
