"""``python -m atpo_async.cli`` is ``atpo``."""

from __future__ import annotations

import sys

from atpo_async.cli.main import main

sys.exit(main())
