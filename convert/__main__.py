"""`python -m convert build | export | merge | unmerge | pack | inspect` (cli.py)."""

from convert.cli import run

if __name__ == "__main__":
    run()
