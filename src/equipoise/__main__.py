"""The command `equipoise`, also as `python -m equipoise`."""

import sys


def main() -> None:
    """Run the command, or say in one sentence what it needs."""
    try:
        from equipoise.lab.cli import main as command
    except ModuleNotFoundError as error:
        if (error.name or "equipoise").startswith("equipoise"):
            raise
        print(
            f"equipoise: the command needs {error.name}, which is not installed; "
            "pip install -c constraints.txt '.[lab]'",
            file=sys.stderr,
        )
        sys.exit(2)
    command()


if __name__ == "__main__":
    main()
