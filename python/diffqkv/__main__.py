"""`python -m diffqkv`: prints the configuration."""

import argparse

from . import show_config


def main() -> None:
    argparse.ArgumentParser(prog="python -m diffqkv", description="Print the configuration of diffqkv.").parse_args()
    show_config()


if __name__ == "__main__":
    main()
