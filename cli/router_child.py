"""The router as a child of `baton serve`: the same process as `python -m baton.router.server`, except that it does not
outlive its parent, however that ends.

    python -m baton.cli.router_child PARENT_PID <arguments of baton.router.server>
"""

from __future__ import annotations

import signal
import sys

from baton.cluster.watchdog import die_with_parent
from baton.router.server import main

if __name__ == "__main__":
    die_with_parent(int(sys.argv.pop(1)), signal.SIGTERM)
    main()
