"""The proxy's command line: sends each prompt to a prefill instance, then the request to decode.

python3 toy_proxy_server.py --pd-disaggregation --host localhost --port 7802 \\
    --prefiller-host <ip> --prefiller-port 7800 --decoder-host <ip> --decoder-port 7801
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

if not __package__:
    # Run as a script in its own folder: find ucm in this checkout, and not this folder's modules as
    # top-level ones.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

try:
    from ucm.errors import ConfigError
    from ucm.pd.flags import parse_flags
    from ucm.pd.fleet.file import read_instances
    from ucm.pd.server.loops import run
    from ucm.pd.server.serve import serve
except ModuleNotFoundError as error:
    raise SystemExit(f"the proxy needs {error.name}: pip install 'ucm[proxy]'") from None

logger = logging.getLogger("ucm.pd")


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve until SIGINT or SIGTERM."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(asctime)s %(message)s")
    settings = parse_flags(arguments, description=(__doc__ or "").splitlines()[0])
    if settings.instances_file is not None:
        try:
            read_instances(settings.instances_file)
        except ConfigError as error:
            _refuse(f"--instances-file: {error}")
    logger.info(settings.mode)
    try:
        run(serve(settings), loop=settings.loop)
    except ConfigError as error:
        _refuse(str(error))


def _refuse(problem: str) -> NoReturn:
    print(f"toy_proxy_server.py: {problem}", file=sys.stderr)
    raise SystemExit(2) from None


if __name__ == "__main__":
    main()
