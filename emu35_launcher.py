"""Starts the `emu35` command.

Importing anything of the package `emu35` imports torch and transformers, which takes seconds. So this module finds the
package's `cli.py` without importing the package: `emu35 --help` and mistyped options answer at once.
"""

import sys
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path


def main() -> int:
    path = Path(find_spec("emu35").origin).with_name("cli.py")
    spec = spec_from_file_location("emu35.cli", path)
    cli = sys.modules[spec.name] = module_from_spec(spec)
    spec.loader.exec_module(cli)
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
