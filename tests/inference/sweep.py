"""Kill a run at every point where it may die, resume it, and compare: one program for all points.

Each run is a fork, so that nothing is imported twice. ``python sweep.py FOLDER all`` kills at every
passage of every point, ``first`` at the first passage of each, and prints one JSON document.
"""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from fakes import MODEL, ThresholdPredictor, image, predict_cases, tree

from medmamba import failpoints
from medmamba.inference.verification import verify_output


def forked(do: Callable[[], None], **variables: object) -> int:
    """Run in a child process with environment variables; return how it ended, as ``wait`` does."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.environ.update({name: str(value) for name, value in variables.items()})
    try:
        do()
    except BaseException as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        os._exit(1)
    os._exit(0)


def main(place: Path, which: str) -> None:
    """Sweep, and print what was found."""
    cases = [image(place / "in", name, mark=i, seed=i) for i, name in enumerate("ab")]
    bad = image(place / "in", "c", mark=2)
    bad.images[0].write_bytes(b"rubbish")
    cases.append(bad)

    def run(folder: Path) -> None:
        predict_cases(cases, folder, ThresholdPredictor(), model=MODEL)

    def start_with_something_old(folder: Path) -> None:
        """A mask that nobody vouches for, and one of another model's, which is in the way."""
        folder.mkdir()
        (folder / "a.nii.gz").write_bytes(b"nobody's")
        predict_cases(cases[1:2], folder, ThresholdPredictor(level=70.0), model=MODEL)

    start_with_something_old(place / "old")
    shutil.copytree(place / "old", place / "whole")
    log = place / "passages"
    assert forked(lambda: run(place / "whole"), MEDMAMBA_FAILPOINTS_LOG=log) == 0
    passages = [line.split()[:2] for line in log.read_text().splitlines()]
    chosen = passages if which == "all" else [entry for entry in passages if entry[1] == "1"]
    expected = tree(place / "whole")
    problems = []
    for point, number in chosen:
        folder = place / f"{point}-{number}"
        shutil.copytree(place / "old", folder)
        armed = f"{point}@{number}=kill"
        ended = forked(lambda folder=folder: run(folder), MEDMAMBA_FAILPOINTS=armed)
        if ended != -9:
            problems.append(f"{armed}: the run ended with {ended}")
        # Masks may be missing or nobody's, but nothing may be torn or contradict its record.
        problems += [
            f"{armed}: {state.case_id} is {state.state} ({state.detail})"
            for state in verify_output(folder)
            if state.state in ("changed", "unreadable")
        ]
        if forked(lambda folder=folder: run(folder)) != 0:
            problems.append(f"{armed}: it cannot be resumed")
        if tree(folder) != expected:
            problems.append(f"{armed}: the resumed tree differs")
        if not all(state.sound for state in verify_output(folder)):
            problems.append(f"{armed}: the resumed tree does not verify")
        if left := [path.name for path in folder.rglob(".mm-tmp-*")]:
            problems.append(f"{armed}: left behind: {left}")
        shutil.rmtree(folder)
    passed = sorted({point for point, _ in passages})
    missing = sorted(set(failpoints.POINTS) - set(passed))
    sys.stdout.write(json.dumps({"kills": len(chosen), "missing": missing, "problems": problems}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
