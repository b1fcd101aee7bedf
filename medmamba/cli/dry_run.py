"""What ``predict --dry-run`` prints."""

import sys
from collections import Counter
from pathlib import Path
from typing import Any

EXIT_SOME, EXIT_NONE, EXIT_UNSAFE = 4, 5, 7


def show_dry_run(images: Path, output: Path, model: Path, *, as_json: bool, **options: Any) -> int:
    """Print what would be done with each case; the exit code is that of ``check``."""
    from medmamba.files import to_json, to_plain
    from medmamba.inference.assignment import UNSAFE
    from medmamba.pipeline.dry_run import dry_run

    planned = dry_run(images, output, model, **options)
    taken = [case for case in planned if case.decision != "reject"]
    rejected = [case for case in planned if case.decision == "reject"]
    if as_json:
        sys.stdout.write(to_json({"dry_run": True, "cases": [to_plain(case) for case in planned]}))
    else:
        for case in planned:
            size = f", {max(1, round(case.memory_bytes / 2**20))} MiB" if case.memory_bytes else ""
            said = "; ".join((f"{case.reason}{size}", *case.warnings))
            print(f"{case.decision:8} {case.case_id}  {said}")
        counts = Counter(case.decision for case in planned)
        print(", ".join(f"{name}: {counts[name]}" for name in ("predict", "keep", "reject")))
    if options["gate"].strict and any(case.reason.partition(":")[0] in UNSAFE for case in rejected):
        return EXIT_UNSAFE
    return 0 if not rejected else EXIT_SOME if taken else EXIT_NONE
