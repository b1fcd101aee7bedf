"""Where libraries keep what they compile and cache: below ``MEDMAMBA_CACHE_DIR`` when it is set.

A container runs as any user, without a home folder, on a read-only root; each library looks for
its own variable. What the user has set for a library stays.
"""

import os
from collections.abc import MutableMapping
from pathlib import Path

CACHE_VARIABLE = "MEDMAMBA_CACHE_DIR"
FOLDER_OF = {
    "TRITON_CACHE_DIR": "triton",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "MPLCONFIGDIR": "matplotlib",
    "XDG_CACHE_HOME": "cache",
}


def place_caches(environment: MutableMapping[str, str] = os.environ) -> None:
    """Point the libraries' caches into the folder, before any of them is imported."""
    root = environment.get(CACHE_VARIABLE)
    if not root:
        return
    for variable, folder in FOLDER_OF.items():
        environment.setdefault(variable, str(Path(root) / folder))
