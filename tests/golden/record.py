"""Record the golden rollouts again, with real runs: python tests/golden/record.py [NAME...]

Needed only when the format of recordings changes or a recording is added; then run `measure.py --write` as well.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from conftest import save_tiny_model  # noqa: E402
from kinds import RECORDINGS, ROLLOUTS, STUDENT_SEED, TEACHER_SEED, flags  # noqa: E402

from slime_opd.engine.ports import free_port  # noqa: E402
from slime_opd.engine.server import EngineProcess  # noqa: E402


def record(name: str, directory: Path, teacher_url: str) -> None:
    """Make one recording. Raises CalledProcessError if its run fails."""
    target = ROLLOUTS / name
    shutil.rmtree(target, ignore_errors=True)
    argv = flags(RECORDINGS[name], directory / "student", directory / "teacher", teacher_url)
    argv += ["--prompt-data", str(directory / "prompts.jsonl"), "--input-key", "prompt", "--rollout-shuffle"]
    argv += ["--ray-address", "local", "--run-dir", str(directory / name), "--no-tensorboard"]
    argv += ["--save-debug-rollout-data", str(target / "{rollout_id}.parquet")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent.parent)])}
    subprocess.run([sys.executable, "-m", "slime_opd.train", *argv], check=True, env=environment)


def main() -> None:
    """Make all recordings, or those named on the command line."""
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        for name, seed in (("student", STUDENT_SEED), ("teacher", TEACHER_SEED)):
            (directory / name).mkdir()
            save_tiny_model(directory / name, seed=seed)
        rows = [{"prompt": f"{i}+{i * 7 % 10}=", "response": str(i + i * 7 % 10)} for i in range(64)]
        (directory / "prompts.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
        with EngineProcess(directory / "teacher", port=free_port(), log_path=directory / "teacher.log") as teacher:
            teacher.wait_ready(600)
            for name in sys.argv[1:] or RECORDINGS:
                record(name, directory, teacher.url)


if __name__ == "__main__":
    main()
